"""Envs that were compiled with modules, in shells that have loaded them or others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.model import LoadedModule
from tests.doctor.conftest import TinyEnv
from tests.doctor.fatbins import make_library
from tests.doctor.test_gpu_checks import SOUND, log, smi
from tests.doctor.test_libraries_checks import EXTENSION, make_libstdcxx


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOADEDMODULES", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)


def compiled_with(env: TinyEnv, folder: Path | str, name: str = "gcc/13.2.0") -> LoadedModule:
    module = LoadedModule(name=name, folders={"LD_LIBRARY_PATH": (str(folder),)})
    env.change_receipt(modules=(module,))
    return module


def test_an_env_that_was_compiled_without_modules_is_skipped(env: TinyEnv) -> None:
    assert env.check("env.modules").verdict == "skipped"


@pytest.mark.parametrize(
    ("loaded", "verdict", "words"),
    [
        ("", "ok", "What the modules of the env's builds had added is here"),
        ("gcc/13.2.0:openmpi/4.1", "ok", "is here"),
        (
            "openmpi/4.1:gcc/14.1.0",
            "warning",
            "gcc/14.1.0 is loaded here, and the env was compiled with gcc/13",
        ),
        ("gcc-runtime/14.1.0", "ok", "is here"),
    ],
)
def test_another_version_that_is_loaded_is_warned_of(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: str, verdict: str, words: str
) -> None:
    compiled_with(env, tmp_path)
    monkeypatch.setenv("LOADEDMODULES", loaded)
    finding = env.check("env.modules")
    assert (finding.verdict, words in finding.summary) == (verdict, True), finding
    assert any(line.startswith("gcc/13.2.0: LD_LIBRARY_PATH: ") for line in finding.evidence)


def test_a_folder_that_is_gone_fails_on_a_gpu_node_and_is_warned_of_elsewhere(
    env: TinyEnv, tmp_path: Path, programs: Callable[..., Path]
) -> None:
    compiled_with(env, tmp_path / "gone")
    programs()
    finding = env.check("env.modules")
    assert finding.verdict == "warning"
    assert "the module gcc/13.2.0, whose folder" in finding.summary
    assert "module load gcc/13.2.0" in (finding.remedy or "")
    programs(nvidia_smi=smi(log(SOUND)))
    assert env.check("env.modules").verdict == "failed"


NEWER = "int f_3_4_99(void); int call(void) { return f_3_4_99(); }"


def newer_extension(env: TinyEnv, folder: Path) -> None:
    """An extension module that needs a C++ library as new as the one put into `folder`."""
    new = make_libstdcxx(folder, "3.4", "3.4.99")
    make_library(env.site_packages / "ext.so", NEWER, new, "-nostdlib")


def test_an_extension_finds_the_cxx_library_of_the_compiler_s_module(
    make_env: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    env = make_env(extensions=(EXTENSION,))
    newer_extension(env, tmp_path / "gcc")
    assert env.check("libraries.libstdcxx").verdict == "failed"
    compiled_with(env, tmp_path / "gcc")
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "ok", finding
    assert finding.evidence[0].endswith("of the module gcc/13.2.0, which the env was compiled with")


def test_it_comes_before_an_older_one_of_the_shell(
    make_env: Callable[..., TinyEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(extensions=(EXTENSION,))
    newer_extension(env, tmp_path / "gcc")
    old = make_libstdcxx(tmp_path / "old", "3.4")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(old.parent))
    assert env.check("libraries.libstdcxx").verdict == "failed"
    compiled_with(env, tmp_path / "gcc")
    assert env.check("libraries.libstdcxx").verdict == "ok"


def test_an_extension_whose_module_is_gone_is_told_which_to_load(
    make_env: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    env = make_env(extensions=(EXTENSION,))
    newer_extension(env, tmp_path / "gcc")
    compiled_with(env, tmp_path / "moved")
    finding = env.check("libraries.libstdcxx")
    assert finding.verdict == "failed"
    assert finding.evidence[-1].endswith("needs GLIBCXX_3.4.99")
    assert "module load gcc/13.2.0" in (finding.remedy or "")
