"""What lies in an interpreter's library folders, read as files: nothing is imported."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.utils import NormalizedName, canonicalize_name

from envbuilder.shared_object import SharedObject, SharedObjectError, VersionNeed


@dataclass(frozen=True, slots=True)
class Distribution:
    """An installed distribution."""

    name: NormalizedName
    version: str
    folder: Path
    """Its .dist-info (or .egg-info)."""


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """A line of a RECORD that carries a hash."""

    path: Path
    algorithm: str
    digest: str
    """URL-safe base64 without padding."""


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
            rows = [(path, *digest.split("=", 1)) for path, digest, _ in csv.reader(lines) if digest]
            return tuple(RecordedFile(base / path, algorithm, digest) for path, algorithm, digest in rows)
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


def has_changed(file: RecordedFile) -> bool:
    """Whether the bytes on disk are others than recorded; FileNotFoundError where there are none."""
    with file.path.open("rb") as stream:
        if file.algorithm not in hashlib.algorithms_guaranteed:
            return True
        digest = hashlib.file_digest(stream, file.algorithm).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.digest


@dataclass(frozen=True, slots=True)
class Binary:
    """What one shared object in a library folder asks of its surroundings."""

    path: Path
    needs: tuple[VersionNeed, ...]
    search_path: tuple[str, ...]
    """Its RPATH, or its RUNPATH."""


def read_binaries(folders: Iterable[Path]) -> tuple[Binary, ...]:
    """Every shared object below `folders` that this machine's loader could take; links are not followed."""
    files = (
        Path(folder, name)
        for top in folders
        for folder, _, names in os.walk(top)
        for name in names
        if name.endswith(".so") or ".so." in name
    )
    return tuple(binary for path in files if (binary := _binary(path)))


def _binary(path: Path) -> Binary | None:
    # Each is closed again: an env has more of them than a process may have open files.
    try:
        file = SharedObject(path)
        return Binary(path, tuple(file.version_needs()), file.rpath or file.runpath)
    except (SharedObjectError, struct.error, IndexError, KeyError):
        return None


@dataclass(frozen=True, slots=True)
class InstalledTorch:
    """A torch, as far as its files tell: `machine.TorchBuild` is what an imported one tells."""

    version: str
    """Local version included, e.g. "2.11.0+cu130"."""
    cuda: str | None
    """The CUDA release that it is built with, e.g. "13.0"; None for a CPU build."""


def read_torch(folders: Iterable[Path]) -> InstalledTorch | None:
    """The torch in `folders`, from its version.py: so a torch that can't be imported is known too."""
    for folder in folders:
        file = folder / "torch" / "version.py"
        if file.is_file():
            constants = dict(_constants(file.read_text(encoding="utf-8")))
            cuda = constants.get("cuda")
            return InstalledTorch(str(constants["__version__"]), None if cuda is None else str(cuda))
    return None


def _constants(source: str) -> Iterator[tuple[str, object]]:
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        if isinstance(value, ast.Constant):
            yield from ((target.id, value.value) for target in targets if isinstance(target, ast.Name))
