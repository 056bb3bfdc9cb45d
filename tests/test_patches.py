"""Patches as git makes them, applied to real trees: whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from envbuilder.errors import BuildError, InputError, MismatchError
from envbuilder.lock import LockedPatch
from envbuilder.patches import apply_patches, locked_patches, read_patches
from envbuilder.recipe import Recipe
from tests.lab.git_repositories import Content, commit, git, make_repository

BEFORE: dict[str, Content] = {
    "setup.py": "one\ntwo\nthree\nfour\nfive\nsix\nseven\n",
    "src/a.cu": "code\n",
    "src/old.cu": "gone\n" * 20,
    "run.sh": "#!/bin/sh\n",
    "data": bytes(range(256)),
}


def diff(folder: Path, before: dict[str, Content], after: dict[str, Content], *executable: str) -> bytes:
    """What `git diff` says of two trees."""
    folder.mkdir(exist_ok=True)
    repository = make_repository(folder / "repository")
    one = commit(repository, before)
    other = commit(repository, after, executable=executable)
    text = git("--git-dir", repository, "diff", "--binary", "--find-renames", one, other)
    return f"{text}\n".encode()


def unpacked(folder: Path, files: dict[str, Content]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        path.chmod(0o644)
    return folder


def state(tree: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(tree)): (path.read_bytes(), path.stat().st_mode & 0o777)
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def edited(text: str = "TWO") -> dict[str, Content]:
    return {**BEFORE, "setup.py": str(BEFORE["setup.py"]).replace("two", text)}


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_changes_creations_deletions_renames_modes_and_binary_files_are_applied(
    tmp_path: Path, umask: int
) -> None:
    after = edited()
    del after["src/a.cu"]
    after["src/new.cu"] = after.pop("src/old.cu")
    after["deep/er/added.h"] = "#pragma once\n"
    after["data"] = bytes(reversed(range(256)))
    patch = diff(tmp_path / "made", BEFORE, after, "run.sh")
    tree = unpacked(tmp_path / "tree", BEFORE)
    old = os.umask(umask)
    try:
        apply_patches(tree, {"all.patch": patch})
    finally:
        os.umask(old)
    expected = {
        name: (content if isinstance(content, bytes) else str(content).encode(), 0o644)
        for name, content in after.items()
    }
    expected["run.sh"] = (b"#!/bin/sh\n", 0o755)
    assert state(tree) == expected


def test_patches_are_applied_in_their_order(tmp_path: Path) -> None:
    first = diff(tmp_path / "1", BEFORE, edited("TWO"))
    second = diff(tmp_path / "2", edited("TWO"), edited("zwei"))
    tree = unpacked(tmp_path / "tree", BEFORE)
    apply_patches(tree, {"b.patch": first, "a.patch": second})
    assert b"zwei" in (tree / "setup.py").read_bytes()


def test_lines_may_have_moved_but_the_context_must_be_there_to_the_letter(tmp_path: Path) -> None:
    after: dict[str, Content] = {**BEFORE, "setup.py": str(BEFORE["setup.py"]).replace("five", "FIVE")}
    patch = diff(tmp_path / "made", BEFORE, after)
    moved = unpacked(tmp_path / "moved", {"setup.py": "new\n" * 9 + str(BEFORE["setup.py"])})
    apply_patches(moved, {"a.patch": patch})
    assert b"FIVE" in (moved / "setup.py").read_bytes()
    for line, other in (("four", "vier"), ("three", "three "), ("six", "sechs"), ("five", "cinq")):
        tree = unpacked(tmp_path / line, {"setup.py": str(BEFORE["setup.py"]).replace(line, other)})
        before = state(tree)
        with pytest.raises(BuildError, match=r"a\.patch can't be applied: setup\.py: the hunk at line 2"):
            apply_patches(tree, {"a.patch": patch})
        assert state(tree) == before


def test_where_one_file_or_one_patch_does_not_fit_nothing_is_changed(tmp_path: Path) -> None:
    after = {**edited(), "src/a.cu": "other\n", "src/b.cu": "new\n"}
    good = diff(tmp_path / "made", BEFORE, after)
    tree = unpacked(tmp_path / "tree", BEFORE)
    before = state(tree)
    with pytest.raises(BuildError) as caught:
        apply_patches(tree, {"one.patch": good, "two.patch": good})
    assert state(tree) == before
    assert caught.value.context["patch"] == "two.patch"
    assert "src/a.cu" in caught.value.context["file"]
    (tree / "src/a.cu").write_text("different\n")
    before = state(tree)
    with pytest.raises(BuildError):
        apply_patches(tree, {"one.patch": good})
    assert state(tree) == before


def adding(path: str, mode: str = "100644", text: str = "out") -> bytes:
    return (
        f"diff --git a/{path} b/{path}\nnew file mode {mode}\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{text}\n\\ No newline at end of file\n"
    ).encode()


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(adding("../out"), id="up"),
        pytest.param(adding("src/../../out"), id="up later"),
        pytest.param(adding("/tmp/../out"), id="absolute"),
        pytest.param(adding(".git/config"), id="git's own"),
        pytest.param(adding("link", "120000", "/etc"), id="link"),
        pytest.param(adding("link", "120000", "..") + adding("link/out"), id="through its own link"),
        pytest.param(adding("module", "160000", "Subproject commit " + "0" * 40), id="submodule"),
        pytest.param(adding("setup.py"), id="there already"),
        pytest.param(adding("new")[:-40], id="torn"),
        pytest.param(b"--- a/absent\n+++ b/absent\n@@ -1 +1 @@\n-a\n+b\n", id="no such file"),
        pytest.param(b"no patch at all\n", id="no patch"),
    ],
)
def test_a_patch_that_leaves_the_tree_or_makes_a_link_is_refused(tmp_path: Path, patch: bytes) -> None:
    tree = unpacked(tmp_path / "tree", BEFORE)
    before = state(tmp_path)
    with pytest.raises(BuildError, match=r"evil\.patch can't be applied"):
        apply_patches(tree, {"evil.patch": patch})
    assert state(tmp_path) == before
    assert not (tree / "link").is_symlink()


def test_a_link_in_the_tree_is_not_gone_through(tmp_path: Path) -> None:
    tree = unpacked(tmp_path / "tree", BEFORE)
    (tmp_path / "elsewhere").mkdir()
    (tree / "link").symlink_to("../elsewhere")
    with pytest.raises(BuildError, match="beyond a symbolic link"):
        apply_patches(tree, {"evil.patch": adding("link/out")})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_neither_a_repository_around_the_tree_nor_the_users_settings_have_a_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = diff(tmp_path / "made", BEFORE, edited())
    git("init", "--quiet", tmp_path / "outer")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(
        "[apply]\n\twhitespace = error-all\n\tignoreWhitespace = change\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "outer/.git"))
    tree = unpacked(tmp_path / "outer" / "tree", BEFORE)
    apply_patches(tree, {"a.patch": patch})
    assert b"TWO" in (tree / "setup.py").read_bytes()
    other = unpacked(tmp_path / "outer" / "other", {"setup.py": "one\n two\nthree\nfour\nfive\n"})
    with pytest.raises(BuildError):
        apply_patches(other, {"a.patch": patch})


def test_without_git_the_remedy_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MismatchError, match="git is not on this machine"):
        apply_patches(tmp_path, {"a.patch": adding("new")})


def recipe_with(*patches: str) -> Recipe:
    return Recipe.model_validate(
        {"name": "demo", "requirements": ["kernels"], "build": {"kernels": {"patches": patches}, "other": {}}}
    )


def test_patches_are_read_and_locked_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    for name in ("b", "a"):
        (tmp_path / f"patches/{name}.patch").write_bytes(adding(name))
    recipe = recipe_with("patches/b.patch", "patches/a.patch")
    assert read_patches(recipe, tmp_path) == {
        "patches/a.patch": adding("a"),
        "patches/b.patch": adding("b"),
    }
    assert locked_patches(recipe, tmp_path) == tuple(
        LockedPatch(f"patches/{name}.patch", len(adding(name)), hashlib.sha256(adding(name)).hexdigest())
        for name in ("a", "b")
    )
    assert read_patches(recipe_with(), tmp_path) == {}


@pytest.mark.parametrize("fault", ["missing", "folder", "no patch", "too large", "outside", "loop"])
def test_what_can_be_no_patch_of_the_recipe_is_refused(tmp_path: Path, fault: str) -> None:
    place = tmp_path / "recipes/patches/a.patch"
    place.parent.mkdir(parents=True)
    if fault == "folder":
        place.mkdir()
    elif fault == "no patch":
        place.write_text("--- nothing\n")
    elif fault == "too large":
        place.write_bytes(adding("new") + bytes(8 << 20))
    elif fault == "outside":
        (tmp_path / "secret").write_bytes(adding("new"))
        place.symlink_to(tmp_path / "secret")
    elif fault == "loop":
        place.symlink_to(place)
    with pytest.raises(InputError, match=r"patches/a\.patch") as caught:
        read_patches(recipe_with("patches/a.patch"), tmp_path / "recipes")
    assert caught.value.context["file"] == str(place)
