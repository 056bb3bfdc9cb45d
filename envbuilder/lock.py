"""The source lock: every byte that a recipe needs, by name, size and sha256. Pure: parse and select.

A PEP 751 file, `pylock.NAME.toml`. No URL and no host is ever in it, so it works behind any mirror: a package
names its index, and `path` is where the file lies in a bundle. Three dependency groups:

- `runtime` (the default): what the environment holds;
- `build`: what compiles the source packages, the CUDA toolchain among it;
- `tool`: envbuilder itself needs these on the compute node.

One version of a package serves all groups, unless none suits both the tool and the rest. `[tool.envbuilder]`
holds what PEP 751 has no word for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.pylock import (
    Package,
    PackageSdist,
    PackageWheel,
    Pylock,
    PylockSelectError,
    PylockValidationError,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from envbuilder.errors import InputError, MismatchError
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.target import Target
from envbuilder.toml import tomllib

SCHEMA = 2
FILES = "files"
"""The folder of a bundle in which the locked files lie."""
MODELS = "models"
"""The folder of a bundle in which each model has a folder."""
Group = Literal["runtime", "build", "tool"]
GROUPS: tuple[Group, ...] = ("runtime", "build", "tool")


@dataclass(frozen=True)
class LockedFile:
    """One file that the lock names, and the package it belongs to."""

    package: str
    version: str
    filename: str
    size: int
    """Bytes."""
    sha256: str
    index: str | None
    """The name of the index it comes from; None for a source tree that is packed from git."""
    is_sdist: bool


@dataclass(frozen=True)
class LockedTree:
    """What a git source is packed from."""

    commit: str
    """40 hexadecimal digits."""
    submodules: Mapping[str, str]
    """Path in the tree → the submodule's commit, nested ones too."""


@dataclass(frozen=True)
class LockedPatch:
    """One patch of a package."""

    path: str
    """Relative to the recipe's folder, and to a bundle's."""
    size: int
    sha256: str


@dataclass(frozen=True)
class LockedModelFile:
    """One file of a model."""

    name: str
    """Its path in the repository, and in the model's folder."""
    size: int
    sha256: str


@dataclass(frozen=True)
class LockedModel:
    """One commit of a model on the hub, or a model of which there are only files."""

    name: str
    """Its folder in a bundle: models/NAME."""
    repo: str | None
    """"owner/name"; None where it is on no hub: then its files alone say which it is."""
    commit: str | None
    """40 hexadecimal digits, with `repo` and only with it."""
    license: str | None
    """As its model card says."""
    remote_code: tuple[str, ...]
    """Those of `files` that are Python code."""
    files: tuple[LockedModelFile, ...]

    @property
    def origin(self) -> str:
        """Which model it is, in words."""
        return f"{self.repo} at {self.commit}" if self.repo else f"{self.name}, by its files alone"


@dataclass(frozen=True)
class SourceLock:
    """A parsed source lock."""

    name: str
    pylock: Pylock
    text: str
    """The lock file's text, from which the rest was parsed: what a bundle keeps is what was used."""

    @property
    def digest(self) -> str:
        """sha256 of the lock file's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def recipe_digest(self) -> str:
        """`recipe_digest` of the recipe that this lock was made from."""
        return str(self._table["recipe-digest"])

    @property
    def _table(self) -> dict[str, Any]:
        return dict((self.pylock.tool or {})["envbuilder"])

    @property
    def target(self) -> TargetSpec:
        """The machines that this lock is for: the recipe's, or a probed one of them."""
        return TargetSpec.model_validate(self._table["target"])

    @property
    def provided(self) -> tuple[str, ...]:
        """The requirements that the machine's packages must meet: the recipe's, or what a probed one has."""
        return tuple(self._table.get("provided", ()))

    @property
    def models(self) -> tuple[LockedModel, ...]:
        return tuple(_model(table) for table in self._table.get("models", ()))

    @property
    def patches(self) -> tuple[LockedPatch, ...]:
        """Those of all packages, each path once, by path."""
        found = {
            patch.path: patch for package in self.pylock.packages for patch in self.patches_of(package.name)
        }
        return tuple(found[path] for path in sorted(found))

    def patches_of(self, name: str) -> tuple[LockedPatch, ...]:
        """The patches of package `name`, in the order in which they are applied."""
        return tuple(LockedPatch(**table) for table in self.package_table(name).get("patches", ()))

    def tree_of(self, name: str) -> LockedTree | None:
        """What package `name` is packed from, if that is git."""
        table = self.package_table(name).get("git")
        return LockedTree(table["commit"], dict(table["submodules"])) if table else None

    def package_table(self, name: str) -> dict[str, Any]:
        """`[packages.tool.envbuilder]` of package `name`: `index` or `git`, `license`; for source packages
        `metadata-source`, `requires`, `build-requires` and `patches` too."""
        for package in self.pylock.packages:
            if package.name == canonicalize_name(name):
                return dict((package.tool or {}).get("envbuilder", {}))
        return {}

    def select(self, target: Target, groups: Iterable[Group] = ("runtime",)) -> tuple[LockedFile, ...]:
        """The files that `groups` install on `target`, one a package in each group, by the rules of PEP 751.

        MismatchError where a package has no file that `target` can take.
        """
        try:
            # Each group by itself: the tool may have another version of a package than the rest.
            chosen = [
                (package, source)
                for group in groups
                for package, source in self.pylock.select(
                    environment=target.environment, tags=target.tags, dependency_groups=(group,)
                )
            ]
        except PylockSelectError as error:
            raise MismatchError(
                f"The lock {self.name} can't serve Python {target.python}: {error}.",
                remedy=f"envbuilder lock recipes/{self.name}.toml",
                context={"lock": lock_filename(self.name), "python": target.python},
            ) from error
        return tuple(dict.fromkeys(self._file(package, source) for package, source in chosen))

    def _file(self, package: Package, source: object) -> LockedFile:
        # parse_lock has refused all other kinds of source.
        assert isinstance(source, (PackageWheel, PackageSdist))
        return LockedFile(
            package=package.name,
            version=str(package.version),
            filename=source.filename,
            size=source.size or 0,
            sha256=source.hashes["sha256"],
            index=self.package_table(package.name).get("index"),
            is_sdist=isinstance(source, PackageSdist),
        )


def lock_filename(name: str) -> str:
    """The file name that PEP 751 prescribes for a named lock."""
    return f"pylock.{name}.toml"


def recipe_digest(
    recipe: Recipe,
    trainer_requires: Sequence[str],
    tool_requires: Sequence[str],
    patches: Mapping[str, str],
) -> str:
    """sha256 of all that a lock depends on: when it changes, the recipe has moved on from its lock.

    `trainer_requires` and `tool_requires` are the requirements of this version of the tool; `patches` are
    the recipe's: path → sha256.
    """
    wanted = recipe.model_dump(
        mode="json",
        include={"name", "requirements", "trainer", "target", "exclude", "index", "model"},
        # Where a machine has a model, its lock is for the same bytes.
        exclude={"model": {"__all__": {"provided"}}},
    )
    wanted["builds"] = {
        name: build.model_dump(
            mode="json",
            include={
                "requires": True,
                "build_requires": True,
                "version": True,
                "patches": True,
                "git": {"commit", "subdirectory"},
            },
        )
        for name, build in sorted(recipe.build.items())
    }
    wanted["patches"] = dict(sorted(patches.items()))
    wanted["provided"] = sorted(recipe.provided.packages) if recipe.provided else None
    wanted["toolchain"] = sorted(recipe.cuda.toolchain_requirements) if recipe.cuda else None
    wanted["trainer-requires"] = sorted(trainer_requires) if recipe.trainer else None
    wanted["tool-requires"] = sorted(tool_requires)
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def check_current(lock: SourceLock, digest: str) -> None:
    """MismatchError if `lock` was made from something other than what `digest` (recipe_digest) stands for."""
    if lock.recipe_digest != digest:
        raise MismatchError(
            f"The recipe {lock.name} has changed since its lock was made.",
            remedy=f"envbuilder lock recipes/{lock.name}.toml",
            context={"lock": lock_filename(lock.name), "expected": digest, "got": lock.recipe_digest},
        )


def read_lock(path: Path) -> SourceLock:
    """The source lock in `path`; InputError where it is missing, damaged or not one of ours."""
    name = path.name.removeprefix("pylock.").removesuffix(".toml")
    try:
        return parse_lock(name, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"There is no lock at {path}.",
            remedy=f"envbuilder lock recipes/{name}.toml",
            context={"file": path},
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The lock {path} can't be read: {error}.",
            remedy=f"envbuilder lock recipes/{name}.toml",
            context={"file": path},
        ) from error


def parse_lock(name: str, text: str) -> SourceLock:
    """Parses and validates a lock's text: PEP 751, our table, a strong hash and a size on every file."""

    def refuse(why: object) -> InputError:
        return InputError(
            f"{lock_filename(name)} is not a lock that envbuilder can use: {why}.",
            remedy=f"envbuilder lock recipes/{name}.toml",
            context={"file": lock_filename(name)},
        )

    try:
        pylock = Pylock.from_dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, PylockValidationError) as error:
        raise refuse(error) from error
    table = (pylock.tool or {}).get("envbuilder")
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or "recipe-digest" not in table:
        raise refuse(f"it has no [tool.envbuilder] table of schema {SCHEMA}")
    for package in pylock.packages:
        if package.vcs or package.directory or package.archive or package.version is None:
            raise refuse(f"{package.name} is neither wheels nor an sdist of one version")
        if not {"index", "git"} & (package.tool or {}).get("envbuilder", {}).keys():
            raise refuse(f"{package.name} names neither its index nor its git commit")
        for file in _files(package):
            if not re.fullmatch(r"[0-9a-f]{64}", file.hashes.get("sha256", "")) or file.size is None:
                raise refuse(f"{file.filename} has no sha256 or no size")
            if file.url is not None or file.path != f"{FILES}/{file.filename}":
                raise refuse(f"{file.filename} must be named by its path in a bundle, and by no URL")
    lock = SourceLock(name, pylock, text)
    try:
        _check_tables(lock)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(f"its [tool.envbuilder] tables are damaged: {error}") from error
    return lock


def _model(table: Mapping[str, Any]) -> LockedModel:
    return LockedModel(
        name=table["name"],
        repo=table.get("repo"),
        commit=table.get("commit"),
        license=table.get("license"),
        remote_code=tuple(table["remote-code"]),
        files=tuple(LockedModelFile(**file) for file in table["files"]),
    )


def _check_tables(lock: SourceLock) -> None:
    """KeyError, TypeError or ValueError where something is missing, weak, or leads out of a bundle."""
    TargetSpec.model_validate(lock.target)
    for text in lock.provided:
        Requirement(text)
    for model in lock.models:
        if model.repo is not None and not re.fullmatch(r"[0-9a-f]{40}", model.commit or ""):
            raise ValueError(f"model {model.name} has no full commit")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", model.name):
            raise ValueError(f"{model.name!r} is no model's name")
        for file in model.files:
            _check_file(file.name, file.size, file.sha256)
    for package in lock.pylock.packages:
        if (tree := lock.tree_of(package.name)) and not re.fullmatch(r"[0-9a-f]{40}", tree.commit):
            raise ValueError(f"{package.name} has no full commit")
        for patch in lock.patches_of(package.name):
            _check_file(patch.path, patch.size, patch.sha256)


def _check_file(path: str, size: int, sha256: str) -> None:
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} is no path inside a bundle")
    if not isinstance(size, int) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{path} has no sha256 or no size")


def _files(package: Package) -> list[PackageWheel | PackageSdist]:
    return [*(package.wheels or ()), *([package.sdist] if package.sdist else [])]
