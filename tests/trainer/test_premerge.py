"""A premerged folder: the same model for us and for transformers, in few files, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from trainer import premerge as module
from trainer.errors import ConfigError, TrainingFailed
from trainer.loading import named_tensors
from trainer.premerge import MANIFEST, main, premerge, verify
from trainer.weights import inspect_weights

from .test_loading import assert_equal, hub_folder, load


@pytest.fixture
def hub(causal_lm: Any, tmp_path: Path) -> Path:
    return hub_folder(causal_lm, tmp_path / "hub")


@pytest.fixture
def merged(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "FILE_BYTES", 60_000)
    (hub / "tokenizer.json").write_text("{}")
    (hub / "pytorch_model.bin").write_text("")
    out = tmp_path / "merged"
    premerge(hub, out)
    return out


def test_it_loads_as_the_model_that_it_was_made_of(hub: Path, merged: Path) -> None:
    assert_equal(load(merged), load(hub))
    assert_equal(load(merged, "bfloat16"), load(hub, "bfloat16"))


def test_transformers_loads_it_too(hub: Path, merged: Path) -> None:
    ours: Any = AutoModelForCausalLM.from_pretrained(merged)
    assert_equal(ours, AutoModelForCausalLM.from_pretrained(hub))


def test_its_tensors_are_the_models_own_in_the_order_of_loading(hub: Path, merged: Path) -> None:
    files = sorted(merged.glob("*.safetensors"))
    assert 2 <= len(files) < len(list(hub.glob("*.safetensors")))
    stored: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored += opened.offset_keys()
    assert stored == list(named_tensors(load(merged)))
    assert not inspect_weights(merged)["problems"]
    there = {file.name for file in merged.iterdir()}
    assert {"config.json", "tokenizer.json", MANIFEST} < there
    assert "pytorch_model.bin" not in there


def test_verify_finds_a_changed_byte_and_a_missing_file(merged: Path) -> None:
    files = sorted(merged.glob("*.safetensors"))
    assert verify(merged) == len(files)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(ConfigError, match=files[0].name):
        verify(merged)
    files[0].unlink()
    with pytest.raises(ConfigError, match=files[0].name):
        verify(merged)


def test_a_folder_that_premerge_didnt_write_is_not_verified(hub: Path) -> None:
    with pytest.raises(ConfigError, match=MANIFEST):
        verify(hub)


def test_nothing_is_left_of_a_failure(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(TrainingFailed, match="No space left"):
        premerge(hub, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_the_command_line(
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["premerge", *arguments])
        return main()

    assert run(str(hub), str(out)) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert f"{index['metadata']['total_size']:,} bytes" in capsys.readouterr().out
    assert run("--verify", str(out)) == 0
    assert run(str(hub), str(out)) == 3
    assert f"rm -r {out}" in capsys.readouterr().err
