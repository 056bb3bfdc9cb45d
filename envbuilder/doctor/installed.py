"""What lies in an interpreter's library folders, read as files: nothing is imported."""

from __future__ import annotations

import ast
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from envbuilder.shared_object import SharedObject, SharedObjectError, VersionNeed


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
