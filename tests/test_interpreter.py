from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

import envbuilder.interpreter
from envbuilder.errors import MismatchError
from envbuilder.interpreter import check_interpreter, find_provided, inspect_interpreter
from envbuilder.lock import parse_lock
from envbuilder.lock_text import compose_lock
from envbuilder.model import BundleRecord
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.target import narrow_target
from tests.machines import machine_record, venv_with

MINOR = ".".join(platform.python_version_tuple()[:2])


def recipe_with(python: Path | str, *packages: str) -> Recipe:
    return Recipe.model_validate(
        {"name": "lab", "requirements": ["x"], "provided": {"python": str(python), "packages": packages}}
    )


def record(python: str = MINOR) -> BundleRecord:
    return BundleRecord(
        recipe="lab",
        python=python,
        lock_sha256="0",
        recipe_sha256="0",
        start_sha256="0",
        tool_version="0",
        tool_wheel="",
        tool_sha256="",
        tool_files=(),
        trainer_wheel=None,
        trainer_sha256=None,
    )


def test_an_interpreter_tells_what_it_is() -> None:
    found = inspect_interpreter(Path(sys.executable))
    assert (found.minor, found.version) == (MINOR, platform.python_version())
    assert found.machine == platform.machine()
    assert found.glibc == platform.libc_ver()[1]


def test_a_venvs_interpreter_stays_itself(tmp_path: Path) -> None:
    python = venv_with(tmp_path / "venv", "x", "1")
    found = inspect_interpreter(python)
    assert found.path == python
    assert found.purelib == tmp_path / "venv" / "lib" / f"python{MINOR}" / "site-packages"


@pytest.mark.parametrize("text", ["exit 3", "echo hello", "sleep 600"])
def test_a_program_that_is_no_python_is_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    if "sleep" in text:
        monkeypatch.setattr(envbuilder.interpreter, "_TIMEOUT_S", 0.5)
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    with pytest.raises(MismatchError, match="not a Python interpreter"):
        inspect_interpreter(program)


def test_a_machine_that_the_bundle_is_not_for_is_a_mismatch() -> None:
    here = inspect_interpreter(Path(sys.executable))
    target = TargetSpec.model_validate({"machine": here.machine})
    check_interpreter(here, target, record())
    with pytest.raises(MismatchError, match=r"for CPython 3\.9") as caught:
        check_interpreter(here, target, record("3.9"))
    assert f"--python {MINOR}" in caught.value.remedy
    other = "aarch64" if here.machine == "x86_64" else "x86_64"
    with pytest.raises(MismatchError, match=f"for {other}"):
        check_interpreter(here, TargetSpec.model_validate({"machine": other}), record())
    newest = target.model_copy(update={"glibc": "2.99"})
    with pytest.raises(MismatchError, match=r"glibc 2\.99 or newer"):
        check_interpreter(here, newest, record())


def test_provided_packages_are_found_with_their_folders(tmp_path: Path) -> None:
    python = venv_with(tmp_path / "provider", "Torch_Like", "2.11.0+cu130")
    found = find_provided(recipe_with(python, "torch-like==2.11.0"), None)
    assert found is not None
    assert found.versions == {"torch-like": "2.11.0+cu130"}
    assert found.python == str(python)
    assert found.site_packages == (str(tmp_path / "provider" / "lib" / f"python{MINOR}" / "site-packages"),)


def test_packages_that_a_module_brings_by_pythonpath_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv_with(tmp_path / "module", "torch_like", "2.11.0")
    folder = tmp_path / "module" / "lib" / f"python{MINOR}" / "site-packages"
    monkeypatch.setenv("PYTHONPATH", str(folder))
    found = find_provided(recipe_with(venv_with(tmp_path / "bare", "x", "1"), "torch-like"), None)
    assert found is not None
    assert str(folder) in found.site_packages


@pytest.mark.parametrize(
    ("version", "requirement", "admitted"),
    [
        ("2.11.0+cu130", "==2.11.0", True),
        ("2.11.0+cu130", "<=2.11.0", True),
        ("2.11.0+cu130", "==2.11.0+cu130", True),
        ("2.11.0a0+nv25.1", ">=2.10", True),
        ("2.11.0", "", True),
        ("2.10.0", "==2.11.0", False),
        ("2.11.0+cu128", "==2.11.0+cu130", False),
    ],
)
def test_a_local_version_is_not_compared_unless_it_is_asked_for(
    tmp_path: Path, version: str, requirement: str, admitted: bool
) -> None:
    recipe = recipe_with(venv_with(tmp_path / "venv", "torch", version), f"torch{requirement}")
    if admitted:
        found = find_provided(recipe, None)
        assert found is not None
        assert found.versions == {"torch": version}
    else:
        with pytest.raises(MismatchError, match=f"torch is {version.replace('+', '.')}, not"):
            find_provided(recipe, None)


@pytest.mark.parametrize(
    ("version", "stated", "refused_by"),
    [
        ("2.11.0+cu130", ">=2.10", None),
        ("2.12.0", ">=2.10", "lock"),
        ("2.9.0", ">=2.10", "recipe"),
        ("2.11.0+cu130", "==2.11.0+cu130", None),
        ("2.11.0+cu128", "==2.11.0+cu130", "recipe"),
    ],
)
def test_a_lock_for_one_probed_machine_admits_only_its_versions(
    tmp_path: Path, version: str, stated: str, refused_by: str | None
) -> None:
    recipe = recipe_with(venv_with(tmp_path / "venv", "torch", version), f"torch{stated}")
    narrowed = narrow_target(recipe, machine_record(provided={"torch": "2.11.0+cu130"}))
    lock = parse_lock("lab", compose_lock(narrowed, digest="0", resolver="none", entries=()))
    assert lock.provided == ("torch==2.11.0",)
    if refused_by is None:
        found = find_provided(recipe, lock)
        assert found is not None
        assert found.versions == {"torch": version}
    else:
        with pytest.raises(MismatchError, match=f"what the {refused_by} lab takes") as caught:
            find_provided(recipe, lock)
        again = "envbuilder probe --recipe recipes/lab.toml --output target.json"
        assert (again in caught.value.remedy) is (refused_by == "lock")


def test_every_missing_package_is_named(tmp_path: Path) -> None:
    python = venv_with(tmp_path / "venv", "x", "1")
    with pytest.raises(MismatchError, match="torch is missing; triton is missing"):
        find_provided(recipe_with("unused", "torch", "triton"), None, python)


def test_a_provider_that_is_not_there_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="There is no interpreter no-such-python"):
        find_provided(recipe_with("no-such-python", "torch"), None)


def test_a_recipe_that_takes_nothing_from_the_machine_has_no_provider() -> None:
    recipe = Recipe.model_validate({"name": "lab", "requirements": ["x"]})
    assert find_provided(recipe, None) is None
