"""What an sdist says about itself, read without running any of its code and without unpacking it.

Order of belief for its requirements: those given by the caller (the recipe); PKG-INFO, if it has
Requires-Dist or PEP 643 says that it would; `*.egg-info/requires.txt`. Never setup.py.
"""

from __future__ import annotations

import re
import tarfile
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.errors import InputError

_MEMBERS = 200_000
"""Most members that an sdist may have."""
_UNPACKED = 4 << 30
"""Most bytes that its members may add up to."""
_TEXT = 4 << 20
"""Most bytes of a metadata file."""
# PEP 517: what builds a project without a pyproject.toml, or with one that names no requirements.
_LEGACY_BUILD_REQUIRES = ("setuptools", "wheel")


@dataclass(frozen=True, slots=True)
class SdistMetadata:
    """The static metadata of one sdist."""

    name: str
    """Normalised."""
    version: str
    requires: tuple[str, ...]
    """PEP 508 requirements at run time; those of extras carry the extra in their marker."""
    build_requires: tuple[str, ...]
    """`build-system.requires` of pyproject.toml."""
    source: str
    """Where `requires` is from: "recipe", "PKG-INFO", or the path of the egg-info's requires.txt."""
    note: str | None
    """Why `requires` may not be the whole truth."""


def read_metadata(path: Path, *, requires: Sequence[str] | None = None) -> SdistMetadata:
    """Metadata of the sdist (.tar.gz) at `path`; `requires` overrides what it says it needs.

    InputError where the archive is not a sound sdist, or nothing in it says what it needs.
    """
    texts = _read_texts(path)
    if "PKG-INFO" not in texts:
        raise _unsound(path, "it has no PKG-INFO")
    metadata, _ = parse_email(texts["PKG-INFO"])
    if "name" not in metadata or "version" not in metadata:
        raise _unsound(path, "its PKG-INFO has no name or no version")
    name = canonicalize_name(metadata["name"])
    found = _requires(metadata, texts) if requires is None else (tuple(requires), "recipe", None)
    if found is None:
        raise InputError(
            f"Nothing in {path.name} says what {name} requires, and its setup.py is never run.",
            remedy=f'Add to the recipe under [build.{name}]: requires = ["…"], or requires = [] if nothing.',
            context={"file": path, "read": ", ".join(sorted(texts))},
        )
    build_requires = _build_requires(path, texts.get("pyproject.toml"))
    for text in (*found[0], *build_requires):
        _check(path, name, text)
    return SdistMetadata(name, metadata["version"], found[0], build_requires, found[1], found[2])


def _requires(metadata: RawMetadata, texts: dict[str, str]) -> tuple[tuple[str, ...], str, str | None] | None:
    dynamic = "requires-dist" in {field.lower() for field in metadata.get("dynamic", [])}
    stated = tuple(metadata.get("requires_dist", []))
    if stated:
        note = "PKG-INFO says that its Requires-Dist may change when it is built" if dynamic else None
        return stated, "PKG-INFO", note
    # PEP 643: from metadata 2.2 on, a field that is neither there nor dynamic is empty for certain.
    if not dynamic and Version(metadata.get("metadata_version", "1.0")) >= Version("2.2"):
        return (), "PKG-INFO", None
    for path in sorted(texts):
        if path.endswith("requires.txt"):
            note = f"PKG-INFO has no Requires-Dist; taken from {path}, which its author's machine wrote"
            return tuple(_egg_requirements(texts[path])), path, note
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


def _build_requires(path: Path, text: str | None) -> tuple[str, ...]:
    try:
        build_system = tomllib.loads(text or "").get("build-system", {})
    except tomllib.TOMLDecodeError as error:
        raise _unsound(path, f"its pyproject.toml is not TOML: {error}") from error
    requires = build_system.get("requires", _LEGACY_BUILD_REQUIRES)
    if not isinstance(requires, list | tuple) or not all(isinstance(item, str) for item in requires):
        raise _unsound(path, "build-system.requires in its pyproject.toml is not a list of texts")
    return tuple(requires)


def _check(path: Path, name: str, text: str) -> None:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise _unsound(path, f"its requirement {text!r} is not one of PEP 508") from error
    if requirement.url is not None:
        raise InputError(
            f"{path.name} requires {requirement.name} by a URL, which no lock can name.",
            remedy=f'Write its requirements without URLs into the recipe: [build.{name}] requires = ["…"].',
            context={"file": path, "requirement": text},
        )


def _read_texts(path: Path) -> dict[str, str]:
    """The metadata files of the archive by their path below its top folder."""
    texts: dict[str, str] = {}
    unpacked = 0
    try:
        with tarfile.open(path, mode="r|gz") as archive:
            for count, member in enumerate(archive):
                unpacked += member.size
                if count >= _MEMBERS or unpacked > _UNPACKED:
                    raise _unsound(path, "it is far too large")
                inner = member.name.removeprefix("./").partition("/")[2]
                if not re.fullmatch(
                    r"PKG-INFO|pyproject\.toml|(?:src/)?[^/]+\.egg-info/requires\.txt", inner
                ):
                    continue
                if inner in texts or not member.isfile() or member.size > _TEXT:
                    raise _unsound(path, f"{member.name} in it is doubled, no plain file, or too large")
                reader = archive.extractfile(member)
                assert reader is not None  # a plain file has one
                texts[inner] = reader.read().decode("utf-8")
    except (tarfile.TarError, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
        raise _unsound(path, error) from error
    return texts


def _unsound(path: Path, why: object) -> InputError:
    return InputError(
        f"{path.name} is not an sdist that can be read: {why}.",
        remedy="Pick another version of the package in the recipe.",
        context={"file": path},
    )
