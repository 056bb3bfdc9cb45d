"""The packages that a recipe compiles: which sdist, and what it says of itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidSdistFilename, canonicalize_name, parse_sdist_filename
from packaging.version import Version

from envbuilder.download import download
from envbuilder.errors import InputError
from envbuilder.index import Index, IndexFile
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.sdist import SdistMetadata, read_metadata
from envbuilder.target import admits, python_versions


@dataclass(frozen=True, slots=True)
class Source:
    """A package of the recipe's [build]: its sdist, and what that says."""

    file: IndexFile
    metadata: SdistMetadata


def read_source(
    recipe: Recipe, name: str, *, index: Index, client: httpx.Client, reporter: Reporter
) -> Source:
    """Source package `name`: the newest sdist that the requirements of `recipe` admit.

    InputError where there is none, or it doesn't say what it requires; none of its code is run.
    """
    reporter.stage(f"reading the sdist of {name}")
    file = index.complete(_newest_sdist(recipe, name, index))
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
    if metadata.note:
        reporter.note(f"{file.filename}: {metadata.note}.")
    return Source(file, metadata)


def _newest_sdist(recipe: Recipe, name: str, index: Index) -> IndexFile:
    wanted = SpecifierSet()
    for text in recipe.requirements:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == name:
            wanted &= requirement.specifier
    sdists = {version: file for file in index.files(name) if (version := _sdist_version(file, name))}
    # A yanked version counts only where it is asked for by its number (PEP 592).
    pinned = any(specifier.operator in ("==", "===") for specifier in wanted)
    admitted = wanted.filter(
        version
        for version, file in sdists.items()
        if (pinned or not file.yanked) and _serves_all_pythons(recipe, file)
    )
    newest = max(admitted, default=None)
    if newest is None:
        raise InputError(
            f"The index {index.name} has no sdist (.tar.gz) of {name}{wanted} for all Pythons of the recipe.",
            remedy=f"Change the requirement {name} in recipes/{recipe.name}.toml, or delete [build.{name}].",
            context={
                "package": name,
                "python": recipe.target.python,
                "sdists": ", ".join(map(str, sorted(sdists))) or "none",
            },
        )
    return sdists[newest]


def _sdist_version(file: IndexFile, name: str) -> Version | None:
    try:
        found, version = parse_sdist_filename(file.filename)
    except InvalidSdistFilename:
        return None
    return version if found == name and file.filename.endswith(".tar.gz") else None


def _serves_all_pythons(recipe: Recipe, file: IndexFile) -> bool:
    wanted = SpecifierSet(file.requires_python or "")
    return all(admits(wanted, python) for python in python_versions(recipe.target))
