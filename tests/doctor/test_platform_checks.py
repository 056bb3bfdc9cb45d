from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.sandbox import find_sandbox
from tests.doctor.conftest import TinyEnv, run_one

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def recipe(**target: str) -> Recipe:
    return Recipe.model_validate({"name": "tiny", "requirements": ["tiny"], "target": target})


@pytest.mark.parametrize("check", ["platform.interpreter", "platform.glibc", "platform.machine"])
def test_the_machine_that_a_recipe_is_for_passes(root: Root, check: str) -> None:
    fitting = recipe(python=f"=={HERE}.*", machine=platform.machine(), glibc="2.17")
    assert run_one(check, root=root, recipe=fitting).verdict == "ok"


def test_an_interpreter_that_the_recipe_does_not_serve_fails(root: Root) -> None:
    other = "3.11" if HERE != "3.11" else "3.13"
    finding = run_one("platform.interpreter", root=root, recipe=recipe(python=f"=={other}.*"))
    assert finding.verdict == "failed"
    assert f"({other})" in finding.summary


def test_an_env_whose_interpreter_was_replaced_is_a_warning(env: TinyEnv) -> None:
    assert env.check("platform.interpreter").verdict == "ok"
    env.change_receipt(python=f"{HERE}.99")
    finding = env.check("platform.interpreter")
    assert finding.verdict == "warning"
    assert f"{HERE}.99" in finding.summary


def test_an_env_whose_interpreter_is_gone_fails(env: TinyEnv) -> None:
    python = env.folder / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    finding = env.check("platform.interpreter")
    assert finding.verdict == "failed"
    assert "/envs/tiny/bin/python" in finding.summary


def test_an_older_glibc_than_the_recipes_fails(root: Root) -> None:
    finding = run_one("platform.glibc", root=root, recipe=recipe(glibc="2.999"))
    assert finding.verdict == "failed"
    assert "2.999" in finding.summary


def test_another_processor_than_the_recipes_fails(root: Root) -> None:
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    finding = run_one("platform.machine", root=root, recipe=recipe(machine=other))
    assert finding.verdict == "failed"
    assert other in finding.summary


@pytest.fixture
def no_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives no namespace for mounts; what it gives otherwise, unshare says."""
    weaker = functools.partial(find_sandbox, strongest="network-namespace")
    monkeypatch.setattr("envbuilder.doctor.checks.platform.find_sandbox", weaker)


@pytest.mark.usefixtures("no_mounts")
def test_refused_namespaces_are_a_warning(root: Root, programs: Callable[..., Path]) -> None:
    programs(unshare='echo "unshare: unshare failed: Operation not permitted" >&2; exit 1')
    finding = run_one("platform.namespaces", root=root)
    assert finding.verdict == "warning"
    assert finding.remedy is not None
    assert "--require-isolation" in finding.remedy


@pytest.mark.usefixtures("no_mounts")
def test_a_machine_without_unshare_is_a_warning(root: Root, programs: Callable[..., Path]) -> None:
    programs()
    assert run_one("platform.namespaces", root=root).verdict == "warning"


@pytest.mark.usefixtures("no_mounts")
def test_namespaces_that_can_be_made_pass(root: Root, programs: Callable[..., Path]) -> None:
    programs(unshare="exit 0")
    finding = run_one("platform.namespaces", root=root)
    assert finding.verdict == "ok"
    assert "read what you can read" in finding.summary


def test_the_sandbox_that_compile_finds_is_the_one_told(root: Root) -> None:
    finding = run_one("platform.namespaces", root=root)
    told = {"sealed": "sealed here", "network-namespace": "without network", "none": "not kept from"}
    assert told[find_sandbox().isolation] in finding.summary
