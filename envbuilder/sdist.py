"""What a source archive says about itself, read without running any of its code and without unpacking it.

Order of belief for its requirements: those given by the caller (the recipe); PKG-INFO, if it has
Requires-Dist or PEP 643 says that it would; beside a PKG-INFO, `*.egg-info/requires.txt`, which
setuptools leaves out where nothing is required; the static
`[project]` table of pyproject.toml (PEP 621), which is all that a tree from git has. Never setup.py: only its
text is looked at, for the requirements of the build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from envbuilder.archive import archive_members, unsound
from envbuilder.errors import InputError
from envbuilder.licenses import license_in
from envbuilder.project_files import StaticProject, read_pyproject, setup_requires

_TEXT = 4 << 20
"""Most bytes of a metadata file."""
_FILES = re.compile(r"PKG-INFO|pyproject\.toml|setup\.py|(?:src/)?[^/]+\.egg-info/(?:requires\.txt|PKG-INFO)")


@dataclass(frozen=True)
class SdistMetadata:
    """The static metadata of one source archive."""

    name: str
    """Normalised."""
    version: str
    requires: tuple[str, ...]
    """PEP 508 requirements at run time; those of extras carry the extra in their marker."""
    build_requires: tuple[str, ...]
    """`build-system.requires` of pyproject.toml, and the setup_requires that a setup.py writes out."""
    license: str | None
    """SPDX expression, else the name that it is given, else what the licence classifiers say."""
    source: str
    """Where `requires` is from: "recipe", "PKG-INFO", "pyproject.toml", or a path in the egg-info."""
    note: str | None
    """Why `requires` or `build_requires` may not be the whole truth."""


@dataclass(frozen=True)
class _Stated:
    """Requirements, and where they are from."""

    requires: tuple[str, ...]
    source: str
    note: str | None = None


def read_metadata(
    path: Path,
    *,
    requires: Sequence[str] | None = None,
    name: str | None = None,
    version: str | None = None,
) -> SdistMetadata:
    """Metadata of the source archive (.tar.gz) at `path`; `requires` overrides what it says it needs.

    `name` and `version` are for a tree from git, which may state neither.

    InputError where the archive is not sound, contradicts `version`, or leaves open what it is or needs.
    """
    files = _read_files(path)
    metadata = _pkg_info(path, files)
    try:
        project, build_requires = read_pyproject(_text(path, files, "pyproject.toml"))
    except ValueError as error:
        raise unsound(path, f"its pyproject.toml is wrong: {error}") from error
    stated_name = metadata["name"] if metadata else project.name if project else name
    if stated_name is None:
        raise unsound(path, "it has no PKG-INFO, and its pyproject.toml no [project] table")
    found_name = canonicalize_name(stated_name)
    stated_version = metadata["version"] if metadata else project.version if project else None
    found_version = _version(path, found_name, stated_version, version)
    if requires is not None:
        stated: _Stated | None = _Stated(tuple(requires), "recipe")
    else:
        stated = _requires(path, files, metadata, project)
    if stated is None:
        raise InputError(
            f"Nothing in {path.name} says what {found_name} requires, and its setup.py is never run.",
            remedy=f'Add to the recipe under [build.{found_name}]: requires = ["…"], '
            "or requires = [] if nothing.",
            context={"file": path, "read": ", ".join(sorted(files)) or "nothing"},
        )
    from_setup = setup_requires(files["setup.py"]) if "setup.py" in files else ()
    unclear = "the setup_requires of its setup.py can't be read" if from_setup is None else None
    build_requires = tuple(dict.fromkeys([*build_requires, *(from_setup or ())]))
    for text in (*stated.requires, *build_requires):
        _check(path, found_name, text)
    return SdistMetadata(
        name=found_name,
        version=found_version,
        requires=stated.requires,
        build_requires=build_requires,
        license=_license(metadata, project),
        source=stated.source,
        note="; ".join(filter(None, [stated.note, unclear])) or None,
    )


def _pkg_info(path: Path, files: Mapping[str, bytes]) -> RawMetadata | None:
    if "PKG-INFO" not in files:
        return None
    metadata, _ = parse_email(_text(path, files, "PKG-INFO"))
    if "name" not in metadata or "version" not in metadata:
        raise unsound(path, "its PKG-INFO has no name or no version")
    return metadata


def _version(path: Path, name: str, stated: str | None, given: str | None) -> str:
    try:
        found = str(Version(stated)) if stated is not None else None
    except InvalidVersion as error:
        raise unsound(path, error) from error
    if found is None and given is None:
        raise InputError(
            f"Nothing in the source of {name} states its version.",
            remedy=f'Add to the recipe under [build.{name}]: version = "…"',
            context={"file": path},
        )
    if found is not None and given is not None and Version(found) != Version(given):
        raise InputError(
            f"The source of {name} calls itself version {found}, not {given}.",
            remedy=f"Delete version under [build.{name}] of the recipe.",
            context={"file": path, "expected": given, "got": found},
        )
    return found or str(given)


def _requires(
    path: Path, files: Mapping[str, bytes], metadata: RawMetadata | None, project: StaticProject | None
) -> _Stated | None:
    if metadata is not None and (stated := _from_pkg_info(path, files, metadata)):
        return stated
    if project is None or project.requires is None:
        return None
    note = "the requirements of its extras are dynamic and not known" if project.dynamic_extras else None
    return _Stated(project.requires, "pyproject.toml", note)


def _from_pkg_info(path: Path, files: Mapping[str, bytes], metadata: RawMetadata) -> _Stated | None:
    dynamic = "requires-dist" in {field.lower() for field in metadata.get("dynamic", [])}
    stated = tuple(metadata.get("requires_dist", []))
    if stated:
        note = "PKG-INFO says that its Requires-Dist may change when it is built" if dynamic else None
        return _Stated(stated, "PKG-INFO", note)
    try:
        metadata_version = Version(metadata.get("metadata_version", "1.0"))
    except InvalidVersion as error:
        raise unsound(path, error) from error
    # PEP 643: from metadata 2.2 on, a field that is neither there nor dynamic is empty for certain.
    if not dynamic and metadata_version >= Version("2.2"):
        return _Stated((), "PKG-INFO")
    for inner in sorted(files):
        if inner.endswith("requires.txt"):
            note = f"PKG-INFO has no Requires-Dist; taken from {inner}, which its author's machine wrote"
            return _Stated(tuple(_egg_requirements(_text(path, files, inner))), inner, note)
    for inner in sorted(files):
        # The command that wrote this file would have written a requires.txt beside it.
        if inner.endswith(".egg-info/PKG-INFO"):
            return _Stated((), inner, f"neither PKG-INFO nor {inner.rpartition('/')[0]} names a requirement")
    return None


def _egg_requirements(text: str) -> list[str]:
    """setuptools' requires.txt, whose sections are [extra:marker], as PEP 508 requirements."""
    requirements = []
    conditions: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            extra, _, marker = line.strip("[]").partition(":")
            conditions = [f'extra == "{extra}"'] if extra else []
            conditions += [f"({marker})"] if marker else []
        elif line and not line.startswith("#"):
            requirements.append(f"{line} ; {' and '.join(conditions)}" if conditions else line)
    return requirements


def _license(metadata: RawMetadata | None, project: StaticProject | None) -> str | None:
    if metadata is not None:
        return license_in(metadata)
    return project.license if project else None


def _check(path: Path, name: str, text: str) -> None:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise unsound(path, f"its requirement {text!r} is not one of PEP 508") from error
    if requirement.url is not None:
        raise InputError(
            f"{path.name} requires {requirement.name} by a URL, which no lock can name.",
            remedy=f'Write its requirements without URLs into the recipe: [build.{name}] requires = ["…"].',
            context={"file": path, "requirement": text},
        )


def _read_files(path: Path) -> dict[str, bytes]:
    """The metadata files of the archive by their path below its top folder."""
    files: dict[str, bytes] = {}
    with archive_members(path) as members:
        for member in members:
            if not _FILES.fullmatch(member.path):
                continue
            if member.path in files or not member.is_file or member.size > _TEXT:
                raise unsound(path, f"{member.path} in it is doubled, no plain file, or too large")
            files[member.path] = member.read()
    return files


def _text(path: Path, files: Mapping[str, bytes], inner: str) -> str:
    try:
        return files.get(inner, b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise unsound(path, f"{inner} in it is not UTF-8: {error}") from error
