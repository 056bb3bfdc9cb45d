"""What a config may say, and what a wrong one answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.errors import ConfigError
from trainer.reading import dump_config, read_config


def test_every_mistake_is_reported_at_once_with_line_and_key(config_file: Path) -> None:
    text = config_file.read_text().replace("  dim: 4\n", "  dim: four\n  rank: 3\n")
    config_file.write_text(text.replace("  max_steps: 6\n", "") + "extra: 1\n")
    with pytest.raises(ConfigError) as problem:
        read_config(config_file)
    lines = config_file.read_text().splitlines()
    for start, key, reason in (
        ("  dim: four", "peft.dim", "valid integer"),
        ("  rank: 3", "peft.rank", "unknown key"),
        ("step_scheduler:", "step_scheduler", "give max_steps or num_epochs"),
        ("extra: 1", "extra", "unknown key"),
    ):
        expected = f"line {lines.index(start) + 1}: {key}: "
        assert any(v.startswith(expected) and reason in v for v in problem.value.context.values()), expected
    assert problem.value.exit_code == 3


def test_a_missing_section_is_named(config_file: Path) -> None:
    config_file.write_text(config_file.read_text().replace("optimizer:\n  lr: 1.0e-2\n", ""))
    with pytest.raises(ConfigError, match="optimizer: is missing"):
        read_config(config_file)


def test_a_key_given_twice_is_a_mistake(config_file: Path) -> None:
    config_file.write_text(config_file.read_text().replace("  dim: 4\n", "  dim: 4\n  dim: 8\n"))
    with pytest.raises(ConfigError, match=r"peft\.dim: is given twice"):
        read_config(config_file)


def test_broken_yaml_names_the_line(config_file: Path) -> None:
    config_file.write_text("device: cpu\nmodel: [unclosed\n")
    with pytest.raises(ConfigError, match=r"not YAML: line \d"):
        read_config(config_file)


def test_an_absent_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_config(tmp_path / "none.yaml")


def test_overrides_change_values_and_are_checked(config_file: Path) -> None:
    config = read_config(config_file, ["optimizer.lr=1e-4", "peft.dim=2", "checkpoint.keep_last=5"])
    assert (config.optimizer.lr, config.peft.dim, config.checkpoint.keep_last) == (1e-4, 2, 5)
    with pytest.raises(ConfigError, match=r"--set: peft\.dimm: unknown key"):
        read_config(config_file, ["peft.dimm=2"])
    with pytest.raises(ConfigError, match=r"--set: pefft: unknown key") as caught:
        read_config(config_file, ["pefft.dim=2"])
    assert caught.value.remedy == "change what --set says"
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        read_config(config_file, ["peft.dim"])


def test_scientific_notation_without_a_point_is_a_number(config_file: Path) -> None:
    text = config_file.read_text().replace("    initializer_range: 0.2\n", "    initializer_range: 2e-1\n")
    config_file.write_text(text)
    fields = read_config(config_file).model.config
    assert fields is not None
    assert fields["initializer_range"] == 0.2


def test_paths_start_at_the_yaml_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert read_config(config_file).dataset.path_or_dataset_id == config_file.parent / "train.jsonl"


def test_the_config_as_used_reads_back_the_same_elsewhere(config_file: Path, tmp_path: Path) -> None:
    config = read_config(config_file)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "config.yaml"
    copy.write_text(dump_config(config))
    assert read_config(copy) == config


def test_known_targets_of_nemo_automodel_are_mapped(config_file: Path) -> None:
    tree = yaml.safe_load(config_file.read_text())
    tree["peft"]["_target_"] = "nemo_automodel.components._peft.lora.PeftConfig"
    tree["optimizer"]["_target_"] = "torch.optim.Adam"
    tree["dataset"]["_target_"] = "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset"
    config_file.write_text(yaml.safe_dump(tree))
    assert read_config(config_file).optimizer.name == "adam"


def test_an_unknown_target_names_the_known_ones(config_file: Path) -> None:
    text = config_file.read_text().replace("optimizer:\n", "optimizer:\n  _target_: torch.optim.SGD\n")
    config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"optimizer\._target_: torch\.optim\.SGD.*torch\.optim\.AdamW"):
        read_config(config_file)


@pytest.mark.parametrize(
    "recipe", sorted(Path(__file__).parents[2].glob("recipes/train/*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_configs_are_right(recipe: Path) -> None:
    assert read_config(recipe).step_scheduler.max_steps
