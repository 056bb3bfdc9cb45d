"""Git as a source: packs the tree of one commit, submodules and all, into an archive that is always the same.

Nothing is checked out and nothing of the repository runs: no hook, no filter, no smudging of large files. The
files are read as they are kept, out of a bare repository that is thrown away. Of the user's git configuration
only how to reach a server is taken, credential helpers and ssh included (`git_connection`), as of pip's.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from envbuilder.archive import LARGEST, MOST_FILES
from envbuilder.atomic import make_folder, new_file, scratch_folder
from envbuilder.errors import InputError, IntegrityError
from envbuilder.git_repository import Blobs, Repository, TreeEntry, open_repository
from envbuilder.lock import LockedTree
from envbuilder.recipe import GitSource
from envbuilder.source_archive import SourceArchive, source_archive

_DEEPEST = 10
"""Submodules within submodules."""
_LFS_POINTER = re.compile(
    rb"version \S+/spec/v\d+\n(?:ext-[^\n]*\n)*oid sha256:[0-9a-f]{64}\nsize \d+\n?", re.ASCII
)
_LARGEST_POINTER = 1024


def source_filename(name: str, version: str) -> str:
    """The archive's file name, that of an sdist (PEP 625)."""
    return f"{_stem(name, version)}.tar.gz"


def url_variable(package: str) -> str:
    """The variable whose URL stands in for the recipe's."""
    return f"ENVBUILDER_GIT_{package.upper().replace('-', '_')}_URL"


def pack_tree(
    package: str,
    git: GitSource,
    *,
    name: str,
    version: str,
    destination: Path,
    tree: LockedTree | None,
) -> LockedTree:
    """Packs the commit of `git` into the .tar.gz `destination`, its files below `name`-`version`/.

    The same commit gives the same bytes on every machine. Given `tree`, the submodules must be the locked
    ones. `package` is the recipe's name for it: ENVBUILDER_GIT_<PACKAGE>_URL stands in for the URL.

    Raises NetworkError where the repository can't be reached, InputError where it has no such commit or the
    tree can't be packed, IntegrityError where a submodule is not as locked, MismatchError without git.
    """
    with open_tree(package, git, scratch=destination.parent, tree=tree) as found:
        found.pack(destination, name=name, version=version)
        return found.locked


@contextmanager
def open_tree(
    package: str, git: GitSource, *, scratch: Path, tree: LockedTree | None = None
) -> Iterator[SourceTree]:
    """The tree of `git`'s commit, fetched into a folder below `scratch` that goes with the block.

    Raises what `pack_tree` raises.
    """
    make_folder(scratch)
    with scratch_folder(scratch, ".git-") as folder:
        url = os.environ.get(url_variable(package)) or git.url
        repository = open_repository(folder, package, url, variable=url_variable(package))
        yield SourceTree(repository, package, git, tree)


class SourceTree:
    """The files of one commit and of its submodules."""

    def __init__(
        self, repository: Repository, package: str, git: GitSource, locked: LockedTree | None
    ) -> None:
        self._repository = repository
        self._package = package
        self._subdirectory = git.subdirectory
        self._expected = locked
        self._entries: dict[str, TreeEntry] = {}
        self._submodules: dict[str, str] = {}
        if locked is not None and locked.commit != git.commit:
            raise self._not_as_locked("the commit", locked.commit, git.commit)
        self._collect(repository.url, git.commit, "", 0)
        if locked is not None and dict(locked.submodules) != self._submodules:
            raise self._not_as_locked("its submodules", _listed(locked.submodules), _listed(self._submodules))
        self.locked = LockedTree(git.commit, dict(sorted(self._submodules.items())))

    def pack(self, destination: Path, *, name: str, version: str) -> None:
        """Writes the archive; InputError where the tree has what no archive may hold."""
        base = f"{self._subdirectory}/" if self._subdirectory else ""
        chosen = {path: entry for path, entry in self._entries.items() if path.startswith(base)}
        if not chosen:
            raise self._refusal(f"there is no folder {self._subdirectory!r} in it")
        size = sum(entry.size for entry in chosen.values())
        if size > LARGEST or len(chosen) > MOST_FILES:
            raise self._refusal(
                f"{len(chosen):,} files of {size:,} bytes are more than {MOST_FILES:,} of {LARGEST:,}"
            )
        pointers: list[str] = []
        with (
            new_file(destination, size=size) as file,
            source_archive(file, _stem(name, version)) as archive,
            self._repository.blobs() as blobs,
        ):
            # By the bytes of the path: the same everywhere, unlike a sorting by letters.
            for path in sorted(chosen, key=lambda path: path.encode(errors="surrogateescape")):
                if self._add(archive, blobs, path, path.removeprefix(base), base):
                    pointers.append(path)
            if pointers:
                raise self._refusal(
                    f"{len(pointers)} of its files are only pointers to Git LFS: {', '.join(pointers[:10])}",
                    remedy=f"Take an sdist of {self._package} that holds them, or a subdirectory without.",
                )

    def _add(self, archive: SourceArchive, blobs: Blobs, path: str, inner: str, base: str) -> bool:
        """Adds one file or link; whether it is a pointer to Git LFS, in place of a file."""
        entry = self._entries[path]
        if entry.is_link:
            target = blobs.read(entry).decode(errors="surrogateescape")
            place = self._place(path, target)
            if place.startswith(base):
                archive.add_link(inner, target)
                return False
            # A link to a file beside the subdirectory: in the archive there is only its content.
            entry = self._entries.get(place, entry)
            if entry.is_link:
                raise self._refusal(f"the link {path} leads out of {self._subdirectory}")
        if entry.size <= _LARGEST_POINTER:
            content = blobs.read(entry)
            archive.add_file(inner, entry.size, io.BytesIO(content), executable=entry.is_executable)
            return _LFS_POINTER.fullmatch(content) is not None
        with blobs.open(entry) as stream:
            archive.add_file(inner, entry.size, stream, executable=entry.is_executable)
        return False

    def _place(self, path: str, target: str) -> str:
        """The path in the tree that the link `path` leads to."""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        is_there = place in self._entries or any(other.startswith(f"{place}/") for other in self._entries)
        if target.startswith("/") or not is_there or f"{path}/".startswith(f"{place}/"):
            raise self._refusal(f"the link {path} leads to {target!r}, which is no file or folder of it")
        return place

    def _collect(self, url: str, commit: str, prefix: str, depth: int) -> None:
        """Takes up the files of `commit` at `prefix`, and those of its submodules."""
        if depth > _DEEPEST:
            raise self._refusal(f"its submodules are nested deeper than {_DEEPEST}")
        self._repository.fetch(url, commit, prefix.rstrip("/"))
        links = {}
        modules: TreeEntry | None = None
        for name, entry in self._repository.entries(commit):
            path = f"{prefix}{name}"
            if any(part in ("", ".", "..") or part.lower() == ".git" for part in name.split("/")):
                raise self._refusal(f"it has a file {path!r}")
            if entry.is_submodule:
                links[path] = entry.object
            else:
                self._entries[path] = entry
            if name == ".gitmodules" and not entry.is_link:
                modules = entry
        if needed := {path: found for path, found in links.items() if self._is_needed(path)}:
            urls = self._repository.submodule_urls(modules, url) if modules else {}
            for path, found in sorted(needed.items()):
                if path.removeprefix(prefix) not in urls:
                    raise self._refusal(f"its .gitmodules doesn't say where the submodule {path} is from")
                if self._expected is not None and self._expected.submodules.get(path) != found:
                    expected = self._expected.submodules.get(path, "none")
                    raise self._not_as_locked(f"the submodule {path}", expected, found)
                self._submodules[path] = found
                self._collect(urls[path.removeprefix(prefix)], found, f"{path}/", depth + 1)

    def _is_needed(self, path: str) -> bool:
        wanted = f"{self._subdirectory}/" if self._subdirectory else ""
        return f"{path}/".startswith(wanted) or wanted.startswith(f"{path}/")

    def _refusal(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(
            f"The git source of {self._package} can't be packed: {why}.",
            remedy=remedy or f"Name another commit or subdirectory under [build.{self._package}.git].",
            context={"package": self._package, "url": self._repository.url},
        )

    def _not_as_locked(self, what: str, expected: str, got: str) -> IntegrityError:
        return IntegrityError(
            f"The git source of {self._package} is not as locked: {what} differs.",
            remedy="Lock the recipe again: envbuilder lock RECIPE",
            context={"package": self._package, "expected": expected, "got": got},
        )


def _stem(name: str, version: str) -> str:
    return f"{name.replace('-', '_')}-{version}"


def _listed(submodules: Mapping[str, str]) -> str:
    return ", ".join(f"{path} {commit}" for path, commit in sorted(submodules.items())) or "none"
