from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.model import BuildReceipt, InstalledPackage
from envbuilder.paths import Root
from envbuilder.wheelhouse import store_built
from tests.doctor.conftest import TinyEnv, cuda_recipe, run_one, torch_version
from tests.lab.packages import make_wheel

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]

COMPILER = 'case "$1" in --version) echo "g++ 12.2.0";; *) echo "ld: cannot find crt1.o"; exit 1;; esac'
NVCC = """case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131";;
--list-gpu-code) echo sm_90;;
*) echo "#$ _HERE_=/opt/cuda/bin";;
esac"""


def test_a_compiler_that_compiles_and_links_passes(root: Root) -> None:
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "ok"
    assert finding.evidence


def test_a_machine_without_a_compiler_fails(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    programs()
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "failed"
    assert "no C++ compiler" in finding.summary


def test_a_compiler_that_can_not_link_fails_with_its_words(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    programs(**{"g++": COMPILER})
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "failed"
    assert "ld: cannot find crt1.o" in finding.evidence


@pytest.fixture
def compiled(make_env: MakeEnv, tmp_path: Path) -> MakeEnv:
    """Makes an env with torch 2.11.0+cu130 and a wheel that the wheelhouse says was compiled like this."""

    def make(*, nvcc: str = "13.0.88", torch: str = "2.11.0+cu130") -> TinyEnv:
        env = make_env(recipe=cuda_recipe("ext"), files=torch_version())
        wheel = make_wheel(tmp_path, "ext", "1.0")
        receipt = BuildReceipt(
            package="ext",
            version="1.0",
            sdist="ext-1.0.tar.gz",
            sdist_sha256="0" * 64,
            key="key",
            wheel=wheel.name,
            wheel_sha256="e" * 64,
            python="3.11.7",
            torch=torch,
            torch_cuda="13.0",
            cxx11_abi=True,
            nvcc=nvcc,
            host_compiler="g++ 12",
            compute_capabilities=("9.0",),
            architectures_kept=("sm_90",),
            architectures_dropped=(),
            extensions=(),
            isolation="none",
            environment={},
            units=(),
            seconds=1.0,
            built_at="2026-01-01T00:00:00+00:00",
        )
        store_built(env.root, wheel, receipt)
        built = InstalledPackage(
            name="ext", version="1.0", wheel=wheel.name, sha256="e" * 64, origin="wheelhouse"
        )
        env.change_receipt(packages=(*env.receipt.packages, built))
        return env

    return make


def test_an_extension_of_torchs_own_cuda_passes(compiled: MakeEnv) -> None:
    finding = compiled().check("toolchain.cuda")
    assert finding.verdict == "ok"
    assert "ext: compiled by nvcc 13.0.88 for torch 2.11.0+cu130" in finding.evidence


def test_an_extension_of_another_cuda_fails(compiled: MakeEnv) -> None:
    finding = compiled(nvcc="12.4.131").check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert "nvcc 12.4.131" in finding.summary


def test_an_extension_for_another_torch_fails(compiled: MakeEnv) -> None:
    finding = compiled(torch="2.10.0+cu130").check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert "torch 2.10.0+cu130" in finding.summary


@pytest.mark.parametrize("there", [{}, {"nvcc": NVCC}])
def test_the_machines_own_nvcc_is_looked_at_where_the_recipe_uses_it(
    make_env: MakeEnv, programs: Programs, monkeypatch: pytest.MonkeyPatch, there: dict[str, str]
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    env = make_env(recipe=cuda_recipe("ext", toolchain="system"), files=torch_version())
    programs(**there)
    finding = env.check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert ("12.4.131" in finding.summary) is bool(there)


def test_a_recipe_without_gpu_code_needs_no_nvcc(env: TinyEnv) -> None:
    assert env.check("toolchain.cuda").verdict == "skipped"
