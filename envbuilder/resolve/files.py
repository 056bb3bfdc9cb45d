"""The files of a lock: for each package those that some Python of the target takes, with hash and size."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packaging.tags import Tag, create_compatible_tags_selector
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from envbuilder.errors import InputError
from envbuilder.index import DEFAULT_INDEX, Index, IndexFile
from envbuilder.lock import Group, LockedFile, LockEntry
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.resolve.groups import Resolution
from envbuilder.resolve.sources import Source
from envbuilder.target import Target, python_versions, target_for

_CONNECTIONS = 16


def choose_files(
    recipe: Recipe,
    resolution: Resolution,
    sources: Mapping[str, Source],
    *,
    indexes: Mapping[str, Index],
    reporter: Reporter,
) -> tuple[LockEntry, ...]:
    """The packages of `resolution` with their files: a source package's sdist, else wheels.

    InputError where a package has no wheel for a Python that needs it.
    """
    needs = _needs(resolution)
    names = sorted({name for name, _ in needs if name not in sources})
    reporter.stage(f"choosing the files of {len(needs)} packages")
    targets = {python: target_for(recipe.target, python) for python in python_versions(recipe.target)}

    def index_of(name: str) -> Index:
        return indexes[recipe.index.get(name, DEFAULT_INDEX)]

    def entry(key: tuple[str, str]) -> LockEntry:
        name, version = key
        index = index_of(name)
        if name in sources:
            files, table = [sources[name].file], _source_table(recipe, name, sources[name])
        else:
            pythons = sorted(set().union(*needs[key].values()), key=Version)
            files, table = _wheels(recipe, index, name, version, [targets[python] for python in pythons]), {}
        locked = tuple(_locked(index, name, version, file) for file in files)
        return LockEntry(name, version, needs[key], locked, {"index": index.name, **table})

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for done, _ in enumerate(pool.map(lambda name: index_of(name).files(name), names), start=1):
            reporter.progress("index", done, len(names), "files")
        return tuple(pool.map(entry, sorted(needs)))


def _needs(resolution: Resolution) -> dict[tuple[str, str], dict[Group, frozenset[str]]]:
    """(Package, version) → group → the Pythons on which the group needs it."""
    needs: dict[tuple[str, str], dict[Group, frozenset[str]]] = {}
    for group, pythons in resolution.items():
        for python, versions in pythons.items():
            for item in versions.items():
                groups = needs.setdefault(item, {})
                groups[group] = groups.get(group, frozenset()) | {python}
    return needs


def _wheels(recipe: Recipe, index: Index, name: str, version: str, targets: list[Target]) -> list[IndexFile]:
    """The wheels that installers on `targets` would choose, in the order of their names."""
    candidates = [(file, tags) for file in index.files(name) if (tags := _tags_of(file, version)) is not None]
    chosen = {}
    for target in targets:
        best = next(create_compatible_tags_selector(target.tags)(candidates), None)
        if best is None:
            raise InputError(
                f"{name} {version} has no wheel for Python {target.python} on the target of {recipe.name}.",
                remedy=f"Require another version in recipes/{recipe.name}.toml, or add [build.{name}].",
                context={
                    "package": f"{name} {version}",
                    "tags": f"{target.tags[0]} and older",
                    "wheels": ", ".join(file.filename for file, _ in candidates) or "none",
                },
            )
        chosen[best.filename] = best
    return [index.complete(chosen[filename]) for filename in sorted(chosen)]


def _tags_of(file: IndexFile, version: str) -> frozenset[Tag] | None:
    """The tags of `file` if it is a wheel of `version`."""
    try:
        _, found, _, tags = parse_wheel_filename(file.filename)
    except InvalidWheelFilename:
        return None
    return tags if found == Version(version) else None


def _source_table(recipe: Recipe, name: str, source: Source) -> dict[str, Any]:
    """What [packages.tool.envbuilder] says of a source package, beside its index."""
    return {
        "metadata-source": source.metadata.source,
        "requires": list(source.metadata.requires),
        "build-requires": list(
            dict.fromkeys([*source.metadata.build_requires, *recipe.build[name].build_requires])
        ),
    }


def _locked(index: Index, name: str, version: str, file: IndexFile) -> LockedFile:
    assert file.sha256 is not None  # `Index.complete` has seen to both
    assert file.size is not None
    return LockedFile(
        package=name,
        version=version,
        filename=file.filename,
        size=file.size,
        sha256=file.sha256,
        index=index.name,
        is_sdist=file.filename.endswith(".tar.gz"),
    )
