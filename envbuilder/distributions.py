"""The distributions installed in library folders, and how they differ from what was meant to be there.

Read as files: nothing is imported.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.utils import NormalizedName, canonicalize_name

from envbuilder.bundle import hash_open
from envbuilder.model import EnvReceipt, ProvidedPackages
from envbuilder.venv import PROVIDED_PTH, site_packages

_RUN_AT_START = ("sitecustomize.py", "usercustomize.py")
_OWN_FILES = ("pyvenv.cfg", "pylock.toml", "bin/python", "bin/activate")
"""Of an env's files, those that no package brings and no env does without."""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution."""

    name: NormalizedName
    version: str
    folder: Path
    """Its .dist-info (or .egg-info)."""


@dataclass(frozen=True)
class RecordedFile:
    """A line of a RECORD that carries a hash."""

    path: Path
    algorithm: str
    digest: str
    """URL-safe base64 without padding."""
    size: int | None
    """Bytes, where the RECORD says."""


def read_distributions(folders: Iterable[Path]) -> tuple[Distribution, ...]:
    """Every distribution in `folders`, in their order; one that is there twice is listed twice."""
    return tuple(
        _distribution(entry)
        for folder in folders
        for pattern in ("*.dist-info", "*.egg-info")
        for entry in sorted(folder.glob(pattern))
    )


def _distribution(folder: Path) -> Distribution:
    try:
        text = next(file for file in _metadata_files(folder) if file.is_file()).read_text(encoding="utf-8")
    except (StopIteration, OSError, UnicodeDecodeError):
        text = ""  # damaged: the folder's own name tells whose it was
    metadata = HeaderParser().parsestr(text)
    name, _, version = folder.stem.partition("-")
    return Distribution(canonicalize_name(metadata["Name"] or name), metadata["Version"] or version, folder)


def _metadata_files(folder: Path) -> tuple[Path, ...]:
    # An .egg-info may be a file itself.
    return (folder / "METADATA", folder / "PKG-INFO", folder)


def recorded_files(distribution: Distribution) -> tuple[RecordedFile, ...]:
    """The files of `distribution` with their hashes, by its RECORD (PyPA: recording installed projects).

    The RECORD itself and compiled .pyc files carry no hash. Raises FileNotFoundError where there is no
    RECORD, and ValueError where it is damaged.
    """
    base = distribution.folder.parent
    with (distribution.folder / "RECORD").open(newline="", encoding="utf-8") as lines:
        try:
            rows = [(path, *digest.split("=", 1), size) for path, digest, size in csv.reader(lines) if digest]
            return tuple(
                RecordedFile(base / path, algorithm, digest, int(size) if size.isdigit() else None)
                for path, algorithm, digest, size in rows
            )
        except csv.Error as error:
            raise ValueError(str(error)) from error


def owned_paths(distribution: Distribution) -> Iterator[str]:
    """Absolute paths of all files that the RECORD of `distribution` lists; none where it can't be read."""
    base = str(distribution.folder.parent)
    record = distribution.folder / "RECORD"
    with suppress(OSError, ValueError, csv.Error), record.open(newline="", encoding="utf-8") as lines:
        for path, *_ in csv.reader(lines):
            # Joined as text: a Path for each of ten thousands of files takes seconds.
            yield os.path.normpath(f"{base}/{path}")


def gone_files(env: Path, receipt: EnvReceipt) -> tuple[str, ...]:
    """What `install` had put into the venv `env` by its `receipt` and is not there any more: paths of files,
    and names of packages that left nothing. Folders are listed, and no file is looked at."""
    minor = ".".join(receipt.python.split(".")[:2])
    found = read_distributions([site_packages(env, minor)])
    names = {distribution.name for distribution in found}
    gone = [package.name for package in receipt.packages if canonicalize_name(package.name) not in names]
    wanted = {str(env / path) for path in _OWN_FILES}
    wanted.update(str(distribution.folder / "RECORD") for distribution in found)
    for distribution in found:
        wanted.update(owned_paths(distribution))
    there: dict[str, frozenset[str]] = {}
    for path in sorted(wanted):
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = _listed(folder)
        if name not in there[folder]:
            gone.append(path)
    return tuple(gone)


def _listed(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except FileNotFoundError:
        return frozenset()


def has_changed(file: RecordedFile) -> bool:
    """Whether the bytes on disk are others than recorded; FileNotFoundError where there are none."""
    with file.path.open("rb") as stream:
        if file.algorithm not in hashlib.algorithms_guaranteed:
            return True
        digest = bytes.fromhex(hash_open(stream, algorithm=file.algorithm))
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.digest


def differences(wanted: Mapping[NormalizedName, str], found: tuple[Distribution, ...]) -> Iterator[str]:
    """How the distributions `found` differ from `wanted` (name → version), each begun with its name."""
    count = Counter(distribution.name for distribution in found)
    for name in sorted(wanted.keys() - count.keys()):
        yield f"{name} {wanted[name]} is missing"
    for distribution in found:
        name, version = distribution.name, distribution.version
        if name not in wanted:
            yield f"{name} {version} is not in the lock ({distribution.folder})"
        elif count[name] > 1:
            yield f"{name} {version} is installed {count[name]} times ({distribution.folder})"
        elif version != wanted[name]:
            yield f"{name} is {version} and not {wanted[name]} ({distribution.folder})"


def provided_differences(provided: ProvidedPackages | None, site_packages: Iterable[Path]) -> Iterator[str]:
    """How what the machine provides to the env with these library folders differs from its receipt."""
    if provided is None:
        return
    found = read_distributions(map(Path, provided.site_packages))
    # Reversed, so that of two the one that is imported counts.
    versions: dict[str, str] = {distribution.name: distribution.version for distribution in reversed(found)}
    for name, version in provided.versions.items():
        if versions.get(name) != version:
            yield f"{name} {version} of {provided.python} is now {versions.get(name, 'missing')}"
    if not any(_reaches(folder, provided) for folder in site_packages):
        yield f"{PROVIDED_PTH}, which makes the machine's packages visible, is missing or changed"


def _reaches(folder: Path, provided: ProvidedPackages) -> bool:
    pth = folder / PROVIDED_PTH
    return pth.is_file() and set(provided.site_packages) <= set(pth.read_text(encoding="utf-8").splitlines())


def runs_at_start(path: Path, site_packages: tuple[Path, ...]) -> bool:
    """Whether Python's `site` module reads it: lines of .pth files extend the import path, or are run."""
    return path.parent in site_packages and (path.suffix == ".pth" or path.name in _RUN_AT_START)
