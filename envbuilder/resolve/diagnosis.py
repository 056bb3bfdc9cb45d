"""What an index has that a target can't take: why a resolver found no solution, or no newer version.

A resolver is shown wheels only, so of a package with just an sdist, or with wheels for a newer glibc alone,
it says no more than that nothing is usable. Here the index is asked for what leads to the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from envbuilder.errors import InputError, NetworkError
from envbuilder.index import Index, IndexFile
from envbuilder.recipe import Recipe
from envbuilder.resolve.protocol import NoSolution
from envbuilder.target import serves, target_for

_NEWEST_GLIBC = 50
_SHOWN = 3
"""Most packages that one error explains."""


@dataclass(frozen=True)
class _Release:
    """One version of a package on an index."""

    wheels: tuple[frozenset[Tag], ...]
    """Their tags; without those that the index says are for other Pythons."""
    has_sdist: bool


@dataclass(frozen=True)
class _Cause:
    """Why a version of a package can't be taken, and what to do."""

    version: Version
    what: str
    remedy: str
    is_newest: bool
    """Whether that version is the newest of all."""


def explained(error: NoSolution, recipe: Recipe, python: str, index_of: Callable[[str], Index]) -> InputError:
    """`error` with the packages that the recipe `recipe` could have on `python` by another way than a wheel.

    `index_of` gives the index of a package by its normalised name.
    """
    causes: dict[str, _Cause] = {}
    for text in error.wheelless:
        try:
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            cause = _cause(recipe, python, index_of(name), name, requirement.specifier)
        except (InvalidRequirement, NetworkError):
            continue  # The resolver's own words must do.
        if cause and (name not in causes or cause.version > causes[name].version):
            causes[name] = cause
    # A package whose newest version is fine was come upon by the resolver on its way back to old ones.
    worst = [cause for cause in causes.values() if cause.is_newest] or list(causes.values())
    remedies = [cause.remedy for cause in worst[:_SHOWN]] or [
        f"[build.{package.name}] takes {package.versions[0]}, the newest sdist that the recipe admits: "
        f"require the version of {package.name} that fits in recipes/{recipe.name}.toml."
        for package in error.known
        if package.name in recipe.build and re.search(rf"(?<![\w.-]){package.name}(?![\w-])", error.said)
    ]
    if not remedies:
        return error
    message, context = error.message, dict(error.context)
    if worst:
        context["no wheel"] = "; ".join(cause.what for cause in worst[:_SHOWN])
        message = f"{message.removesuffix('.')}: {context['no wheel']}."
    return InputError(message, remedy=" ".join(dict.fromkeys(remedies)), context=context)


def releases_above(
    files: Iterable[IndexFile], wanted: SpecifierSet, least: str, python: str
) -> list[Version]:
    """The releases in `files` that `wanted` admits, newer than `least` and for `python`; oldest first."""
    newer = [version for version in _releases(files, python) if version > Version(least)]
    return sorted(version for version in wanted.filter(newer) if not version.is_prerelease)


def _cause(recipe: Recipe, python: str, index: Index, name: str, wanted: SpecifierSet) -> _Cause | None:
    releases = _releases(index.files(name), python)
    lacking = [version for version, release in releases.items() if not _fits(release, recipe, python)]
    version = max(wanted.filter(lacking), default=None)
    if version is None or name in recipe.build:
        return None
    release, file = releases[version], f"recipes/{recipe.name}.toml"
    build = f"Add [build.{name}] to {file}, so that it is compiled from its sdist."
    if glibc := _least_glibc(release, recipe, python):
        what = f"{name} {version} has wheels for glibc {glibc} and newer alone"
        remedy = f'If all machines have it (ldd --version), write glibc = "{glibc}" under [target] in {file}.'
    elif release.has_sdist and not release.wheels:
        what, remedy = f"{name} {version} is on the index {index.name} as an sdist alone", build
    else:
        what = f"{name} {version} has no wheel for Python {python} on {recipe.target.machine}"
        remedy = (
            build if release.has_sdist else f"Require versions in {file} that do without {name} {version}."
        )
    return _Cause(version, what, remedy, version == max(releases))


def _releases(files: Iterable[IndexFile], python: str) -> dict[Version, _Release]:
    """The releases in `files` that are not yanked (PEP 592), each with what is for minor version `python`."""
    wheels: dict[Version, list[frozenset[Tag]]] = {}
    sdists: set[Version] = set()
    for file in files:
        if file.yanked or not serves(file.requires_python, python):
            continue
        try:
            if file.filename.endswith(".whl"):
                _, version, _, tags = parse_wheel_filename(file.filename)
                wheels.setdefault(version, []).append(tags)
            elif file.filename.endswith(".tar.gz"):
                sdists.add(parse_sdist_filename(file.filename)[1])
        except (InvalidWheelFilename, InvalidSdistFilename):
            continue
    return {
        version: _Release(tuple(wheels.get(version, ())), version in sdists) for version in {*wheels, *sdists}
    }


def _fits(release: _Release, recipe: Recipe, python: str) -> bool:
    tags = frozenset(target_for(recipe.target, python).tags)
    return any(wheel & tags for wheel in release.wheels)


def _least_glibc(release: _Release, recipe: Recipe, python: str) -> str | None:
    """The oldest glibc, newer than the target's, that a wheel of `release` asks for."""
    for minor in range(int(recipe.target.glibc.split(".")[1]) + 1, _NEWEST_GLIBC):
        spec = recipe.target.model_copy(update={"glibc": f"2.{minor}"})
        if _fits(release, recipe.model_copy(update={"target": spec}), python):
            return f"2.{minor}"
    return None
