"""The source lock: every byte that a recipe needs, by name, size and sha256. Pure: parse, select, serialise.

A PEP 751 file, `pylock.NAME.toml`. No URL and no host is ever in it, so it works behind any mirror: a package
names its index, and `path` is where the file lies in a bundle. Three dependency groups:

- `runtime` (the default): what the environment holds;
- `build`: what compiles the source packages, the CUDA toolchain among it;
- `tool`: envbuilder itself needs these on the compute node.

One version of a package serves all groups. `[tool.envbuilder]` holds what PEP 751 has no word for.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from packaging.markers import Marker
from packaging.pylock import (
    Package,
    PackageSdist,
    PackageWheel,
    Pylock,
    PylockSelectError,
    PylockValidationError,
)
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.errors import InputError, MismatchError
from envbuilder.recipe import Recipe
from envbuilder.target import Target, python_versions

SCHEMA = 1
FILES = "files"
"""The folder of a bundle in which the locked files lie."""
Group = Literal["runtime", "build", "tool"]
GROUPS: tuple[Group, ...] = ("runtime", "build", "tool")


@dataclass(frozen=True, slots=True)
class LockedFile:
    """One file that the lock names, and the package it belongs to."""

    package: str
    version: str
    filename: str
    size: int
    """Bytes."""
    sha256: str
    index: str
    """The name of the index it comes from."""
    is_sdist: bool


@dataclass(frozen=True, slots=True)
class LockEntry:
    """One version of one package, as `compose_lock` takes it."""

    name: str
    version: str
    needed: Mapping[Group, frozenset[str]]
    """Group → the minor Python versions on which the group needs it."""
    files: tuple[LockedFile, ...]
    """One sdist, or the wheels."""
    table: Mapping[str, Any]
    """Its `tool.envbuilder` table."""


@dataclass(frozen=True, slots=True)
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

    def package_table(self, name: str) -> dict[str, Any]:
        """`[packages.tool.envbuilder]` of package `name`: `index`, and for sdists `metadata-source`,
        `requires` and `build-requires`."""
        for package in self.pylock.packages:
            if package.name == canonicalize_name(name):
                return dict((package.tool or {}).get("envbuilder", {}))
        return {}

    def select(self, target: Target, groups: Iterable[Group] = ("runtime",)) -> tuple[LockedFile, ...]:
        """The files to install on `target`, one for each package, by the rules of PEP 751.

        MismatchError where a package has no file that `target` can take.
        """
        try:
            chosen = list(
                self.pylock.select(
                    environment=target.environment, tags=target.tags, dependency_groups=tuple(groups)
                )
            )
        except PylockSelectError as error:
            raise MismatchError(
                f"The lock {self.name} can't serve Python {target.python}: {error}.",
                remedy=f"envbuilder lock recipes/{self.name}.toml",
                context={"lock": lock_filename(self.name), "python": target.python},
            ) from error
        return tuple(self._file(package, source) for package, source in chosen)

    def _file(self, package: Package, source: object) -> LockedFile:
        # parse_lock has refused all other kinds of source.
        assert isinstance(source, PackageWheel | PackageSdist)
        return LockedFile(
            package=package.name,
            version=str(package.version),
            filename=source.filename,
            size=source.size or 0,
            sha256=source.hashes["sha256"],
            index=self.package_table(package.name)["index"],
            is_sdist=isinstance(source, PackageSdist),
        )


def lock_filename(name: str) -> str:
    """The file name that PEP 751 prescribes for a named lock."""
    return f"pylock.{name}.toml"


def recipe_digest(recipe: Recipe, trainer_requires: Sequence[str], tool_requires: Sequence[str]) -> str:
    """sha256 of all that a lock depends on: when it changes, the recipe has moved on from its lock.

    `trainer_requires` and `tool_requires` are the requirements of this version of the tool.
    """
    wanted = recipe.model_dump(
        mode="json",
        include={"name", "requirements", "trainer", "target", "exclude", "index"},
    )
    wanted["builds"] = {
        name: build.model_dump(mode="json", include={"requires", "build_requires"})
        for name, build in sorted(recipe.build.items())
    }
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
        if "index" not in (package.tool or {}).get("envbuilder", {}):
            raise refuse(f"{package.name} doesn't name its index")
        for file in _files(package):
            if "sha256" not in file.hashes or file.size is None:
                raise refuse(f"{file.filename} has no sha256 or no size")
            if file.url is not None or file.path != f"{FILES}/{file.filename}":
                raise refuse(f"{file.filename} must be named by its path in a bundle, and by no URL")
    return SourceLock(name, pylock, text)


def compose_lock(recipe: Recipe, *, digest: str, resolver: str, entries: Sequence[LockEntry]) -> str:
    """The text of the lock of `recipe`; `digest` is its recipe_digest, `resolver` who chose the versions."""
    pythons = python_versions(recipe.target)
    machine = f"sys_platform == 'linux' and platform_machine == '{recipe.target.machine}'"
    after_newest = f"3.{int(pythons[-1].split('.')[1]) + 1}"
    return lock_text(
        Pylock(
            lock_version=Version("1.0"),
            environments=[Marker(f"{machine} and implementation_name == 'cpython'")],
            requires_python=SpecifierSet(f">={pythons[0]},<{after_newest}"),
            dependency_groups=GROUPS,
            default_groups=["runtime"],
            created_by="envbuilder",
            packages=[_package(entry, frozenset(pythons)) for entry in entries],
            tool={
                "envbuilder": {
                    "schema": SCHEMA,
                    "recipe-digest": digest,
                    "resolver": resolver,
                    "target": recipe.target.model_dump(mode="json"),
                    "provided": sorted(recipe.provided.packages) if recipe.provided else [],
                    "excluded": [exclusion.model_dump(mode="json") for exclusion in recipe.exclude],
                }
            },
        )
    )


def _package(entry: LockEntry, pythons: frozenset[str]) -> Package:
    def named(file: LockedFile) -> dict[str, Any]:
        path = f"{FILES}/{file.filename}"
        return {"name": file.filename, "path": path, "size": file.size, "hashes": {"sha256": file.sha256}}

    wheels = [PackageWheel(**named(file)) for file in entry.files if not file.is_sdist]
    sdists = [PackageSdist(**named(file)) for file in entry.files if file.is_sdist]
    return Package(
        name=canonicalize_name(entry.name),
        version=Version(entry.version),
        marker=_marker(entry.needed, pythons),
        sdist=next(iter(sdists), None),
        wheels=wheels or None,
        tool={"envbuilder": entry.table},
    )


def _marker(needed: Mapping[Group, frozenset[str]], pythons: frozenset[str]) -> Marker:
    """True in each group on the Pythons that need it; `pythons` are all that the lock serves."""
    groups_on: dict[frozenset[str], list[Group]] = {}
    for group in GROUPS:
        if group in needed:
            groups_on.setdefault(needed[group], []).append(group)
    terms = []
    for some, groups in groups_on.items():
        condition = " or ".join(f"'{group}' in dependency_groups" for group in groups)
        if some != pythons:
            versions = " or ".join(f"python_version == '{v}'" for v in sorted(some, key=Version))
            condition = f"({condition}) and ({versions})"
        terms.append(condition)
    return Marker(" or ".join(terms) if len(terms) == 1 else " or ".join(f"({term})" for term in terms))


def lock_text(pylock: Pylock) -> str:
    """The TOML text of a lock; the same lock gives the same text."""
    pylock.validate()
    return tomli_w.dumps(_plain(pylock.to_dict()))


def _plain(value: Any) -> Any:
    """`value` with the mapping and sequence types that tomli_w takes."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _files(package: Package) -> list[PackageWheel | PackageSdist]:
    return [*(package.wheels or ()), *([package.sdist] if package.sdist else [])]
