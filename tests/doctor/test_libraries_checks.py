"""Envs with a torch of real, small shared objects, and second copies of what it needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.loading import loaded_with_torch
from envbuilder.model import Extension, ProvidedPackages
from tests.conftest import Quickstart
from tests.doctor.conftest import TinyEnv
from tests.doctor.fatbins import make_library

NCCL, CUDART = "libnccl.so.2", "libcudart.so.13"
CHECK_OF = {NCCL: "libraries.nccl", CUDART: "libraries.cuda"}
OWN_FOLDER = {NCCL: "nvidia/nccl/lib", CUDART: "nvidia/cu13/lib"}
RPATH, RUNPATH = "--disable-new-dtags", "--enable-new-dtags"
EXTENSION = Extension(module="ext", file="ext.so", sha256="0" * 64, architectures=())


def nccl_source(version: str) -> str:
    return f'const char *version = "NCCL version {version}+cuda13.0";'


def put_torch(folder: Path, tags: str = RPATH) -> None:
    """A torch in `folder` that finds cudart and NCCL beside itself, by its RPATH or by its RUNPATH."""
    cudart = make_library(folder / OWN_FOLDER[CUDART] / CUDART, "int cudart(void) { return 13; }")
    nccl = make_library(folder / OWN_FOLDER[NCCL] / NCCL, nccl_source("2.28.9"))
    search = ":".join(f"$ORIGIN/../../{own}" for own in OWN_FOLDER.values())
    option = f"-Wl,{tags},-rpath,{search}"
    make_library(folder / "torch/lib/libtorch_global_deps.so", "", cudart, option)
    make_library(folder / "torch/_C.cpython-311.so", "", nccl, option.replace("../../", "../"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with another build of both, as a module for MPI or CUDA has it."""
    make_library(tmp_path / "module" / CUDART, "int cudart(void) { return 12; } int more(void) { return 0; }")
    make_library(tmp_path / "module" / NCCL, nccl_source("2.19.3"))
    return tmp_path / "module"


@pytest.mark.parametrize("name", CHECK_OF)
def test_torchs_own_copy_is_right_though_another_one_is_on_the_path(
    env: TinyEnv, other: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put_torch(env.site_packages, RPATH)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{other}")
    finding = env.check(CHECK_OF[name])
    assert finding.verdict == "ok"
    assert str(env.site_packages / OWN_FOLDER[name] / name) in finding.evidence[0]
    assert any(line.startswith(f"there too, and not loaded: {other / name}") for line in finding.evidence)


@pytest.mark.parametrize("name", CHECK_OF)
def test_another_build_that_ld_library_path_puts_before_torchs_own_is_found(
    env: TinyEnv, other: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    put_torch(env.site_packages, RUNPATH)
    assert env.check(CHECK_OF[name]).verdict == "ok"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other))
    finding = env.check(CHECK_OF[name])
    assert finding.verdict == "failed"
    assert finding.summary.startswith(f"{name}: another build")
    assert str(other / name) in finding.evidence[0]
    assert finding.remedy is not None
    assert str(other) in finding.remedy


def test_the_versions_of_both_ncc_libraries_are_told(
    env: TinyEnv, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_torch(env.site_packages)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other))
    finding = env.check("libraries.nccl")
    assert "NCCL 2.28.9+cuda13.0" in finding.evidence[0]
    assert "NCCL 2.19.3+cuda13.0" in finding.evidence[1]


def test_a_preloaded_nccl_is_found(env: TinyEnv, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_torch(env.site_packages)
    assert env.check("libraries.nccl").verdict == "ok"
    monkeypatch.setenv("LD_PRELOAD", str(other / NCCL))
    finding = env.check("libraries.nccl")
    assert (finding.verdict, finding.remedy) == ("failed", "unset LD_PRELOAD")


def test_a_second_copy_with_the_same_bytes_does_no_harm(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_torch(env.site_packages, RUNPATH)
    (tmp_path / NCCL).write_bytes((env.site_packages / OWN_FOLDER[NCCL] / NCCL).read_bytes())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert env.check("libraries.nccl").verdict == "ok"


def test_an_extension_of_another_cuda_that_brings_a_second_runtime_is_found(
    make_env: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    env = make_env(extensions=(EXTENSION,))
    put_torch(env.site_packages)
    older = make_library(tmp_path / "cuda12/libcudart.so.12", "int cudart(void) { return 12; }")
    make_library(env.site_packages / "ext.so", "", older, f"-Wl,-rpath,{older.parent}")
    finding = env.check("libraries.cuda")
    assert finding.verdict == "failed"
    assert finding.summary.startswith("libcudart.so.12: a second copy")
    assert finding.remedy is not None
    assert "--rebuild" in finding.remedy


def test_a_torch_of_another_prefix_is_looked_at_where_it_is(
    make_env: Callable[..., TinyEnv], tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = tmp_path / "provider"
    put_torch(provider, RUNPATH)
    provided = ProvidedPackages(python=sys.executable, site_packages=(str(provider),), versions={})
    env = make_env(provided=provided)
    finding = env.check("libraries.nccl")
    assert finding.verdict == "ok"
    assert str(provider / OWN_FOLDER[NCCL]) in finding.evidence[0]
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other))
    assert env.check("libraries.nccl").verdict == "failed"


def test_an_env_without_torch_or_with_one_for_cpus_is_skipped(env: TinyEnv) -> None:
    assert env.check("libraries.cuda").verdict == "skipped"
    make_library(env.site_packages / "torch/lib/libtorch_global_deps.so", "")
    for name in ("libraries.cuda", "libraries.nccl"):
        assert env.check(name).verdict == "skipped"


def make_libstdcxx(folder: Path, *versions: str) -> Path:
    """A C++ library of these GLIBCXX versions; each has the function f_VERSION."""
    functions = {version: f"f_{version.replace('.', '_')}" for version in versions}
    script = folder / "map"
    folder.mkdir(exist_ok=True)
    text = "".join(f"GLIBCXX_{version} {{ {name}; }};\n" for version, name in functions.items())
    script.write_text(text, encoding="utf-8")
    source = "".join(f"int {name}(void) {{ return 0; }}\n" for name in functions.values())
    options = (f"-Wl,--version-script={script}", "-nostdlib")
    return make_library(folder / "libstdc++.so.6", source, *options)


STRINGS = "#include <string>\nstd::string f(int x) { return std::to_string(x) + 'x'; }\n"


def test_the_machines_own_cxx_library_suits_what_is_compiled_here(make_env: Callable[..., TinyEnv]) -> None:
    env = make_env(extensions=(EXTENSION,))
    make_library(env.site_packages / "ext.so", STRINGS, compiler="g++")
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "ok"
    assert "up to GLIBCXX_3.4." in finding.evidence[0]


def test_an_older_cxx_library_before_it_is_too_old_for_an_extension(
    make_env: Callable[..., TinyEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(extensions=(EXTENSION,))
    make_library(env.site_packages / "ext.so", STRINGS, compiler="g++")
    old = make_libstdcxx(tmp_path / "old", "3.4", "3.4.9")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(old.parent))
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "failed"
    assert any(line.startswith(f"{env.site_packages / 'ext.so'} needs GLIBCXX_") for line in finding.evidence)
    assert finding.remedy is not None
    assert str(old.parent) in finding.remedy


def test_an_older_cxx_library_that_still_suffices_is_warned_of(
    make_env: Callable[..., TinyEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(extensions=(EXTENSION,))
    old = make_libstdcxx(tmp_path / "old", "3.4")
    source = "int f_3_4(void); int call(void) { return f_3_4(); }"
    make_library(env.site_packages / "ext.so", source, old, "-nostdlib")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(old.parent))
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "warning"
    assert any("not loaded" in line for line in finding.evidence)


def test_an_extension_that_needs_a_newer_cxx_library_than_there_is_fails_with_what_to_load(
    make_env: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    env = make_env(extensions=(EXTENSION,))
    new = make_libstdcxx(tmp_path / "new", "3.4.99")
    source = "int f_3_4_99(void); int call(void) { return f_3_4_99(); }"
    make_library(env.site_packages / "ext.so", source, new, "-nostdlib")
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "failed"
    assert finding.evidence[-1].endswith("needs GLIBCXX_3.4.99")
    assert finding.remedy is not None
    assert "module avail gcc" in finding.remedy


def test_where_nothing_needs_the_cxx_library_the_check_is_skipped(env: TinyEnv) -> None:
    assert env.check("libraries.libstdcxx").verdict == "skipped"


@pytest.mark.needs_env
def test_what_is_said_of_a_real_torch_is_what_its_import_loads(quickstart: Quickstart) -> None:
    code = "import torch\nprint(*(line.split()[-1] for line in open('/proc/self/maps') if '.so' in line))"
    done = subprocess.run([quickstart.python, "-c", code], capture_output=True, text=True, check=True)
    really = set(done.stdout.split())
    site_packages = next((quickstart.root / "envs/quickstart/lib").glob("python*/site-packages"))
    said = {
        str(library.path.resolve())
        for library in loaded_with_torch(quickstart.python, [site_packages], [], {})
    }
    shared = {path for path in said if ".so" in path}
    assert shared <= really
    names = ("libcudart", "libnccl", "libcudnn", "libstdc++", "libtorch_cuda")
    assert all(any(name in path for path in shared) for name in names)
