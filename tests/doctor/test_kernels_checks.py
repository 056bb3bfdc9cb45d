from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor.checks.kernels import judge_fallbacks, judge_kernels
from envbuilder.doctor.subject import Subject
from envbuilder.model import InstalledPackage, ProvidedPackages
from envbuilder.paths import Root
from envbuilder.process import run
from tests.conftest import Quickstart
from tests.doctor.conftest import TinyEnv, run_one
from tests.doctor.fatbins import make_library
from tests.doctor.test_gpu_checks import SOUND, log, smi

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]
DOCTOR = Path(__file__).parents[2] / "envbuilder/doctor"

# A torch without a GPU: what kernels/ meets then is what it meets with a broken one.
BROKEN_TORCH = """
class cuda:
    @staticmethod
    def set_device(device):
        raise RuntimeError("Found no NVIDIA driver on your system")
class Tensor: ...
def device(*name): return name
float32 = float16 = bfloat16 = None
"""
KERNEL = InstalledPackage(
    name="causal-conv1d", version="1.7.0", wheel="x.whl", sha256="0" * 64, origin="wheelhouse"
)


def test_an_env_without_known_kernels_skips_them(env: TinyEnv, programs: Programs) -> None:
    programs(nvidia_smi=smi(log(SOUND)))
    assert env.check("gpu.kernels").verdict == "skipped"


def test_kernels_that_can_not_run_are_a_failure_with_the_last_words(
    make_env: MakeEnv, programs: Programs
) -> None:
    env = make_env(files={"torch/__init__.py": BROKEN_TORCH, "torch/nn.py": "functional = None\n"})
    env.change_receipt(packages=(*env.receipt.packages, KERNEL))
    programs(nvidia_smi=smi(log(SOUND)))
    finding = env.check("gpu.kernels")
    assert finding.verdict == "failed"
    assert any("Found no NVIDIA driver" in line for line in finding.evidence)


@pytest.mark.parametrize(
    ("visible", "why"), [("", "CUDA_VISIBLE_DEVICES is ''"), (None, "the driver has none")]
)
def test_kernels_that_no_gpu_is_visible_to_are_skipped_with_the_reason(
    make_env: MakeEnv,
    programs: Programs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    why: str,
) -> None:
    # nvidia-smi shows a GPU all the same: hidden GPUs are CUDA's matter alone.
    env = make_env(files={"torch/__init__.py": BROKEN_TORCH, "torch/nn.py": "functional = None\n"})
    env.change_receipt(packages=(*env.receipt.packages, KERNEL))
    make_library(tmp_path / "driver/libcuda.so.1", "int cuInit(unsigned flags) { return 100; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "driver"))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    programs(nvidia_smi=smi(log(SOUND)))
    finding = env.check("gpu.kernels")
    assert finding.verdict == "skipped"
    assert finding.summary == f"No GPU is visible to CUDA here, so the kernels can't run: {why}."


def _run(kernel: str, problem: str | None) -> dict[str, Any]:
    """One result as kernels/ prints it."""
    return {
        "kernel": kernel,
        "case": "torch.float16, 2 by 1031",
        "quantity": "output",
        "error": 0.5 if problem else 1e-4,
        "tolerance": 1e-3,
        "problem": problem,
    }


PACKAGES = ("causal-conv1d", "mamba-ssm")


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ([], "ok"),
        (["causal_conv1d_fn, short last block"], "ok"),
        (["causal_conv1d_fn"], "failed"),
        (["causal_conv1d_fn, short last block", "selective_scan_fn"], "failed"),
    ],
)
def test_only_a_defect_that_every_build_has_is_no_failure(wrong: list[str], verdict: str) -> None:
    results = [_run("causal_conv1d_fn", None), *(_run(kernel, "gradient of x is off") for kernel in wrong)]
    outcome = judge_kernels(results, "a GPU", "recipes/tiny.toml", PACKAGES)
    assert outcome.verdict == verdict
    assert (outcome.remedy is None) == (verdict == "ok")


def test_a_known_defect_is_told_with_versions_and_a_way_round_it() -> None:
    results = [_run("causal_conv1d_fn", None), _run("causal_conv1d_fn, short last block", "is off")]
    outcome = judge_kernels(results, "a GPU", "recipes/tiny.toml", PACKAGES)
    assert outcome.summary.startswith(
        "1 kernel runs on a GPU, forward and backward, agree with float64; 1 don't"
    )
    assert any(
        line.startswith("causal-conv1d 1.7.0: ") and "channel-last" in line for line in outcome.evidence
    )


def test_what_would_write_into_other_memory_is_not_run_and_said_to_be() -> None:
    outcome = judge_kernels([_run("selective_scan_fn", None)], "a GPU", "recipes/tiny.toml", PACKAGES)
    assert any(line.startswith("not run: mamba-ssm ") for line in outcome.evidence)
    without = judge_kernels([_run("causal_conv1d_fn", None)], "a GPU", "recipes/tiny.toml", PACKAGES[:1])
    assert not any("mamba-ssm" in line for line in without.evidence)


@pytest.mark.needs_env
def test_a_process_that_breaks_off_is_a_result_of_its_suite(tmp_path: Path, quickstart: Quickstart) -> None:
    # Without a GPU every suite breaks off: each with the reason, and none keeps the others from running.
    ended = run(
        [quickstart.python, "-P", DOCTOR / "kernels", "causal-conv1d", "--dtypes", "float16"],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPYCACHEPREFIX": str(tmp_path)},
        timeout_s=600,
    )
    report = json.loads(ended.output.splitlines()[-1])
    assert [result["kernel"] for result in report["results"]] == [
        "convolution_cases.training",
        "convolution_cases.continued",
    ]
    assert all("Found no NVIDIA driver" in result["problem"] for result in report["results"])
    assert judge_kernels(report["results"], "a GPU", "recipes/tiny.toml", PACKAGES).verdict == "failed"


def with_torch(make_env: MakeEnv, quickstart: Quickstart) -> TinyEnv:
    """An env that is provided with the quickstart env's packages."""
    there = quickstart.python.parent.parent / "lib/python3.11/site-packages"
    provided = ProvidedPackages(
        python=str(quickstart.python),
        site_packages=(str(there),),
        versions={"torch": "2.11.0", "causal-conv1d": "1.7.0"},
    )
    return make_env(provided=provided)


BROKEN_MAMBA = "from transformers.generation import GreedySearchDecoderOnlyOutput\n"


@pytest.mark.needs_env
def test_the_import_error_that_transformers_swallows_is_shown(
    make_env: MakeEnv, quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = with_torch(make_env, quickstart)
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm/__init__.py").write_text(BROKEN_MAMBA, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = env.check("gpu.fallbacks")
    assert finding.verdict == "failed", finding
    assert "falls back to slow code for nemotron_h, for mamba_ssm" in finding.summary
    assert any("cannot import name 'GreedySearchDecoderOnlyOutput'" in line for line in finding.evidence)


@pytest.mark.needs_env
def test_the_model_of_the_config_is_looked_at(make_env: MakeEnv, quickstart: Quickstart) -> None:
    env = with_torch(make_env, quickstart)
    config = Path(__file__).parents[2] / "recipes/train/quickstart.yaml"
    finding = run_one("gpu.fallbacks", root=env.root, recipe=env.recipe, lock=env.lock, config=config)
    assert finding.verdict == "ok", finding
    assert "mamba_ssm is not in the env" in finding.summary
    assert any(
        line.startswith("causal_conv1d_fn of causal_conv1d: causal_conv1d.") for line in finding.evidence
    )


def test_without_a_config_and_kernels_there_is_nothing_to_fall_back(env: TinyEnv) -> None:
    assert env.check("gpu.fallbacks").verdict == "skipped"


def test_an_env_whose_transformers_is_missing_fails(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env()
    config = tmp_path / "train.yaml"
    config.write_text("model: {}\n", encoding="utf-8")
    finding = run_one("gpu.fallbacks", root=env.root, recipe=env.recipe, lock=env.lock, config=config)
    assert finding.verdict == "failed"
    assert any("ModuleNotFoundError" in line for line in finding.evidence)


def test_a_transformers_that_does_not_know_the_model_has_chosen_nothing(make_env: MakeEnv) -> None:
    # As releases before Nemotron-H was native: there the model's own code is run.
    names = "def model_type_to_module_name(name):\n    return name\n"
    models = "transformers/models"
    files = {f"{folder}/__init__.py": "" for folder in ("transformers", models, f"{models}/auto")}
    env = make_env(files={**files, f"{models}/auto/configuration_auto.py": names})
    env.change_receipt(packages=(*env.receipt.packages, KERNEL))
    finding = env.check("gpu.fallbacks")
    assert finding.verdict == "skipped"
    assert "no code of its own for nemotron_h" in finding.summary


def test_a_model_without_its_package_is_a_warning_where_it_is_to_run_on_a_gpu(
    root: Root, programs: Programs
) -> None:
    programs()
    report = {
        "model_type": "nemotron_h",
        "device": "cuda",
        "problem": None,
        "is_native": True,
        "kernels": [
            {"name": "mamba_chunk_scan_combined", "package": "mamba_ssm", "used": "torch's slow path"}
        ],
        "installed": {"mamba_ssm": False},
        "errors": {"mamba_ssm": "ModuleNotFoundError: No module named 'mamba_ssm'"},
    }
    outcome = judge_fallbacks(report, Subject(None, root, None))
    assert outcome.verdict == "warning"
    assert "Add mamba-ssm to the requirements" in (outcome.remedy or "")
