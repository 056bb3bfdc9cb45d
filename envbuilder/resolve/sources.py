"""The packages that a recipe compiles: which sdist or git tree, and what it says of itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidSdistFilename, canonicalize_name, parse_sdist_filename
from packaging.version import Version

from envbuilder.bundle import hash_file
from envbuilder.download import download
from envbuilder.errors import InputError
from envbuilder.git import open_tree, source_filename
from envbuilder.index import Index, IndexFile
from envbuilder.lock import LockedFile, LockedTree
from envbuilder.recipe import GitSource, Recipe
from envbuilder.report import Reporter
from envbuilder.sdist import SdistMetadata, read_metadata
from envbuilder.target import python_versions, serves


@dataclass(frozen=True)
class Source:
    """A package of the recipe's [build]: its sdist or packed tree, and what that says."""

    file: LockedFile
    metadata: SdistMetadata
    tree: LockedTree | None
    """What `file` is packed from, if that is git."""


def read_source(
    recipe: Recipe,
    name: str,
    *,
    index: Index,
    client: httpx.Client,
    cache: Path,
    kept: str | None = None,
    reporter: Reporter,
) -> Source:
    """Source package `name`: its git commit, else the newest sdist that the requirements of `recipe` admit.

    kept: the version to stay with, where the requirements still admit it.
    cache: a folder that may be deleted at any time.

    InputError where there is none, or it doesn't say what it is and requires; none of its code is run.
    """
    git = recipe.build[name].git
    if git is None:
        source = _from_index(recipe, name, index=index, client=client, kept=kept, reporter=reporter)
    else:
        source = _from_git(recipe, name, git, cache=cache, reporter=reporter)
    if source.metadata.note:
        reporter.note(f"{source.file.filename}: {source.metadata.note}.")
    return source


def _from_index(
    recipe: Recipe, name: str, *, index: Index, client: httpx.Client, kept: str | None, reporter: Reporter
) -> Source:
    reporter.stage(f"reading the sdist of {name}")
    file = index.complete(_chosen_sdist(recipe, name, index, kept))
    assert file.sha256 is not None  # `complete` has seen to both
    assert file.size is not None
    with tempfile.TemporaryDirectory(prefix="envbuilder-sdist-") as folder:
        path = Path(folder) / file.filename
        download(client, file.url, sha256=file.sha256, size=file.size, part=path, on_bytes=lambda _: None)
        metadata = read_metadata(path, requires=recipe.build[name].requires)
    if (metadata.name, Version(metadata.version)) != parse_sdist_filename(file.filename):
        raise InputError(
            f"{file.filename} calls itself {metadata.name} {metadata.version}.",
            remedy=f"Pick another version of {name} in recipes/{recipe.name}.toml.",
            context={"file": file.filename},
        )
    locked = LockedFile(
        name, metadata.version, file.filename, file.size, file.sha256, index.name, is_sdist=True
    )
    return Source(locked, metadata, None)


def _from_git(recipe: Recipe, name: str, git: GitSource, *, cache: Path, reporter: Reporter) -> Source:
    reporter.stage(f"fetching the commit {git.commit[:12]} of {name}")
    build = recipe.build[name]
    with open_tree(name, git, scratch=cache) as tree, tempfile.TemporaryDirectory(dir=cache) as folder:
        # What its folder in the archive is called depends on the version, which only its files may tell.
        short = git.commit[:12]
        unnamed = Path(folder) / source_filename(name, short)
        tree.pack(unnamed, name=name, version=short)
        metadata = read_metadata(unnamed, requires=build.requires, name=name, version=build.version)
        packed = Path(folder) / source_filename(name, metadata.version)
        tree.pack(packed, name=name, version=metadata.version)
        size, sha256 = packed.stat().st_size, hash_file(packed)
    _check_git(recipe, name, metadata)
    file = LockedFile(name, metadata.version, packed.name, size, sha256, None, is_sdist=True)
    return Source(file, metadata, tree.locked)


def _check_git(recipe: Recipe, name: str, metadata: SdistMetadata) -> None:
    """InputError where the commit is of another package, or of a version that the recipe rules out."""
    wanted = _wanted(recipe, name)
    if metadata.name != name or not wanted.contains(metadata.version, prereleases=True):
        raise InputError(
            f"The commit of {name} is {metadata.name} {metadata.version}, not {name}{wanted}.",
            remedy=f"Name another commit under [build.{name}.git] in recipes/{recipe.name}.toml, "
            f"or change the requirement {name}.",
            context={"expected": f"{name}{wanted}", "got": f"{metadata.name} {metadata.version}"},
        )


def _chosen_sdist(recipe: Recipe, name: str, index: Index, kept: str | None) -> IndexFile:
    """That of version `kept` if it is admitted, else the newest."""
    offered = offered_sdists(recipe, name, index)
    return offered.get(str(kept)) or next(iter(offered.values()))


def offered_sdists(recipe: Recipe, name: str, index: Index) -> dict[str, IndexFile]:
    """The sdists of source package `name` that the requirements of `recipe` admit, by version, newest first.

    InputError where there is none.
    """
    wanted = _wanted(recipe, name)
    files = {(version, ending): file for file in index.files(name) for version, ending in _sdist(file, name)}
    sdists = {version: file for (version, ending), file in files.items() if ending == ".tar.gz"}
    # A yanked version counts only where it is asked for by its number (PEP 592).
    pinned = any(specifier.operator in ("==", "===") for specifier in wanted)
    admitted = wanted.filter(
        version
        for version, file in sdists.items()
        if (pinned or not file.yanked) and _serves_all_pythons(recipe, file)
    )
    newest_first = sorted(admitted, reverse=True)
    if not newest_first:
        zipped = sorted(wanted.filter({version for version, ending in files if ending == ".zip"}))
        raise InputError(
            f"The index {index.name} has no sdist (.tar.gz) of {name}{wanted} for all Pythons of the recipe"
            + (f", and the .zip of {', '.join(map(str, zipped))} is of no use here." if zipped else "."),
            remedy=f"Change the requirement {name} in recipes/{recipe.name}.toml, or delete [build.{name}].",
            context={
                "package": name,
                "python": recipe.target.python,
                "sdists": ", ".join(map(str, sorted(sdists))) or "none",
            },
        )
    return {str(version): sdists[version] for version in newest_first}


def _wanted(recipe: Recipe, name: str) -> SpecifierSet:
    """What the recipe's requirements say of the version of `name`."""
    wanted = SpecifierSet()
    for text in recipe.requirements:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == name:
            wanted &= requirement.specifier
    return wanted


def _sdist(file: IndexFile, name: str) -> list[tuple[Version, str]]:
    """Version and ending, if `file` is an sdist of `name`."""
    try:
        found, version = parse_sdist_filename(file.filename)
    except InvalidSdistFilename:
        return []
    return [(version, ".zip" if file.filename.endswith(".zip") else ".tar.gz")] if found == name else []


def _serves_all_pythons(recipe: Recipe, file: IndexFile) -> bool:
    return all(serves(file.requires_python, python) for python in python_versions(recipe.target))
