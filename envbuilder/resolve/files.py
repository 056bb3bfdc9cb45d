"""The files of a lock: for each package those that some Python of the target takes, with hash and size."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from packaging.tags import Tag, create_compatible_tags_selector
from packaging.utils import BuildTag, InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from envbuilder.budget import budget
from envbuilder.errors import InputError
from envbuilder.index import DEFAULT_INDEX, Index, IndexFile, license_of
from envbuilder.lock import Group, LockedFile, LockedPatch
from envbuilder.lock_text import LockEntry
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.resolve.kept import Resolution
from envbuilder.resolve.sources import Source
from envbuilder.target import Target, python_versions, serves, target_for

_MOST_AT_ONCE = 16
"""Packages whose files are asked for at the same time."""


def choose_files(
    recipe: Recipe,
    resolution: Resolution,
    sources: Mapping[str, Source],
    *,
    indexes: Mapping[str, Index],
    reporter: Reporter,
    patches: Mapping[str, tuple[LockedPatch, ...]] | None = None,
) -> tuple[LockEntry, ...]:
    """The packages of `resolution` with their files: a source package's sdist, else wheels.

    `patches`: package → those that are applied to its source. InputError where a package has no wheel for a
    Python that needs it.
    """
    needs = _needs(resolution)
    reporter.stage(f"choosing the files of {len(needs)} packages")
    targets = {python: target_for(recipe.target, python) for python in python_versions(recipe.target)}

    def entry(key: tuple[str, str]) -> LockEntry:
        name = key[0]
        if name in sources:
            return _source_entry(recipe, key, needs[key], sources[name], (patches or {}).get(name, ()))
        pythons = sorted(set().union(*needs[key].values()), key=Version)
        index = indexes[recipe.index.get(name, DEFAULT_INDEX)]
        return _wheel_entry(recipe, key, needs[key], index, [targets[python] for python in pythons])

    entries = []
    with ThreadPoolExecutor(budget().at_once(_MOST_AT_ONCE)) as pool:
        for done, found in enumerate(pool.map(entry, sorted(needs)), start=1):
            entries.append(found)
            reporter.progress("index", done, len(needs), "files")
    if nameless := [found.name for found in entries if "license" not in found.table]:
        reporter.note(f"No licence is named by the metadata of {', '.join(nameless)}.")
    return tuple(entries)


def _needs(resolution: Resolution) -> dict[tuple[str, str], dict[Group, frozenset[str]]]:
    """(Package, version) → group → the Pythons on which the group needs it."""
    needs: dict[tuple[str, str], dict[Group, frozenset[str]]] = {}
    for group, pythons in resolution.items():
        for python, versions in pythons.items():
            for item in versions.items():
                groups = needs.setdefault(item, {})
                groups[group] = groups.get(group, frozenset()) | {python}
    return needs


def _wheel_entry(
    recipe: Recipe,
    key: tuple[str, str],
    needed: Mapping[Group, frozenset[str]],
    index: Index,
    targets: list[Target],
) -> LockEntry:
    wheels = _wheels(recipe, index, *key, targets)
    license_ = license_of(index, wheels[0])
    table = {"index": index.name} | ({"license": license_} if license_ else {})
    return LockEntry(*key, needed, tuple(_locked(key, wheel, index.name) for wheel in wheels), table)


def _wheels(recipe: Recipe, index: Index, name: str, version: str, targets: list[Target]) -> list[IndexFile]:
    """The wheels that installers on `targets` would choose, in the order of their names."""
    wheels = [wheel for file in index.files(name) if (wheel := _wheel(file, version))]
    # A file that is yanked by itself gives way to the others; a yanked release was asked for (PEP 592).
    wheels = [wheel for wheel in wheels if not wheel.file.yanked] or wheels
    # Of equal tags the highest build number (PEP 427): the selector keeps the order that it is given.
    wheels.sort(key=lambda wheel: wheel.build, reverse=True)
    chosen = {}
    for target in targets:
        candidates = [(w.file, w.tags) for w in wheels if serves(w.file.requires_python, target.python)]
        best = next(create_compatible_tags_selector(target.tags)(candidates), None)
        if best is None:
            offered = " ".join(sorted({str(tag) for wheel in wheels for tag in wheel.tags}))
            raise InputError(
                f"{name} {version} has no wheel for Python {target.python} on the target of {recipe.name}: "
                f"the target takes {target.tags[0]} and older, the wheels are {offered or 'none'}.",
                remedy=f"Require another version in recipes/{recipe.name}.toml, or add [build.{name}].",
                context={
                    "package": f"{name} {version}",
                    "index": index.name,
                    "target": f"{target.tags[0]} and older",
                    "wheels": ", ".join(wheel.file.filename for wheel in wheels) or "none",
                },
            )
        chosen[best.filename] = best
    return [index.complete(chosen[filename]) for filename in sorted(chosen)]


@dataclass(frozen=True)
class _Wheel:
    file: IndexFile
    build: BuildTag
    tags: frozenset[Tag]


def _wheel(file: IndexFile, version: str) -> _Wheel | None:
    """`file` if it is a wheel of `version`."""
    try:
        _, found, build, tags = parse_wheel_filename(file.filename)
    except InvalidWheelFilename:
        return None
    return _Wheel(file, build, tags) if found == Version(version) else None


def _source_entry(
    recipe: Recipe,
    key: tuple[str, str],
    needed: Mapping[Group, frozenset[str]],
    source: Source,
    patches: tuple[LockedPatch, ...],
) -> LockEntry:
    metadata = source.metadata
    origin: dict[str, Any] = {"index": source.file.index}
    if source.tree is not None:
        origin = {"git": {"commit": source.tree.commit, "submodules": dict(source.tree.submodules)}}
    optional = {"license": metadata.license, "patches": [asdict(patch) for patch in patches]}
    build_requires = [*metadata.build_requires, *recipe.build[key[0]].build_requires]
    table = {
        **origin,
        "metadata-source": metadata.source,
        "requires": list(metadata.requires),
        "build-requires": list(dict.fromkeys(build_requires)),
        **{option: value for option, value in optional.items() if value},
    }
    return LockEntry(*key, needed, (source.file,), table)


def _locked(key: tuple[str, str], wheel: IndexFile, index: str) -> LockedFile:
    assert wheel.sha256 is not None  # `Index.complete` has seen to both
    assert wheel.size is not None
    return LockedFile(*key, wheel.filename, wheel.size, wheel.sha256, index, is_sdist=False)
