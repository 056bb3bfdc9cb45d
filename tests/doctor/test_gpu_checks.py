from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor.checks.gpu import judge_kernels
from envbuilder.model import InstalledPackage
from envbuilder.paths import Root
from tests.doctor.conftest import TinyEnv, nvidia_smi, run_one, torch_version

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]


@pytest.mark.parametrize("check", ["gpu.devices", "gpu.driver"])
@pytest.mark.parametrize("smi", [{}, {"nvidia_smi": "echo No devices were found; exit 6"}])
def test_without_a_gpu_the_checks_are_skipped(
    root: Root, programs: Programs, smi: dict[str, str], check: str
) -> None:
    programs(**smi)
    finding = run_one(check, root=root)
    assert finding.verdict == "skipped"
    assert finding.summary == "This machine has no GPU."


def test_gpus_are_listed_with_what_they_can(root: Root, programs: Programs) -> None:
    programs(nvidia_smi=nvidia_smi())
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "ok"
    assert "NVIDIA H200, compute capability 9.0, 143771 MiB" in finding.evidence[0]


def test_a_driver_that_does_not_answer_fails(root: Root, programs: Programs) -> None:
    programs(
        nvidia_smi='echo "NVIDIA-SMI has failed because it could not communicate with the driver."; exit 9'
    )
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "failed"
    assert "could not communicate" in finding.evidence[0]


@pytest.mark.parametrize(
    "smi", [nvidia_smi(mode="Prohibited"), nvidia_smi("[Unknown Error], [Unknown Error]")]
)
def test_a_gpu_that_takes_no_work_fails(root: Root, programs: Programs, smi: str) -> None:
    programs(nvidia_smi=smi)
    finding = run_one("gpu.devices", root=root)
    assert finding.verdict == "failed"
    assert "GPU 0" in finding.summary


def test_hidden_gpus_are_a_warning(root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(nvidia_smi=nvidia_smi())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_one("gpu.devices", root=root).verdict == "warning"


@pytest.mark.parametrize(
    ("driver", "torch", "verdict"),
    [("13.0", "13.0", "ok"), ("13.1", "13.0", "ok"), ("12.4", "12.8", "warning"), ("12.8", "13.0", "failed")],
)
def test_the_driver_must_serve_the_major_version_of_torchs_cuda(
    make_env: MakeEnv, programs: Programs, driver: str, torch: str, verdict: str
) -> None:
    env = make_env(files=torch_version(cuda=torch))
    programs(nvidia_smi=nvidia_smi(cuda=driver))
    finding = env.check("gpu.driver")
    assert finding.verdict == verdict
    assert driver in finding.summary


def test_a_cpu_torch_on_a_gpu_machine_fails(make_env: MakeEnv, programs: Programs) -> None:
    env = make_env(files=torch_version("2.11.0+cpu", None))
    programs(nvidia_smi=nvidia_smi())
    finding = env.check("gpu.driver")
    assert finding.verdict == "failed"
    assert "CPU build" in finding.summary


def test_an_env_without_torch_has_nothing_to_hold_the_driver_against(
    env: TinyEnv, programs: Programs
) -> None:
    programs(nvidia_smi=nvidia_smi())
    assert env.check("gpu.driver").verdict == "skipped"


# A torch without a GPU: what kernels.py meets then is what it meets with a broken one.
BROKEN_TORCH = """
class cuda:
    @staticmethod
    def set_device(device):
        raise RuntimeError("Found no NVIDIA driver on your system")
class Tensor: ...
def device(*name): return name
float32 = float16 = bfloat16 = None
"""


def test_an_env_without_known_kernels_skips_them(env: TinyEnv, programs: Programs) -> None:
    programs(nvidia_smi=nvidia_smi())
    assert env.check("gpu.kernels").verdict == "skipped"


def test_kernels_that_can_not_run_are_a_failure_with_the_last_words(
    make_env: MakeEnv, programs: Programs
) -> None:
    env = make_env(files={"torch/__init__.py": BROKEN_TORCH, "torch/nn.py": "functional = None\n"})
    kernel = InstalledPackage(
        name="causal-conv1d", version="1.7.0", wheel="x.whl", sha256="0" * 64, origin="wheelhouse"
    )
    env.change_receipt(packages=(*env.receipt.packages, kernel))
    programs(nvidia_smi=nvidia_smi())
    finding = env.check("gpu.kernels")
    assert finding.verdict == "failed"
    assert any("Found no NVIDIA driver" in line for line in finding.evidence)


def _run(kernel: str, problem: str | None) -> dict[str, Any]:
    """One result as kernels.py prints it."""
    return {
        "kernel": kernel,
        "case": "torch.float16, 2 by 1031",
        "quantity": "output",
        "error": 0.5 if problem else 1e-4,
        "tolerance": 1e-3,
        "problem": problem,
    }


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ([], "ok"),
        (["causal_conv1d_fn, short last block"], "warning"),
        (["causal_conv1d_fn"], "failed"),
        (["causal_conv1d_fn, short last block", "selective_scan_fn"], "failed"),
    ],
)
def test_only_a_defect_that_every_build_has_is_no_failure(wrong: list[str], verdict: str) -> None:
    results = [_run("causal_conv1d_fn", None), *(_run(kernel, "gradient of x is off") for kernel in wrong)]
    outcome = judge_kernels(results, "a GPU", "recipes/tiny.toml")
    assert outcome.verdict == verdict
    assert (outcome.remedy is None) == (verdict == "ok")
