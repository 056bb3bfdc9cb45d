from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor.checks.rates import KNOWN_RATES, judge_rates, known_rates
from envbuilder.process import run
from tests.conftest import Quickstart
from tests.doctor.conftest import TinyEnv, torch_version
from tests.doctor.test_gpu_checks import SOUND, log, smi

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]
RATES = Path(__file__).parents[2] / "envbuilder/doctor/rates.py"


def gpu(index: int = 0, **fields: Any) -> dict[str, Any]:
    """One GPU as rates.py prints it: a sound H200."""
    sound = {
        "name": "NVIDIA H200",
        "dtype": "bfloat16",
        "tflops": 740.0,
        "copy_gbs": 4100.0,
        "host_gbs": 55.0,
    }
    return {"index": index, "wrong": False, **sound, **fields}


def peer(**fields: Any) -> dict[str, Any]:
    return {"source": 0, "target": 1, "access": True, "gbs": 380.0, "wrong": False, **fields}


@pytest.mark.parametrize(
    ("gpus", "peers", "busy", "verdict", "words"),
    [
        ([gpu(), gpu(1)], [peer()], [], "ok", "2 GPUs multiply and copy as fast as they should"),
        ([gpu(name="Some GPU", tflops=1.0, copy_gbs=9.0)], [], [], "ok", "1 GPUs"),
        ([gpu(tflops=350.0)], [], [], "warning", "slower than it should be"),
        ([gpu(copy_gbs=2000.0)], [], [], "warning", "slower than it should be"),
        ([gpu(tflops=90.0)], [], [], "failed", "a fraction of its speed"),
        ([gpu(tflops=90.0)], [], ["4711"], "warning", "slower than it should be"),
        ([gpu(), gpu(1, tflops=560.0)], [], [], "warning", "slower than it should be"),
        ([gpu(host_gbs=1.5)], [], [], "warning", "slower than it should be"),
        ([gpu(wrong=True)], [], [], "failed", "multiplies wrongly"),
        ([gpu(), gpu(1)], [peer(wrong=True)], [], "failed", "arrives changed"),
    ],
)
def test_what_was_measured_is_held_against_what_is_known(
    gpus: list[dict[str, Any]], peers: list[dict[str, Any]], busy: list[str], verdict: str, words: str
) -> None:
    outcome = judge_rates(gpus, peers, busy)
    assert outcome.verdict == verdict
    assert words in outcome.summary
    assert (outcome.remedy is None) == (verdict == "ok")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA A100-SXM-64GB", True),
        ("Tesla V100-SXM2-16GB", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name: str, known: bool) -> None:
    assert (known_rates(name) is not None) == known
    assert all(tflops > 50 and gbs > 200 for tflops, gbs in KNOWN_RATES.values())


@pytest.mark.needs_env
def test_the_script_measures_and_finds_no_wrong_product(quickstart: Quickstart) -> None:
    small = ("--device", "cpu", "--size", "96", "--copy-bytes", "65536", "--seconds", "0.01")
    ended = run([quickstart.python, "-P", RATES, *small], timeout_s=600)
    (measured,) = json.loads(ended.output.splitlines()[-1])["gpus"]
    assert not measured["wrong"]
    assert min(measured["tflops"], measured["copy_gbs"], measured["host_gbs"]) > 0


DAMAGED = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("measured", sys.argv[1])
rates = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rates)
torch.manual_seed(0)
left, right = (torch.randint(-1, 2, (512, 512)).bfloat16() for _ in range(2))
product = left @ right
whole = rates._is_wrong(product, left, right)
product[64:128, 128:192] = 0
print(json.dumps([whole, rates._is_wrong(product, left, right)]))
"""


@pytest.mark.needs_env
def test_a_product_that_lacks_a_block_is_wrong(quickstart: Quickstart) -> None:
    ended = run([quickstart.python, "-c", DAMAGED, RATES], timeout_s=600)
    assert json.loads(ended.output.splitlines()[-1]) == [False, True]


def test_a_gpu_that_can_not_be_measured_is_a_failure_with_the_last_words(
    make_env: MakeEnv, programs: Programs
) -> None:
    broken = "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    env = make_env(files={**torch_version(), "torch/__init__.py": broken})
    programs(nvidia_smi=smi(log(SOUND)))
    finding = env.check("gpu.rates")
    assert finding.verdict == "failed"
    assert any("libcudart.so.13" in line for line in finding.evidence)
    assert "--only env --only libraries" in (finding.remedy or "")


@pytest.mark.parametrize(
    ("visible", "error", "remedy"),
    [
        ("", "No CUDA GPUs are available", "unset CUDA_VISIBLE_DEVICES"),
        ("7", "No CUDA GPUs are available", "unset CUDA_VISIBLE_DEVICES"),
        ("0", "Torch not compiled with CUDA enabled", "Name the index of torch's CUDA builds"),
        (None, "CUDA unknown error", "--only gpu --only libraries"),
    ],
)
def test_gpus_that_cuda_does_not_see_are_no_fault_of_the_node(
    make_env: MakeEnv,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    error: str,
    remedy: str,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    torch = (
        f"class Tensor: ...\nclass cuda:\n    @staticmethod\n    def init(): raise RuntimeError({error!r})\n"
    )
    env = make_env(files={**torch_version(), "torch/__init__.py": torch + "device = None\n"})
    programs(nvidia_smi=smi(log(SOUND)))
    finding = env.check("gpu.rates")
    assert (finding.verdict, finding.summary) == ("failed", "CUDA sees no GPU, so none can be measured.")
    assert f"CUDA_VISIBLE_DEVICES={'(not set)' if visible is None else visible}" in finding.evidence
    assert error in finding.evidence
    assert remedy in (finding.remedy or "")
    assert "administrators" not in (finding.remedy or "")


@pytest.mark.needs_env
def test_the_script_says_why_cuda_has_no_gpu(quickstart: Quickstart) -> None:
    hidden = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    ended = run([quickstart.python, "-P", RATES], env=hidden, timeout_s=600)
    assert ended.returncode == 0
    report = json.loads(ended.output.splitlines()[-1])
    assert report["gpus"] == []
    assert "NVIDIA" in report["problem"] or "CUDA" in report["problem"]


def test_an_env_without_torch_measures_nothing(env: TinyEnv, programs: Programs) -> None:
    programs(nvidia_smi=smi(log(SOUND)))
    assert env.check("gpu.rates").verdict == "skipped"
