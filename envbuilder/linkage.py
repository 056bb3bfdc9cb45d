"""Whether a built extension module will load: each symbol that it leaves undefined must be defined somewhere.

The linker that made it does not ask (shared objects may have undefined symbols), so a module that was built
against another torch, or with parts of it missing, ends well and fails at its import. What the loader of a
process with torch in it would search is searched here, without loading anything.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.shared_object import SharedObject, SharedObjectError
from envbuilder.target import version_number

_LOADER_CACHE = Path("/etc/ld.so.cache")
_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER = struct.Struct("<20sII20x")
"""Magic, number of entries, bytes of strings. Offsets count from here."""
_CACHE_ENTRY = struct.Struct("<iIIIQ")
"""Flags, name, path, -, hardware capabilities."""
_SYSTEM_FOLDERS = (Path("/lib64"), Path("/usr/lib64"), Path("/lib"), Path("/usr/lib"))
_DRIVER = {"libcuda.so.1": "cu", "libnvidia-ml.so.1": "nvml"}
"""The NVIDIA driver's libraries, which a node without a GPU lacks, and what their symbols begin with."""
_FOR_ALL = "libtorch_global_deps.so"
"""torch opens it for the whole process (RTLD_GLOBAL): modules find what it needs without naming it."""
_RELATIVE_RELOCATIONS = ("GLIBC_ABI_DT_RELR", "2.36")
"""A version without a number, and the glibc that brought it."""
_SHOWN = 5
"""How many symbols `describe` names."""


@dataclass(frozen=True)
class Linkage:
    """What one extension module asks of the libraries that it will be loaded with."""

    needed: tuple[str, ...]
    """The libraries that it names (DT_NEEDED), in order."""
    missing: tuple[str, ...]
    """Those of `needed` that are nowhere."""
    unresolved: tuple[str, ...]
    """Symbols that nothing defines, sorted: its import fails."""
    lacking: tuple[str, ...]
    """Symbol versions that its libraries here are too old for, e.g. "GLIBC_2.38 of libc.so.6"."""
    driver: tuple[str, ...]
    """The driver's libraries that it needs and that are not here: their symbols are taken on trust."""
    glibc_needed: str | None
    """The oldest glibc that it can run with, e.g. "2.32"; None where it needs none."""
    libstdcxx_needed: str | None
    """The highest GLIBCXX version, e.g. "3.4.30"."""
    cxxabi_needed: str | None
    """The highest CXXABI version, e.g. "1.3.13"."""
    target_glibc: str
    """What the lock says of the machines that it is for, e.g. "2.28"."""

    @property
    def loads(self) -> bool:
        """Whether this machine's loader can load it."""
        return not (self.missing or self.unresolved or self.lacking)

    @property
    def newer_than_target(self) -> bool:
        """Whether it needs a newer glibc than the target's: it may run here, and not on every node."""
        return self.glibc_needed is not None and version_number(self.glibc_needed) > version_number(
            self.target_glibc
        )

    def describe(self) -> str:
        """What is wrong with it, one line each; empty where nothing is."""
        lines = [f"needs {name}, which is nowhere" for name in self.missing]
        lines += [f"needs {version}, which this machine has not" for version in self.lacking]
        if self.unresolved:
            shown = ", ".join(self.unresolved[:_SHOWN])
            more = f" and {len(self.unresolved) - _SHOWN} more" if len(self.unresolved) > _SHOWN else ""
            lines.append(f"needs symbols that nothing defines: {shown}{more}")
            if any(re.match(r"_ZNK?(3c10|2at|5torch|6caffe2)", name) for name in self.unresolved):
                lines.append(
                    "some are torch's: it was built with another torch's headers, or another C++ ABI"
                )
        if self.newer_than_target:
            lines.append(f"needs glibc {self.glibc_needed}; the lock's target has {self.target_glibc}")
        return "\n".join(lines)


def check_linkage(
    extension: Path, *, libraries: Sequence[Path], glibc: str, interpreter: Path | None = None
) -> Linkage:
    """How `extension` fits the libraries that it will be loaded with.

    Libraries are looked for in the folders `libraries` first (torch's, the CUDA packages', the toolkit's: an
    imported torch has loaded them by then; those of a job's LD_LIBRARY_PATH belong before them), then where
    RPATH and RUNPATH of the file and RPATH of the interpreter say ($ORIGIN is the folder in which
    `extension` lies), then where this machine's loader looks. A symbol counts as defined where any library
    that the extension needs, or that those need, has it, or `interpreter` with its libraries (None, or one
    that is a script: Python's own symbols are taken on trust). `glibc` is the target's, e.g. "2.28".

    Nothing is loaded or run. SharedObjectError where `extension`, or a library that it needs, is damaged.
    """
    module = SharedObject(extension)
    try:
        return _linkage(module, libraries, glibc, interpreter)
    except (struct.error, IndexError, KeyError) as error:
        raise SharedObjectError(f"{extension} or a library that it needs is damaged: {error}") from error


def _linkage(
    module: SharedObject, libraries: Sequence[Path], glibc: str, interpreter: Path | None
) -> Linkage:
    program = _program(interpreter, module.machine)
    finder = _Finder(libraries, module.machine, program)
    # The interpreter's own libraries are loaded first: they are then those of all.
    scope = [program, *_closure(program, finder)] if program else []
    scope += _closure(module, finder)
    if any((folder / _FOR_ALL).is_file() for folder in libraries) and (
        torch := finder.find(_FOR_ALL, module)
    ):
        scope += [torch, *_closure(torch, finder)]
    missing = [name for name in module.needed if finder.find(name, module) is None]
    driver = tuple(name for name in missing if name in _DRIVER)
    trusted = tuple(_DRIVER[name] for name in driver)
    unresolved = [
        symbol
        for symbol in module.undefined()
        if not any(library.defines(symbol) for library in scope)
        and not (program is None and re.match(r"_?Py[A-Z_]", symbol))
        and not any(re.match(rf"{prefix}[A-Z]", symbol) for prefix in trusted)
    ]
    needs = sorted(module.version_needs(), key=lambda need: (need.library, need.version))
    versions = [need.version for need in needs]
    return Linkage(
        needed=module.needed,
        missing=tuple(name for name in missing if name not in _DRIVER),
        unresolved=tuple(sorted(unresolved)),
        lacking=tuple(
            f"{need.version} of {need.library}"
            for need in needs
            if (library := finder.find(need.library, module)) and _lacks(library, need.version)
        ),
        driver=driver,
        glibc_needed=highest_version("GLIBC", versions),
        libstdcxx_needed=highest_version("GLIBCXX", versions),
        cxxabi_needed=highest_version("CXXABI", versions),
        target_glibc=glibc,
    )


def _lacks(library: SharedObject, version: str) -> bool:
    """The loader's own check: a library without any versions is taken as it is."""
    there = library.versions()
    return bool(there) and version not in there


def highest_version(prefix: str, versions: Sequence[str]) -> str | None:
    """The highest of those `versions` that begin with `prefix`, e.g. "3.4.30" of "GLIBCXX_3.4.30"."""
    name, since = _RELATIVE_RELOCATIONS
    found = [match[1] for version in versions if (match := re.fullmatch(rf"{prefix}_([\d.]+)", version))]
    if prefix == "GLIBC" and name in versions:
        found.append(since)
    return max(found, key=version_number, default=None)


def _program(interpreter: Path | None, machine: int) -> SharedObject | None:
    """The interpreter itself; None where it can't be read as a program, for example a wrapper script."""
    if interpreter is None:
        return None
    try:
        program = SharedObject(interpreter.resolve())
    except SharedObjectError:
        return None
    return program if program.machine == machine else None


def _closure(module: SharedObject, finder: _Finder) -> Iterator[SharedObject]:
    """The libraries that `module` needs, and those that they need, breadth first, as the loader does."""
    seen: set[str] = set()
    waiting = deque((name, module) for name in module.needed)
    while waiting:
        name, by = waiting.popleft()
        if name in seen:
            continue
        seen.add(name)
        if library := finder.find(name, by):
            yield library
            waiting.extend((other, library) for other in library.needed)


class _Finder:
    """Finds libraries by name, each once."""

    def __init__(self, folders: Sequence[Path], machine: int, program: SharedObject | None) -> None:
        self._folders = tuple(folders)
        self._machine = machine
        self._program = program
        self._known: dict[str, SharedObject] = {}
        self._cache: dict[str, list[Path]] | None = None

    def find(self, name: str, by: SharedObject) -> SharedObject | None:
        """The library `name` for the file `by`. One that was found is the answer for all, as in a process."""
        if name not in self._known:
            for path in self._places(name, by):
                try:
                    library = SharedObject(path)
                except SharedObjectError:
                    continue  # a linker script, or nothing at all
                if library.machine == self._machine:
                    self._known[name] = library
                    break
        return self._known.get(name)

    def _places(self, name: str, by: SharedObject) -> Iterator[Path]:
        yield from (folder / name for folder in self._folders)
        yield from (folder / name for folder in from_origin(by, by.rpath))
        if self._program is not None and not by.runpath:
            yield from (folder / name for folder in from_origin(self._program, self._program.rpath))
        yield from (folder / name for folder in from_origin(by, by.runpath))
        if self._cache is None:
            self._cache = loader_cache()
        yield from self._cache.get(name, ())
        yield from (folder / name for folder in _SYSTEM_FOLDERS)


def from_origin(file: SharedObject, folders: Sequence[str]) -> Iterator[Path]:
    """`folders`, as RPATH or RUNPATH of `file` has them, with the folder of `file` for $ORIGIN."""
    origin = str(file.path.resolve().parent)
    for folder in folders:
        yield Path(folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin))


def loader_cache() -> dict[str, list[Path]]:
    """Library name → where this machine's loader has it in its cache."""
    return read_loader_cache(_LOADER_CACHE)


def system_folders() -> tuple[Path, ...]:
    """Where the loader looks last."""
    return _SYSTEM_FOLDERS


def read_loader_cache(path: Path) -> dict[str, list[Path]]:
    """Library name → where the loader's cache (`ldconfig -p`) has it; empty where it can't be read."""
    try:
        data = path.read_bytes()
        data = data[data.index(_CACHE_MAGIC) :]  # an older table may come before it
        _, count, _ = _CACHE_HEADER.unpack_from(data)
        found: dict[str, list[Path]] = {}
        for number in range(count):
            _, name, value, _, _ = _CACHE_ENTRY.unpack_from(
                data, _CACHE_HEADER.size + number * _CACHE_ENTRY.size
            )
            texts = [data[at : data.index(b"\0", at)].decode() for at in (name, value)]
            found.setdefault(texts[0], []).append(Path(texts[1]))
    except (OSError, ValueError, struct.error):
        return {}
    return found
