"""The text of a source lock. Pure; `lock.parse_lock` is the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tomli_w
from packaging.markers import Marker
from packaging.pylock import Package, PackageSdist, PackageWheel, Pylock
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.lock import FILES, GROUPS, SCHEMA, Group, LockedFile, LockedModel
from envbuilder.recipe import Recipe
from envbuilder.target import python_versions


@dataclass(frozen=True)
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


def compose_lock(
    recipe: Recipe,
    *,
    digest: str,
    resolver: str,
    entries: Sequence[LockEntry],
    models: Sequence[LockedModel] = (),
) -> str:
    """The text of the lock of `recipe`; `digest` is its recipe_digest, `resolver` who chose the versions.

    A recipe that was narrowed to a probed machine carries that machine as its target.
    """
    pythons = python_versions(recipe.target)
    machine = f"sys_platform == 'linux' and platform_machine == '{recipe.target.machine}'"
    after_newest = f"3.{int(pythons[-1].split('.')[1]) + 1}"
    return pylock_text(
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
                    "models": [_model_table(model) for model in models],
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


def pylock_text(pylock: Pylock) -> str:
    """The TOML text of a lock; the same lock gives the same text."""
    pylock.validate()
    return tomli_w.dumps(_plain(pylock.to_dict()))


def _plain(value: Any) -> Any:
    """`value` with the mapping and sequence types that tomli_w takes."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _model_table(model: LockedModel) -> dict[str, Any]:
    table = {
        "name": model.name,
        "repo": model.repo,
        "commit": model.commit,
        "remote-code": list(model.remote_code),
        "files": [asdict(file) for file in model.files],
        "license": model.license,
    }
    return {key: value for key, value in table.items() if value is not None}
