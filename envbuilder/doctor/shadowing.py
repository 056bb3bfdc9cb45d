"""What folders of the shell's variables put before the env's libraries and modules. Nothing is loaded."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.linkage import read_loader_cache
from envbuilder.shared_object import SharedObject, SharedObjectError

_OWN = ("nvidia/*/lib/lib*.so*", "torch/lib/lib*.so*")
"""Where packages put the libraries that the loader finds by name."""
_CXX = "libstdc++.so.6"
_LOADER_CACHE = Path("/etc/ld.so.cache")
_PATHS = sysconfig.get_paths()
_STANDARD_LIBRARY = (Path(_PATHS["stdlib"]), Path(_PATHS["platstdlib"], "lib-dynload"))


@dataclass(frozen=True)
class Shadow:
    """A library that is taken in place of another one of its name."""

    path: Path
    hidden: Path
    faults: tuple[str, ...]
    """What the env's libraries ask of it that it lacks, in words."""


def folders_of(variable: str) -> list[Path]:
    """The folders in a variable such as LD_LIBRARY_PATH."""
    return [Path(word) for word in os.environ.get(variable, "").split(os.pathsep) if word]


def env_libraries(import_path: Iterable[Path]) -> dict[str, Path]:
    """File's name → path of the libraries of the CUDA packages and torch in these library folders."""
    found: dict[str, Path] = {}
    for folder in import_path:
        for pattern in _OWN:
            for path in sorted(folder.glob(pattern)):
                found.setdefault(path.name, path)
    return found


def shadowed_libraries(folders: Sequence[Path], own: Mapping[str, Path]) -> list[Shadow]:
    """The libraries in `folders` that the loader takes for others of `own` (and for the C++ library).

    The loader looks in LD_LIBRARY_PATH after RPATH and before RUNPATH (ld.so(8)). What a library with an
    RPATH needs is loaded from there, and is then everybody's: that is how torch's libraries are linked. So a
    name counts only if no such library asks for it.
    """
    first: dict[str, Path] = {}
    for folder in folders:
        with suppress(OSError):
            for name in sorted({*own, _CXX} & {entry.name for entry in os.scandir(folder)}):
                first.setdefault(name, folder / name)
    hidden = {name: own.get(name) or _system_library(name) for name in first}
    others = {
        name: path for name, path in first.items() if (there := hidden[name]) and not _is_same(path, there)
    }
    if not others:
        return []
    users = [library for path in own.values() if (library := _read(path))]
    settled = {name for library in users if library.rpath for name in library.needed} & own.keys()
    return list(_shadows({k: v for k, v in others.items() if k not in settled}, hidden, users))


def _shadows(
    others: Mapping[str, Path], hidden: Mapping[str, Path | None], users: Sequence[SharedObject]
) -> Iterator[Shadow]:
    for name, path in others.items():
        mine, theirs = hidden[name], _read(path)
        if mine is None:
            continue
        if theirs is None:  # the loader goes on to the next one
            continue
        asking = [library for library in users if name in library.needed]
        if name == _CXX:
            older = _versions(mine) - theirs.versions()
            if older:
                yield Shadow(path, mine, tuple(_missing_versions(theirs, asking)))
        elif asking:
            faults = (*_missing_versions(theirs, asking), *_missing_symbols(theirs, mine, asking))
            yield Shadow(path, mine, faults)


def _missing_versions(library: SharedObject, asking: Iterable[SharedObject]) -> Iterator[str]:
    there = library.versions()
    for one in asking:
        for need in one.version_needs():
            if need.library == library.path.name and there and need.version not in there:
                yield f"{one.path.name} needs {need.version}, which {library.path} lacks"


def _missing_symbols(library: SharedObject, own: Path, asking: Iterable[SharedObject]) -> Iterator[str]:
    """Symbols that the env's own library has, and the one in its place has not."""
    mine = _read(own)
    for one in asking if mine else ():
        for symbol in one.undefined():
            if mine and mine.defines(symbol) and not library.defines(symbol):
                yield f"{one.path.name} needs {symbol}, which {library.path} lacks"
                break


def _versions(path: Path) -> frozenset[str]:
    library = _read(path)
    return library.versions() if library else frozenset()


def _read(path: Path) -> SharedObject | None:
    try:
        return SharedObject(path)
    except SharedObjectError:
        return None


def _system_library(name: str) -> Path | None:
    return next(iter(read_loader_cache(_LOADER_CACHE).get(name, [])), None)


def _is_same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        return path.samefile(other)
    return False


def shadowed_modules(folders: Iterable[Path], site_packages: Iterable[Path]) -> dict[str, Path]:
    """Module's name → where, of those in `folders` that the standard library or `site_packages` have too."""
    known = set(sys.builtin_module_names)
    for library in (*_STANDARD_LIBRARY, *site_packages):
        known |= _modules(library).keys()
    shadows: dict[str, Path] = {}
    for folder in folders:
        for name, path in _modules(folder).items():
            if name in known:
                shadows.setdefault(name, path)
    return shadows


def _modules(folder: Path) -> dict[str, Path]:
    """What can be imported from `folder`: packages, modules and extension modules."""
    found: dict[str, Path] = {}
    with suppress(OSError):
        for path in folder.iterdir():
            name = path.name.split(".")[0]
            is_package = path.is_dir() and (path / "__init__.py").is_file()
            if name.isidentifier() and (is_package or path.suffix in (".py", ".so")):
                found[name] = path
    return found
