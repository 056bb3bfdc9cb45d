from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from tests.doctor.conftest import TinyEnv, make_lock, run_one

CHECK = "storage.free-space"


def test_what_lies_on_one_disk_is_added_up(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finding = run_one(CHECK, root=root, recipe=Recipe(name="tiny", requirements=("tiny",)), lock=make_lock())
    assert len(finding.evidence) == 1
    assert finding.evidence[0].startswith("ROOT and HOME and TMPDIR")
    assert "5.0 GiB needed" in finding.evidence[0]


def test_a_lock_larger_than_the_disk_fails(root: Root) -> None:
    recipe = Recipe(name="tiny", requirements=("tiny",))
    finding = run_one(CHECK, root=root, recipe=recipe, lock=make_lock(size=10**17))
    assert finding.verdict == "failed"
    assert "ROOT" in finding.summary


def test_an_installed_env_needs_no_room_for_its_lock(env: TinyEnv) -> None:
    env.lock = make_lock(size=10**17)
    assert "ROOT" not in env.check(CHECK).summary


def test_a_folder_without_room_that_takes_no_file_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    finding = run_one(CHECK, root=root)
    assert finding.verdict == "failed"
    assert "TMPDIR" in finding.summary
    assert any("TMPDIR (/proc): 0.0 GiB free" in line for line in finding.evidence)
    assert any(line.startswith("TMPDIR (/proc): ") and "free" not in line for line in finding.evidence)
