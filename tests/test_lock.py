"""The lock's format: what is written, what is refused, and which files a Python gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from envbuilder.errors import InputError, MismatchError
from envbuilder.lock import (
    GROUPS,
    Group,
    LockedFile,
    SourceLock,
    check_current,
    lock_filename,
    parse_lock,
    read_lock,
    recipe_digest,
)
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.requirements import tool_requires, trainer_requires
from envbuilder.target import python_versions, target_for

REPOSITORY = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.toml"))
PYTHONS = frozenset({"3.11", "3.12", "3.13"})


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate({"name": "demo", "requirements": ["app"]} | fields)


def entry(
    name: str, version: str, needed: dict[Group, frozenset[str]], tag: str | None = "py3-none-any"
) -> LockEntry:
    """A package with one wheel, or without `tag` one sdist."""
    filename = f"{name}-{version}.tar.gz" if tag is None else f"{name}-{version}-{tag}.whl"
    file = LockedFile(name, version, filename, 123, "ab" * 32, "default", tag is None)
    return LockEntry(name, version, needed, (file,), {"index": "default"})


def compose(*entries: LockEntry) -> str:
    return compose_lock(recipe(), digest="d" * 64, resolver="uv", entries=entries)


def chosen(lock: SourceLock, python: str, *groups: Group) -> set[str]:
    return {
        f"{file.package} {file.version}" for file in lock.select(target_for(recipe().target, python), groups)
    }


def test_a_lock_reads_back_as_it_was_written() -> None:
    lock = parse_lock(
        "demo",
        compose(
            entry("app", "1.0", {"runtime": PYTHONS}), entry("core", "2.0", {"build": PYTHONS}, tag=None)
        ),
    )

    assert lock.recipe_digest == "d" * 64
    assert lock.package_table("Core") == {"index": "default"}
    (file,) = lock.select(target_for(recipe().target, "3.12"))
    assert file == LockedFile(
        "app", "1.0", "app-1.0-py3-none-any.whl", 123, "ab" * 32, "default", is_sdist=False
    )
    (sdist,) = lock.select(target_for(recipe().target, "3.12"), ("build",))
    assert sdist.is_sdist


def test_packages_are_chosen_by_group_and_python() -> None:
    lock = parse_lock(
        "demo",
        compose(
            entry("everywhere", "1.0", {"runtime": PYTHONS, "tool": PYTHONS}),
            entry("mixed", "1.0", {"runtime": frozenset({"3.11"}), "build": PYTHONS}),
            entry("numbers", "1.0", {"runtime": frozenset({"3.11"})}),
            entry("numbers", "2.0", {"runtime": frozenset({"3.12", "3.13"})}),
        ),
    )

    assert chosen(lock, "3.11", "runtime") == {"everywhere 1.0", "mixed 1.0", "numbers 1.0"}
    assert chosen(lock, "3.13", "runtime") == {"everywhere 1.0", "numbers 2.0"}
    assert chosen(lock, "3.13", "build") == {"mixed 1.0"}
    assert chosen(lock, "3.13", "tool") == {"everywhere 1.0"}


def test_a_python_that_no_wheel_fits_is_a_mismatch() -> None:
    lock = parse_lock(
        "demo", compose(entry("native", "1.0", {"runtime": PYTHONS}, "cp311-cp311-manylinux_2_17_x86_64"))
    )

    assert chosen(lock, "3.11", "runtime") == {"native 1.0"}
    with pytest.raises(MismatchError, match="native") as caught:
        chosen(lock, "3.12", "runtime")
    assert caught.value.remedy == "envbuilder lock recipes/demo.toml"


@pytest.mark.parametrize(
    ("pattern", "replacement", "why"),
    [
        (r"^size = 123\n", "", "no sha256 or no size"),
        (r'sha256 = "\w+"', 'md5 = "ab"', "no sha256 or no size"),
        (r'sha256 = "\w+"', 'sha256 = "ab"', "no sha256 or no size"),
        (r"^path = .*$", 'path = "elsewhere/app-1.0-py3-none-any.whl"', "path in a bundle"),
        (r"^path = .*$", 'path = "files/../app-1.0-py3-none-any.whl"', "path in a bundle"),
        (r"^(path = .*)$", '\\1\nurl = "https://127.0.0.1/app-1.0-py3-none-any.whl"', "no URL"),
        (r'^index = "default"$', "", "names neither its index nor its git commit"),
        (r'^version = "1.0"$', "", "one version"),
        (r"^schema = 2$", "schema = 1", "schema 2"),
        (r"^provided = \[\]$", 'provided = ["a b"]', "tables are damaged"),
        (r"^lock-version = .*$", 'lock-version = "9.0"', "version"),
        (r"^\[\[packages\]\]$", "[[packages", ""),
    ],
)
def test_a_lock_that_is_not_wholly_ours_is_refused(pattern: str, replacement: str, why: str) -> None:
    text = compose(entry("app", "1.0", {"runtime": PYTHONS}))
    broken = re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert broken != text

    with pytest.raises(InputError, match=f"not a lock that envbuilder can use: .*{why}"):
        parse_lock("demo", broken)


def test_a_missing_lock_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_lock(tmp_path / "pylock.demo.toml")

    assert caught.value.remedy == "envbuilder lock recipes/demo.toml"


def test_a_lock_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pylock.demo.toml"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(InputError, match="can't be read"):
        read_lock(path)


@pytest.mark.parametrize(
    "change",
    [
        {"requirements": ["app", "more"]},
        {"trainer": False},
        {"target": {"python": ">=3.12"}},
        {"exclude": [{"package": "x", "reason": "y"}]},
        {"index": {"app": "site"}},
        {"provided": {"packages": ["torch==2.0"]}},
        {"build": {"app": {"requires": ["torch"]}}},
        {"cuda": {"toolchain-requirements": ["cuda-toolkit"]}},
    ],
)
def test_what_a_lock_depends_on_changes_the_digest(change: dict[str, object]) -> None:
    assert recipe_digest(recipe(**change), ["torch"], ["uv"], {}) != recipe_digest(
        recipe(), ["torch"], ["uv"], {}
    )


def test_what_a_lock_does_not_depend_on_leaves_the_digest() -> None:
    before = recipe_digest(recipe(build={"app": {}}), ["torch"], ["uv"], {})
    after = recipe(description="other words", build={"app": {"env": {"A": "1"}}})

    assert recipe_digest(after, ["torch"], ["uv"], {}) == before
    assert recipe_digest(after, ["torch", "peft"], ["uv"], {}) != before
    assert recipe_digest(after, ["torch"], ["uv", "pip"], {}) != before


def test_a_recipe_that_has_moved_on_is_a_mismatch_with_the_command_that_mends_it() -> None:
    lock = parse_lock("demo", compose(entry("app", "1.0", {"runtime": PYTHONS})))

    check_current(lock, "d" * 64)
    with pytest.raises(MismatchError) as caught:
        check_current(lock, "e" * 64)
    assert caught.value.remedy == "envbuilder lock recipes/demo.toml"


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_locks_are_those_of_the_shipped_recipes_and_serve_all_their_pythons(name: str) -> None:
    shipped = load_recipe(REPOSITORY / "recipes" / f"{name}.toml")
    path = REPOSITORY / "lockfiles" / lock_filename(name)
    lock = read_lock(path)

    check_current(lock, recipe_digest(shipped, trainer_requires(), tool_requires(), {}))
    for python in python_versions(shipped.target):
        packages = {file.package for file in lock.select(target_for(shipped.target, python), GROUPS)}
        assert set(shipped.build) < packages
        assert not packages & shipped.excluded_names
        runtime = {file.package for file in lock.select(target_for(shipped.target, python))}
        assert not runtime & shipped.provided_names
    assert "://" not in path.read_text(encoding="utf-8")
    assert "+cpu" not in path.read_text(encoding="utf-8")
