from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.gpu import architecture, wanted_capabilities
from envbuilder.recipe import CudaSpec


def cuda(*, detect: bool) -> CudaSpec:
    return CudaSpec.model_validate(
        {"compute_capabilities": ["9.0", "10.0a"], "detect": detect, "toolchain": "system"}
    )


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_that_are_here_decide_where_the_recipe_lets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "printf '12.0\\n8.9\\n8.9\\n'")
    assert wanted_capabilities(cuda(detect=True)) == ("12.0", "8.9")
    assert wanted_capabilities(cuda(detect=False)) == ("10.0a", "9.0")


@pytest.mark.parametrize("text", ["echo 'No devices were found'", "echo 9.0; exit 9", "echo '[N/A]'"])
def test_without_a_usable_gpu_the_recipe_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    nvidia_smi(tmp_path, monkeypatch, text)
    assert wanted_capabilities(cuda(detect=True)) == ("10.0a", "9.0")


def test_without_cuda_there_are_none() -> None:
    assert wanted_capabilities(None) == ()


def test_nvccs_numbers() -> None:
    assert [architecture(text) for text in ("9.0", "10.0a", "12.1f")] == ["90", "100a", "121f"]
