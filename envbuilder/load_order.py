"""Which file a process loads under each library's name, in the order in which the loader comes to them.

The rules are those of ld.so(8): DT_RPATH of the file that needs a library, and of those that had it loaded;
LD_LIBRARY_PATH; DT_RUNPATH of the file; the loader's cache; the system's folders. The first file under a name
(or DT_SONAME) is the answer for all that need it later; only what is opened by its path comes in beside it.
Nothing is loaded here.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.linkage import from_origin, loader_cache, system_folders
from envbuilder.shared_object import SharedObject, SharedObjectError


@dataclass(frozen=True)
class Loaded:
    """One file in the process."""

    name: str
    """As others ask for it."""
    file: SharedObject
    through: str
    """How it was found, e.g. "LD_LIBRARY_PATH", "RPATH of libtorch_cuda.so"."""
    by: Loaded | None
    """What needed it; None for the program."""

    @property
    def path(self) -> Path:
        return self.file.path


def load_order(
    modules: Iterable[Path],
    *,
    interpreter: Path,
    library_path: str = "",
    preload: str = "",
) -> tuple[Loaded, ...]:
    """What `interpreter` loads that opens `modules`, one after the other.

    `library_path` and `preload` are LD_LIBRARY_PATH and LD_PRELOAD. What can't be found, or is no shared
    object, is left out, as are the program's own libraries where `interpreter` is a script.
    """
    process = _Process(_folders(library_path))
    process.start(interpreter, [name for name in re.split(r"[ :]+", preload) if name])
    for module in modules:
        process.open(module)
    return tuple(process.loaded)


def library_folders(library_path: str) -> tuple[Path, ...]:
    """The folders of an LD_LIBRARY_PATH, in its order."""
    return tuple(dict.fromkeys(_folders(library_path)))


def _folders(library_path: str) -> list[Path]:
    # The loader takes an empty entry for the working folder.
    return [Path(part).absolute() for part in re.split("[:;]", library_path)] if library_path else []


class _Process:
    def __init__(self, library_path: Sequence[Path]) -> None:
        self._library_path = library_path
        self._cache = loader_cache()
        self._program: Loaded | None = None
        self._names: set[str] = set()
        self._files: set[Path] = set()
        self.loaded: list[Loaded] = []

    def start(self, interpreter: Path, preload: Sequence[str]) -> None:
        try:
            file = SharedObject(interpreter.resolve())
        except SharedObjectError:
            return
        self._program = self._add(Loaded(interpreter.name, file, "the program", None))
        # Those of LD_PRELOAD come before all that the program needs.
        before = [library for name in preload if (library := self._find(name, self._program, "LD_PRELOAD"))]
        self._load_needed([self._program, *map(self._add, before)])

    def open(self, path: Path) -> None:
        """As dlopen of a path; the program is what had it loaded."""
        try:
            file = SharedObject(path)
        except SharedObjectError:
            return
        if path.resolve() not in self._files:
            self._load_needed([self._add(Loaded(path.name, file, "its path", self._program))])

    def _add(self, library: Loaded) -> Loaded:
        self._names |= {library.name, library.file.soname or library.name}
        if library.path.resolve() not in self._files:
            self._files.add(library.path.resolve())
            self.loaded.append(library)
        return library

    def _load_needed(self, files: list[Loaded]) -> None:
        waiting = deque((name, file) for file in files for name in file.file.needed)
        while waiting:
            name, by = waiting.popleft()
            if name not in self._names and (library := self._find(name, by)):
                self._add(library)
                waiting.extend((other, library) for other in library.file.needed)

    def _find(self, name: str, by: Loaded, through: str | None = None) -> Loaded | None:
        for path, how in self._places(name, by):
            try:
                file = SharedObject(path)
            except SharedObjectError:
                continue
            if file.machine == by.file.machine:
                return Loaded(path.name, file, through or how, by)
        return None

    def _places(self, name: str, by: Loaded) -> Iterator[tuple[Path, str]]:
        if "/" in name:
            yield Path(name), f"its path in {by.path.name}"
            return
        if not by.file.runpath:
            for user in _with_ancestors(by):
                for folder in from_origin(user.file, user.file.rpath):
                    yield folder / name, f"RPATH of {user.path.name}"
        for folder in self._library_path:
            yield folder / name, "LD_LIBRARY_PATH"
        for folder in from_origin(by.file, by.file.runpath):
            yield folder / name, f"RUNPATH of {by.path.name}"
        for path in self._cache.get(name, ()):
            yield path, "the loader's cache"
        for folder in system_folders():
            yield folder / name, "a system folder"


def _with_ancestors(file: Loaded) -> Iterator[Loaded]:
    user: Loaded | None = file
    while user is not None:
        yield user
        user = user.by
