"""What `lock --diff` and `bundle diff` say."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import tomli_w

from envbuilder.lock import LockedFile, LockedModel, LockedModelFile, SourceLock, parse_lock
from envbuilder.lock_diff import describe, diff_locks
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.recipe import Exclusion, Recipe
from envbuilder.target import python_versions

RECIPE = Recipe(
    name="x", requirements=("torch",), exclude=(Exclusion(package="unused", reason="only its tests"),)
)
PYTHONS = frozenset(python_versions(RECIPE.target))


def wheel(name: str, version: str, filename: str | None = None) -> LockedFile:
    filename = filename or f"{name}-{version}-py3-none-any.whl"
    return LockedFile(name, version, filename, 9, "1" * 64, "default", is_sdist=filename.endswith(".tar.gz"))


def base() -> dict[str, Any]:
    """A lock as a TOML table, for a test to change."""
    patch = {"path": "patches/a.patch", "size": 1, "sha256": "2" * 64}
    git = {"commit": "a" * 40, "submodules": {"lib": "b" * 40}}
    model = LockedModel(
        name="tiny",
        repo="owner/tiny",
        commit="c" * 40,
        license="mit",
        remote_code=(),
        files=(
            LockedModelFile("config.json", 1, "3" * 64),
            LockedModelFile("model.safetensors", 1, "4" * 64),
        ),
    )
    entries = [
        LockEntry(
            "torch",
            "2.10.0",
            {"runtime": PYTHONS},
            (wheel("torch", "2.10.0"),),
            {"index": "default", "license": "BSD-3-Clause"},
        ),
        LockEntry("ninja", "1.13", {"build": PYTHONS}, (wheel("ninja", "1.13"),), {"index": "default"}),
        LockEntry(
            "native",
            "1.5",
            {"runtime": PYTHONS},
            (wheel("native", "1.5", "native-1.5.tar.gz"),),
            {"index": "default", "requires": ["torch"], "build-requires": ["ninja"], "patches": [patch]},
        ),
        LockEntry(
            "tree",
            "0.1",
            {"runtime": PYTHONS},
            (wheel("tree", "0.1", "tree-0.1.tar.gz"),),
            {"git": git, "requires": [], "build-requires": []},
        ),
    ]
    text = compose_lock(RECIPE, digest="0" * 64, resolver="uv", entries=entries, models=[model])
    return tomllib.loads(text)


def lock(table: dict[str, Any]) -> SourceLock:
    return parse_lock("x", tomli_w.dumps(table))


def package(table: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in table["packages"] if item["name"] == name)
    return found


def ours(table: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = (package(table, name) if name else table)["tool"]["envbuilder"]
    return found


def renamed(item: dict[str, Any], old: str, new: str) -> None:
    item["version"] = new
    for file in item["wheels"]:
        for key in ("name", "path"):
            file[key] = file[key].replace(old, new)


def new_version(table: dict[str, Any]) -> None:
    renamed(package(table, "torch"), "2.10.0", "2.11.0")


def two_versions(table: dict[str, Any]) -> None:
    torch = package(table, "torch")
    old = copy.deepcopy(torch)
    old["marker"] += " and python_version == '3.11'"
    torch["marker"] += " and python_version != '3.11'"
    renamed(torch, "2.10.0", "2.11.0")
    table["packages"].append(old)


def sdist_becomes_wheel(table: dict[str, Any]) -> None:
    native = package(table, "native")
    file = native.pop("sdist")
    native["wheels"] = [{**file, "name": "native-1.5-py3-none-any.whl"}]
    native["wheels"][0]["path"] = "files/native-1.5-py3-none-any.whl"


def git_becomes_index(table: dict[str, Any]) -> None:
    del ours(table, "tree")["git"]
    ours(table, "tree")["index"] = "default"


def model_commit(table: dict[str, Any]) -> None:
    model = ours(table)["models"][0]
    model["commit"] = "d" * 40
    model["files"][1]["sha256"] = "5" * 64
    model["files"][0]["name"] = "generation_config.json"


def model_bytes(table: dict[str, Any]) -> None:
    ours(table)["models"][0]["files"][0]["sha256"] = "5" * 64


ONE, TWO, FIVE = "1" * 64, "2" * 64, "5" * 64
CASES: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "nothing": (lambda t: None, []),
    "what no machine sees": (lambda t: ours(t).update({"recipe-digest": "9" * 64}), []),
    "a version": (new_version, ["torch 2.10.0 -> 2.11.0 (runtime)"]),
    "a version on some Pythons": (
        two_versions,
        [
            "added: torch 2.11.0 (runtime on Python 3.12 and 3.13)",
            "torch: groups: runtime -> runtime on Python 3.11",
        ],
    ),
    "removed": (lambda t: t["packages"].remove(package(t, "ninja")), ["removed: ninja 1.13 (build)"]),
    "other bytes": (
        lambda t: package(t, "torch")["wheels"][0]["hashes"].update(sha256=FIVE),
        [
            "same version, other bytes: torch 2.10.0 (torch-2.10.0-py3-none-any.whl): "
            f"sha256 {ONE} -> sha256 {FIVE}"
        ],
    ),
    "a group": (
        lambda t: package(t, "ninja").update(
            marker="'build' in dependency_groups or 'tool' in dependency_groups"
        ),
        ["ninja: groups: build -> build, tool"],
    ),
    "wheel for sdist": (
        sdist_becomes_wheel,
        [
            "native: form: sdist -> wheel",
            "native: files: native-1.5.tar.gz -> native-1.5-py3-none-any.whl",
        ],
    ),
    "an index": (
        lambda t: ours(t, "torch").update(index="mirror"),
        ["torch: index: default -> mirror"],
    ),
    "index for git": (
        git_becomes_index,
        [
            "tree: form: git -> sdist",
            f"tree: git commit: {'a' * 40} -> none",
            f"tree: submodules: lib {'b' * 40} -> none",
            "tree: index: none -> default",
        ],
    ),
    "a git commit": (
        lambda t: ours(t, "tree")["git"].update(commit="e" * 40),
        [f"tree: git commit: {'a' * 40} -> {'e' * 40}"],
    ),
    "a submodule": (
        lambda t: ours(t, "tree")["git"]["submodules"].update(lib="e" * 40),
        [f"tree: submodules: lib {'b' * 40} -> lib {'e' * 40}"],
    ),
    "a patch": (
        lambda t: ours(t, "native")["patches"][0].update(sha256=FIVE),
        [f"native: patches: patches/a.patch sha256 {TWO} -> patches/a.patch sha256 {FIVE}"],
    ),
    "no patch": (
        lambda t: ours(t, "native").pop("patches"),
        [f"native: patches: patches/a.patch sha256 {TWO} -> none"],
    ),
    "a licence": (
        lambda t: ours(t, "torch").update(license="Proprietary"),
        ["torch: license: BSD-3-Clause -> Proprietary"],
    ),
    "requirements": (
        lambda t: ours(t, "native").update(requires=["torch", "einops"]),
        ["native: requires: torch -> torch, einops"],
    ),
    "a model's commit": (
        model_commit,
        [
            f"model tiny: commit: {'c' * 40} -> {'d' * 40}",
            f"model tiny: file model.safetensors: sha256 {'4' * 64} -> sha256 {FIVE}",
            "model tiny: files: config.json -> generation_config.json",
        ],
    ),
    "a model's bytes at one commit": (
        model_bytes,
        [f"same version, other bytes: model tiny (config.json): sha256 {'3' * 64} -> sha256 {FIVE}"],
    ),
    "a model's code": (
        lambda t: ours(t)["models"][0].update({"remote-code": ["modeling.py"]}),
        ["model tiny: remote code: none -> modeling.py"],
    ),
    "a model's licence": (
        lambda t: ours(t)["models"][0].pop("license"),
        ["model tiny: license: mit -> none"],
    ),
    "no model": (
        lambda t: ours(t).update(models=[]),
        [f"removed: model tiny owner/tiny {'c' * 40}"],
    ),
    "the target": (lambda t: ours(t)["target"].update(glibc="2.34"), ["target: glibc: 2.28 -> 2.34"]),
    "the resolver": (lambda t: ours(t).update(resolver="pip-tools"), ["lock: resolver: uv -> pip-tools"]),
    "what is provided": (lambda t: ours(t).update(provided=["torch>=2"]), ["added: provided torch>=2"]),
    "what is excluded": (
        lambda t: ours(t).update(excluded=[]),
        ["removed: excluded package unused, reason only its tests"],
    ),
}


@pytest.mark.parametrize(("change", "lines"), CASES.values(), ids=CASES)
def test_each_change_is_said_in_words(change: Callable[[dict[str, Any]], object], lines: list[str]) -> None:
    new = base()
    change(new)
    diff = diff_locks(lock(base()), lock(new))
    assert describe(diff) == lines
    assert bool(diff) == bool(lines)


@pytest.mark.parametrize("change", [change for change, _ in CASES.values()], ids=CASES)
def test_each_change_is_seen_from_the_other_side_too(change: Callable[[dict[str, Any]], object]) -> None:
    new = base()
    change(new)
    there, back = diff_locks(lock(base()), lock(new)), diff_locks(lock(new), lock(base()))
    assert len(there.changes) == len(back.changes)
    swapped = {"added": "removed", "removed": "added"}
    assert {(change.name, swapped.get(change.kind, change.kind)) for change in there.changes} == {
        (change.name, change.kind) for change in back.changes
    }
