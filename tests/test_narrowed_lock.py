"""After lock time the lock's target counts, not the recipe's: it may be one probed machine."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.errors import MismatchError
from envbuilder.install import install_env
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.lock_text import compose_lock
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.target import narrow_target
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_wheel
from tests.machines import machine_record, venv_with

MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
HERE = platform.machine()
OTHER = "aarch64" if HERE == "x86_64" else "x86_64"
RECIPE = Recipe.model_validate(
    {"name": "tiny", "requirements": ["tiny"], "target": {"machine": HERE, "glibc": "2.17"}}
)
PROBED = narrow_target(RECIPE, machine_record(python=f"{MINOR}.0", machine=OTHER, glibc="2.99"))


def lock(recipe: Recipe) -> SourceLock:
    return parse_lock("tiny", compose_lock(recipe, digest="0" * 64, resolver="none", entries=()))


def finding(check: str, tmp_path: Path, recipe: Recipe) -> Finding:
    (found,) = run_checks(Subject(RECIPE, Root(tmp_path), lock(recipe)), Quiet(), choose_checks([check]))
    return found


@pytest.mark.parametrize(("check", "wanted"), [("platform.machine", OTHER), ("platform.glibc", "2.99")])
def test_doctor_holds_the_machine_against_the_lock(tmp_path: Path, check: str, wanted: str) -> None:
    assert finding(check, tmp_path, RECIPE).verdict == "ok"
    found = finding(check, tmp_path, PROBED)
    assert (found.verdict, wanted in found.summary) == ("failed", True)
    assert "envbuilder lock recipes/tiny.toml --target target.json" in (found.remedy or "")


def test_install_refuses_a_lock_of_another_machine(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "tiny", "1.0")
    bundle = make_bundle(Root(tmp_path / "root"), PROBED, {wheel: ["runtime"]}, python=MINOR)
    with pytest.raises(MismatchError, match=f"The lock tiny is for {OTHER}") as caught:
        install_env(
            RECIPE, bundle, root=Root(tmp_path / "root"), python=Path(sys.executable), reporter=Quiet()
        )
    assert "envbuilder probe --recipe recipes/tiny.toml --output target.json" in caught.value.remedy


def test_install_and_doctor_hold_what_the_machine_provides_against_the_lock(tmp_path: Path) -> None:
    python = venv_with(tmp_path / "provider", "torch", "2.12.0")
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "requirements": ["tiny"],
            "target": {"machine": HERE, "glibc": "2.17"},
            "cuda": {"toolchain": "system"},
            "provided": {"python": str(python), "packages": ["torch>=2.11"]},
        }
    )
    here = machine_record(
        python=platform.python_version(), machine=HERE, glibc="2.17", provided={"torch": "2.11.0"}
    )
    narrowed = narrow_target(recipe, here)
    root = Root(tmp_path / "root")
    bundle = make_bundle(root, narrowed, {make_wheel(tmp_path, "tiny", "1.0"): ["runtime"]}, python=MINOR)
    with pytest.raises(MismatchError, match=r"what the lock tiny takes .* torch is 2\.12\.0, not ==2\.11\.0"):
        install_env(recipe, bundle, root=root, python=python, reporter=Quiet())
    (found,) = run_checks(Subject(recipe, root, bundle.lock), Quiet(), choose_checks(["toolchain.cuda"]))
    assert (found.verdict, "not ==2.11.0" in found.summary) == ("failed", True)
