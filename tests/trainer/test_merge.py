"""`python -m trainer.merge`: base and adapter as one folder that transformers loads with equal logits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.config import PeftSection
from trainer.errors import ConfigError
from trainer.kernels import find_mamba_kernels
from trainer.lora import save_adapter
from trainer.merge import main, merge
from trainer.premerge import MANIFEST, premerge

from .test_lora import logits, trained

EVERYTHING = PeftSection(
    target_modules=("mixer.*", "shared_experts.*", "experts.*", "lm_head"), dim=4, alpha=8, use_rslora=True
)


def save_base(causal_lm: Any, folder: Path, *, hub: bool, shards: str = "50GB") -> Path:
    """The base's folder, in the hub's layout or in transformers' own."""
    causal_lm.save_pretrained(folder, save_original_format=hub, max_shard_size=shards)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("the same weights in another format")
    return folder


def load(folder: Path) -> Any:
    find_mamba_kernels("cpu")
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, local_files_only=True)
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):  # transformers clamps dt otherwise than these models want
            block.mixer.time_step_limit = (0.0, float("inf"))
    return model


@pytest.mark.parametrize("layout", ["hub", "transformers", "premerged"])
def test_the_merged_folder_has_the_adapted_models_logits(
    causal_lm: Any, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = layout == "hub"
    base = save_base(copy.deepcopy(causal_lm), tmp_path / "base", hub=hub, shards="60KB")
    if layout == "premerged":
        monkeypatch.setattr("trainer.premerge.FILE_BYTES", 60_000)
        premerge(base, tmp_path / "premerged")
        base = tmp_path / "premerged"
    model = trained(causal_lm, EVERYTHING)
    save_adapter(model, tmp_path / "adapter")
    assert merge(tmp_path / "adapter", base, tmp_path / "merged") == 13
    stored = [set(load_file(file)) for file in (tmp_path / "merged").glob("*.safetensors")]
    assert len(stored) > 1
    assert any("experts.3.up_proj" in name for names in stored for name in names) == hub
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(load(base)) - logits(model)).abs().max() > 0.1
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    assert {"pytorch_model.bin", MANIFEST}.isdisjoint(names)


def test_a_bf16_base_stays_bf16(causal_lm: Any, tmp_path: Path) -> None:
    causal_lm = causal_lm.to(torch.bfloat16)
    base = save_base(copy.deepcopy(causal_lm), tmp_path / "base", hub=True)
    model = trained(causal_lm, PeftSection(target_modules=("experts.*", "in_proj"), dim=4))
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert all(".experts." in name or "in_proj" in name for name in changed)
    assert len(changed) == 10


def test_a_base_of_other_shapes_or_other_values_is_refused(causal_lm: Any, tmp_path: Path) -> None:
    base = save_base(copy.deepcopy(causal_lm), tmp_path / "base", hub=True)
    save_adapter(trained(causal_lm, EVERYTHING), tmp_path / "adapter")
    file = base / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mixer.in_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"another model.*other values"):
        merge(tmp_path / "adapter", base, tmp_path / "merged")
    adapter = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(adapter)
    (adapter.parent / "base.json").unlink()  # as of another trainer: names and shapes are left to tell
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 8)
    save_file(tensors, adapter)
    with pytest.raises(ConfigError, match=r"another model.*lm_head\.weight is \[264, 32\]"):
        merge(tmp_path / "adapter", base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_command_says_what_is_wrong(
    causal_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(copy.deepcopy(causal_lm), tmp_path / "base", hub=True)
    words = ["merge", str(tmp_path / "adapter"), str(base), str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 3
    assert "no readable adapter" in capsys.readouterr().err
    save_adapter(trained(causal_lm, EVERYTHING), tmp_path / "adapter")
    assert main() == 0
    assert "13 weights merged" in capsys.readouterr().out
    assert main() == 3
    assert "is there already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob(".merged*")] == []
