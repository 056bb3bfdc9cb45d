"""NeMo Automodel's own YAML: what is taken over, what is named as of no effect, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import Config, LrSchedulerSection
from trainer.errors import ConfigError
from trainer.nemo import RULES, TARGETS, Moved
from trainer.reading import dump_config, read_config
from trainer.schedule import learning_rate

from .conftest import CONFIG, RunTrainer, losses

FIXTURES = Path(__file__).parent / "fixtures"


def changed(config: Config) -> dict[str, Any]:
    """What `config` says other than by default, as plain values."""
    plain: dict[str, Any] = json.loads(config.model_dump_json(exclude_defaults=True))
    return plain


def noted(config: Config) -> set[str]:
    return {note.partition(": ")[0] for note in config.notes()}


def test_the_shipped_config_is_the_guides_for_its_gpus() -> None:
    shipped = changed(read_config(FIXTURES.parents[2] / "recipes/train/nemotron3-nano-leonardo.yaml"))
    guide = changed(read_config(FIXTURES / "guide.yaml"))
    assert shipped.pop("distributed") == {"gpu_memory_gib": 61}
    for data in ("dataset", "validation_dataset"):
        assert shipped[data].pop("seq_length") == 4096
        assert shipped.pop(data).keys() == guide.pop(data).keys()
    assert shipped.pop("model").keys() == guide.pop("model").keys()
    assert shipped == guide


def test_the_guides_file_means_the_same_here() -> None:
    config = read_config(FIXTURES / "guide.yaml")
    assert changed(config) == {
        "seed": 1111,
        "model": {"pretrained_model_name_or_path": "/path/to/models/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"},
        "peft": {"match_all_linear": True},
        "dataset": {"path_or_dataset_id": "/path/to/your/data.jsonl"},
        "validation_dataset": {"path_or_dataset_id": "/path/to/validation.jsonl"},
        "step_scheduler": {
            "global_batch_size": 8,
            "max_steps": 200,
            "val_every_steps": 100,
            "ckpt_every_steps": 500,
        },
        "optimizer": {"name": "adam", "lr": 1e-5},
        "lr_scheduler": {
            "lr_decay_style": "cosine",
            "lr_warmup_steps": None,
            "init_lr": pytest.approx(1e-6),
            "min_lr": 1e-6,
        },
    }
    assert (config.peft.dim, config.peft.alpha, config.model.dtype) == (8, 32, "bfloat16")
    assert (config.step_scheduler.local_batch_size, config.optimizer.max_grad_norm) == (1, 1.0)
    assert noted(config) == {
        "model.trust_remote_code",
        "model.backend",
        "checkpoint.checkpoint_dir",
        "peft.use_triton",
        "dataset.seq_length",
    }


def test_the_guides_file_has_nothing_that_is_silently_left_out() -> None:
    """Every value of it is in the config, is noted, or asks for nothing or for what is done anyway."""
    file = FIXTURES / "guide.yaml"
    config = read_config(file)
    said = {"compile.enabled", "distributed.dp_size", "distributed.tp_size", "distributed.cp_size"}
    said |= {
        "compile.mode",
        "compile.fullgraph",
        "compile.dynamic",
        "compile.backend",
    }  # of a switch that is off
    said |= {"distributed.sequence_parallel", "packed_sequence.packed_sequence_size", "rng.ranked"}
    said |= {"dist_env.backend", "dataloader.collate_fn", "validation_dataloader.collate_fn"}
    said |= {"checkpoint.model_save_format", "checkpoint.save_consolidated"}
    said |= {
        "rng.seed",
        "dist_env.timeout_minutes",
        "dataloader.shuffle",
        "model.torch_dtype",
    }  # named otherwise
    kept = json.loads(config.model_dump_json())
    for section, keys in yaml.safe_load(file.read_text()).items():
        for key in set(keys) - {"_target_"}:
            dotted = f"{section}.{key}"
            assert dotted in said | noted(config) or key in kept[section], dotted


def test_the_guides_file_trains_with_a_small_model(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    small = yaml.safe_load(CONFIG)["model"]["config"]
    config_file.write_text((FIXTURES / "guide.yaml").read_text())
    code, outcome = run_trainer(
        "device=cpu", "model.pretrained_model_name_or_path=null", f"model.config={json.dumps(small)}",
        "model.init=random", "model.torch_dtype=float32", "model.tokenizer=byte", "dataset.seq_length=64",
        "dataset.path_or_dataset_id=train.jsonl", "validation_dataset.path_or_dataset_id=validation.jsonl",
        "step_scheduler.max_steps=2", "optimizer.lr=0.01",
    )  # fmt: skip
    assert (code, outcome["steps"]) == (0, 2)
    assert losses(tmp_path / "run").keys() == {1, 2}
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    assert any(note.startswith("peft.use_triton: has no effect") for note in notes)


def test_a_llama_recipe_means_the_same_here() -> None:
    config = read_config(FIXTURES / "llama-chat.yaml")
    model = str(FIXTURES / "models/Llama-3.2-1B-Instruct")
    assert changed(config) == {
        "seed": 42,
        "model": {"pretrained_model_name_or_path": model, "tokenizer": model},
        "peft": {"dim": 16, "alpha": 16, "dropout": 0.1, "target_modules": ["*_proj"]},
        "dataset": {
            "path_or_dataset_id": str(FIXTURES / "data/train.jsonl"),
            "seq_length": 1024,
            "train_on": "last",
            "shuffle": False,
        },
        "step_scheduler": {
            "global_batch_size": 64,
            "local_batch_size": 8,
            "num_epochs": 1,
            "ckpt_every_steps": 100,
        },
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.01, "max_grad_norm": 0.5},
        "lr_scheduler": {
            "lr_decay_style": "linear",
            "lr_warmup_steps": None,
            "init_lr": pytest.approx(1e-5),
            "min_lr": pytest.approx(1e-6),
        },
        "distributed": {"placement": "replicate", "timeout_minutes": 5},
        "logging": {"wandb_project": "tuning", "wandb_name": "llama"},
    }
    assert noted(config) == {
        "rng.seed",
        "step_scheduler.gc_every_steps",
        "step_scheduler.val_every_steps",
        "model.torch_dtype",
        "model.output_hidden_states",
        "peft.dropout",
        "loss_fn.chunk_len",
        "loss_fn.compile",
        "dataset.split",
        "dataset.truncation",
        "dataloader.num_workers",
        "dataloader.drop_last",
        "optimizer.fused",
        "checkpoint.checkpoint_dir",
        "checkpoint.save_consolidated",
        "checkpoint.is_async",
        "slurm",
    }


@pytest.mark.parametrize(
    ("section", "logging", "notes"),
    [
        ({"project": "p", "name": "n"}, {"wandb_project": "p", "wandb_name": "n"}, set()),
        ({"mode": "disabled"}, {"wandb": False}, set()),
        ({"mode": "offline"}, {}, set()),
        ({"mode": "online"}, {}, {"wandb"}),
        (
            {"entity": "e", "save_dir": "d", "tags": ["t"], "name": None},
            {},
            {"wandb.entity", "wandb.save_dir", "wandb"},
        ),
    ],
)
def test_what_weights_and_biases_is_told_is_taken_over_or_named(
    config_file: Path, section: dict[str, Any], logging: dict[str, Any], notes: set[str]
) -> None:
    config_file.write_text(f"{CONFIG}{yaml.safe_dump({'wandb': section})}")
    config = read_config(config_file)
    assert changed(config).get("logging", {}) == logging
    assert noted(config) == notes


def test_a_packed_qwen3_moe_recipe_means_the_same_here() -> None:
    config = read_config(FIXTURES / "qwen3-moe-packed.yaml")
    assert changed(config) == {
        "seed": 1234,
        "model": {"pretrained_model_name_or_path": str(FIXTURES / "models/Qwen3-30B-A3B")},
        "peft": {"dim": 32, "match_all_linear": True, "exclude_modules": ["*.o_proj"]},
        "dataset": {
            "path_or_dataset_id": str(FIXTURES / "data/train.jsonl"),
            "seq_length": 4096,
            "packing": True,
        },
        "step_scheduler": {"global_batch_size": 32, "local_batch_size": 2, "max_steps": 500},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.05},
        "distributed": {"activation_checkpointing": True, "timeout_minutes": 20},
        "checkpoint": {"enabled": False},
    }
    assert noted(config) == {
        "step_scheduler.val_every_steps",
        "model.backend",
        "distributed.ep_size",
        "distributed.moe",
        "ci",
    }


def test_what_would_train_something_else_is_refused_with_line_and_key() -> None:
    file = FIXTURES / "refused.yaml"
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    lines = file.read_text().splitlines()
    told = [text for key, text in caught.value.context.items() if key.startswith("mistake")]
    expected = [
        ("recipe: Know", "recipe", "only fine-tuning"),
        ("  max_norm: 0.5", "clip_grad_norm.max_norm", "is 0.5, but optimizer.max_grad_norm is 1.0"),
        ("  order: fixed", "rng.order", "unknown key"),
        ("    fake_balanced_gate: true", "model.backend.fake_balanced_gate", "router"),
        ("  use_dora: true", "peft.use_dora", "DoRA is not there"),
        ("  strategy: megatron_fsdp", "distributed.strategy", "fsdp2"),
        ("  tp_size: 2", "distributed.tp_size", "tensor parallelism is not there"),
        (
            "  _target_: nemo_automodel.components.loss.kd_loss.KDLoss",
            "loss_fn._target_",
            "MaskedCrossEntropy",
        ),
        ("  _target_: nemo_automodel.components.datasets.llm.hell", "dataset._target_", "ChatDataset"),
        ("  chat_template: t", "validation_dataset.chat_template", "tokenizer's folder"),
        ("  collate_fn: nemo", "dataloader.collate_fn", "padded on the right"),
        ("  load_in_4bit: true", "quantization.load_in_4bit", "not there"),
        ("  restore_from: LATEST", "checkpoint.restore_from", "newest checkpoint"),
    ]
    for start, key, reason in expected:
        number = next(n for n, line in enumerate(lines, start=1) if line.startswith(start))
        assert any(text.startswith(f"line {number}: {key}: ") and reason in text for text in told), key
    assert len(told) == len(expected)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_the_table_is_taken_in_its_section(target: str, config_file: Path) -> None:
    tree = yaml.safe_load(config_file.read_text())
    tree.setdefault(TARGETS[target][0], {})["_target_"] = target
    config_file.write_text(yaml.safe_dump(tree))
    assert read_config(config_file)


def test_every_rule_leads_to_a_key_that_there_is() -> None:
    for rule in RULES.values():
        if isinstance(rule, Moved):
            section: Any = Config
            for name in rule.to:
                field = section.model_fields[name]
                section = field.annotation


def test_what_is_said_on_the_command_line_wins_over_the_file() -> None:
    file = FIXTURES / "guide.yaml"
    config = read_config(file, ["seed=7", "clip_grad_norm.max_norm=0.3", "rng.ranked=null"])
    assert (config.seed, config.optimizer.max_grad_norm) == (7, 0.3)
    assert read_config(file, ["rng.seed=8"]).seed == 8
    with pytest.raises(ConfigError, match=r"--set: distributed\.tp_size: 2 is not supported") as caught:
        read_config(file, ["distributed.tp_size=2"])
    assert caught.value.remedy == "change what --set says"


def test_the_config_as_used_needs_no_translation(tmp_path: Path) -> None:
    config = read_config(FIXTURES / "qwen3-moe-packed.yaml")
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    again = read_config(copy)
    assert again.model_dump() == config.model_dump()
    assert again.notes() == ()


@pytest.mark.parametrize(("target", "decay"), [("torch.optim.AdamW", 0.01), ("torch.optim.Adam", 0.0)])
def test_a_weight_decay_that_is_not_given_is_the_one_of_the_class(
    config_file: Path, target: str, decay: float
) -> None:
    assert read_config(config_file, [f"optimizer._target_={target}"]).optimizer.weight_decay == decay


def test_a_packed_length_that_is_not_the_sequence_length_is_refused(tmp_path: Path) -> None:
    text = (FIXTURES / "qwen3-moe-packed.yaml").read_text()
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("data/train.jsonl\n", "data/train.jsonl\n  seq_length: 1024\n"))
    with pytest.raises(ConfigError, match=r"packed_sequence_size: is 4096, but dataset\.seq_length is 1024"):
        read_config(file)


def test_a_warm_up_that_is_not_given_is_a_tenth_of_the_steps_from_a_tenth_of_the_rate() -> None:
    section = LrSchedulerSection(lr_warmup_steps=None, init_lr=0.1, lr_decay_style="constant")
    rates = [learning_rate(step, 20, peak=1.0, section=section) for step in range(1, 21)]
    assert rates == pytest.approx([0.55, *[1.0] * 19])
