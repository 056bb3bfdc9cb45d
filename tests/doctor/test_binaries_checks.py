from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.architectures import runs_on, wanted_code
from envbuilder.model import Extension
from tests.doctor.conftest import TinyEnv, cuda_recipe, nvidia_smi
from tests.doctor.fatbins import make_extension

CHECK = "binaries.architectures"
EXTENSION = Extension(module="ext", file="ext.so", sha256="0" * 64, architectures=("sm_90",))


@pytest.fixture
def compiled(make_env: Callable[..., TinyEnv], tmp_path: Path) -> Callable[..., TinyEnv]:
    """Makes an env whose extension module has code for these architectures."""

    def make(*architectures: str, recipe: str = "9.0", detect: bool = False, receipt: str = "9.0") -> TinyEnv:
        return make_env(
            recipe=cuda_recipe("ext", capability=recipe, detect=detect),
            files={"ext.so": make_extension(tmp_path / "ext.so", *architectures)},
            extensions=(EXTENSION,),
            compute_capabilities=(receipt,),
        )

    return make


@pytest.mark.parametrize("architectures", [("sm_90",), ("compute_90",), ("sm_80", "sm_90")])
def test_an_extension_with_code_for_the_recipes_gpus_passes(
    compiled: Callable[..., TinyEnv], architectures: tuple[str, ...]
) -> None:
    finding = compiled(*architectures).check(CHECK)
    assert finding.verdict == "ok"
    assert finding.evidence == (f"ext: {', '.join(sorted(architectures))}",)


@pytest.mark.parametrize("architectures", [("sm_80",), ()])
def test_an_extension_without_that_code_fails(
    compiled: Callable[..., TinyEnv], architectures: tuple[str, ...]
) -> None:
    finding = compiled(*architectures).check(CHECK)
    assert finding.verdict == "failed"
    assert "ext has no code for compute capability 9.0" in finding.evidence


def test_a_recipe_that_asks_for_more_than_was_compiled_fails(compiled: Callable[..., TinyEnv]) -> None:
    finding = compiled("sm_90", recipe="10.0").check(CHECK)
    assert finding.verdict == "failed"
    assert "10.0" in finding.evidence[0]


def test_where_the_recipe_goes_by_the_gpu_present_the_receipt_counts(
    compiled: Callable[..., TinyEnv],
) -> None:
    assert compiled("sm_80", recipe="9.0", detect=True, receipt="8.0").check(CHECK).verdict == "ok"


def test_an_extension_that_is_gone_fails(compiled: Callable[..., TinyEnv]) -> None:
    env = compiled("sm_90")
    (env.site_packages / "ext.so").unlink()
    assert env.check(CHECK).evidence == ("ext: ext.so is missing",)


def test_an_extension_that_is_no_binary_fails(compiled: Callable[..., TinyEnv]) -> None:
    env = compiled("sm_90")
    (env.site_packages / "ext.so").write_bytes(b"not ELF")
    assert env.check(CHECK).verdict == "failed"


def test_the_gpu_present_must_find_code_that_it_runs(
    compiled: Callable[..., TinyEnv], programs: Callable[..., Path]
) -> None:
    env = compiled("sm_90")
    programs(nvidia_smi=nvidia_smi("NVIDIA H200, 9.0"))
    assert env.check(CHECK).verdict == "ok"
    programs(nvidia_smi=nvidia_smi("NVIDIA A100, 8.0"))
    finding = env.check(CHECK)
    assert finding.verdict == "failed"
    assert "A100" in finding.evidence[0]


def test_an_env_without_compiled_extensions_is_skipped(env: TinyEnv) -> None:
    assert env.check(CHECK).verdict == "skipped"


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.9", True),  # machine code: later minor versions
        ("sm_89", "8.0", False),
        ("sm_80", "9.0", False),
        ("compute_80", "9.0", True),  # PTX: every later GPU
        ("compute_80", "12.0", True),
        ("compute_90", "8.9", False),
        ("sm_90a", "9.0", True),
        ("compute_90a", "10.0", False),
        ("sm_100f", "10.3", True),
        ("compute_100f", "11.0", False),
        ("sm_120", "12.1", True),
    ],
)
def test_code_runs_where_nvidia_says_it_does(architecture: str, capability: str, runs: bool) -> None:
    assert runs_on(architecture, capability) is runs


def test_a_capability_is_met_by_its_machine_code_or_its_ptx() -> None:
    assert wanted_code("10.0a") == {"sm_100a", "compute_100a"}
