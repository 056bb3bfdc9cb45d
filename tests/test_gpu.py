from __future__ import annotations

from pathlib import Path

import pytest

import envbuilder.gpu
from envbuilder.gpu import architecture, list_gpus, present_capabilities, read_gpus, wanted_capabilities
from envbuilder.recipe import CudaSpec
from envbuilder.train.launch import visible_gpus

DEVICES = """\
0, NVIDIA H200, 9.0, 580.65.06, 143771, Default
1, NVIDIA RTX 6000, 8.9, 580.65.06, 49140, Exclusive_Process
2, NVIDIA RTX 6000, 8.9, 580.65.06, 49140, Default"""
OVERVIEW = "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |"
ANSWERS = f"case \"$1\" in --query*) echo '{DEVICES}';; *) echo '{OVERVIEW}';; esac"


def cuda(*, detect: bool) -> CudaSpec:
    return CudaSpec.model_validate(
        {"compute_capabilities": ["9.0", "10.0a"], "detect": detect, "toolchain": "system"}
    )


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_read_with_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, ANSWERS)
    gpus = read_gpus()
    assert (gpus.cuda, gpus.problem) == ("13.0", None)
    assert [gpu.index for gpu in gpus.devices] == ["0", "1", "2"]
    first, second, _ = gpus.devices
    assert (first.name, first.compute_capability, first.driver) == ("NVIDIA H200", "9.0", "580.65.06")
    assert (first.memory_mib, second.compute_mode) == ("143771", "Exclusive_Process")


def test_gpus_that_are_here_decide_where_the_recipe_lets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, ANSWERS)
    assert wanted_capabilities(cuda(detect=True)) == ("8.9", "9.0")
    assert wanted_capabilities(cuda(detect=False)) == ("10.0a", "9.0")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo 'No devices were found'; exit 6", None),
        ("echo '0, NVIDIA H200, 9.0, 580.65.06, 1, Default'; exit 9", "nvidia-smi fails: 0, NVIDIA"),
        ("echo 'Unable to determine the device handle'; exit 255", "nvidia-smi fails: Unable"),
        ("true", "nvidia-smi fails: "),
    ],
)
def test_without_a_usable_gpu_the_recipe_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str | None
) -> None:
    nvidia_smi(tmp_path, monkeypatch, text)
    gpus = list_gpus()
    assert gpus.devices == ()
    assert (gpus.problem or "").startswith(problem or "")
    assert (gpus.problem is None) == (problem is None)
    assert wanted_capabilities(cuda(detect=True)) == ("10.0a", "9.0")


def test_a_gpu_that_does_not_say_its_capability_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo '0, NVIDIA H200, [N/A], 580.65.06, [N/A], Default'")
    assert len(list_gpus().devices) == 1
    assert present_capabilities() == ()


def test_an_nvidia_smi_that_hangs_is_given_up_on_by_all_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envbuilder.gpu, "_TIMEOUT_S", 0.2)
    nvidia_smi(tmp_path, monkeypatch, "sleep 600")
    assert "gave no answer" in read_gpus().absence
    assert wanted_capabilities(cuda(detect=True)) == ("10.0a", "9.0")
    assert visible_gpus({}) == 0


def test_a_machine_without_nvidia_smi_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus().absence == "This machine has no GPU."
    assert visible_gpus({}) == 0


def test_without_variables_training_counts_the_gpus_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, ANSWERS)
    assert visible_gpus({}) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1


def test_without_cuda_there_are_none() -> None:
    assert wanted_capabilities(None) == ()


def test_nvccs_numbers() -> None:
    assert [architecture(text) for text in ("9.0", "10.0a", "12.1f")] == ["90", "100a", "121f"]
