"""Talks to the program git: a bare repository of our own, into which commits are fetched and read."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from envbuilder.errors import InputError, NetworkError
from envbuilder.git_connection import (
    Connection,
    absolute_url,
    connect,
    is_fetchable,
    last_words,
    program,
    without_credentials,
)

_SILENCE_S = 120.0
"""Seconds without any word from a fetch, which reports its progress, after which it is ended."""
_SETTINGS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "fetch.recurseSubmodules": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.ext.allow": "never",
}


@dataclass(frozen=True)
class TreeEntry:
    """One file, link or submodule of a tree."""

    mode: str
    """As git writes it, e.g. "100644"."""
    object: str
    """Hash of its content, or the submodule's commit."""
    size: int
    """Bytes; 0 for a submodule."""

    @property
    def is_link(self) -> bool:
        return self.mode == "120000"

    @property
    def is_submodule(self) -> bool:
        return self.mode == "160000"

    @property
    def is_executable(self) -> bool:
        return self.mode == "100755"


def open_repository(folder: Path, package: str, url: str, *, variable: str) -> Repository:
    """A new bare repository in the private folder `folder`, to fetch from `url` for `package`.

    Raises what `git_connection.connect` raises, and MismatchError without git.
    """
    connection = connect(folder, package, url, variable=variable)
    repository = Repository(package, connection, folder, variable)
    repository.ask("init", "--quiet", "--bare", "--template=")
    return repository


class Repository:
    """A bare repository that git fetches into; see `open_repository`."""

    def __init__(self, package: str, connection: Connection, folder: Path, variable: str) -> None:
        self.url = connection.url
        """Without credentials."""
        self._package = package
        self._folder = folder
        self._environment = connection.environment
        self._variable = variable

    def ask(self, *arguments: str) -> bytes:
        """What git prints; InputError with its own words where it fails."""
        with program():
            done = subprocess.run(
                self._command(arguments),
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        if done.returncode != 0:
            raise InputError(
                f"git can't read the source of {self._package}.",
                remedy=f"Check the commit under [build.{self._package}.git], and git's own words above it.",
                context={"command": f"git {arguments[0]}", "git": last_words(done.stderr)},
            )
        return done.stdout

    def fetch(self, url: str, commit: str, path: str) -> None:
        """Fetches `commit` from `url`, alone where the server gives it, else with all branches and tags.

        `path` is the submodule's, else empty. NetworkError where `url` can't be reached or says nothing for
        too long, InputError where it has no such commit.
        """
        what = f"the submodule {path} of {self._package}" if path else self._package
        if not is_fetchable(url) or (url.startswith("file:") and not self.url.startswith("file:")):
            raise InputError(
                f"{what.capitalize()} is from a place that envbuilder doesn't fetch from.",
                remedy=f"Name another commit under [build.{self._package}.git].",
                context={"url": without_credentials(url)},
            )
        # A server may refuse a commit that is no branch's, and a static one knows no shallow fetch.
        refspecs = ("+refs/heads/*:refs/fetched/heads/*", "+refs/tags/*:refs/fetched/tags/*")
        for arguments in (["--depth=1", url, commit], [url, *refspecs]):
            returncode, output = self._listen(["fetch", "--progress", "--no-tags", *arguments], what, url)
            if returncode == 0:
                break
        else:
            raise self._network_error(what, url, "can't be fetched", output)
        if self._type_of(commit) != "commit":
            raise InputError(
                f"The repository of {what} has no commit {commit} in its branches and tags.",
                remedy=f"Check the commit under [build.{self._package}.git]; "
                f"if a mirror is behind: export {self._variable}=URL of another.",
                context={"url": without_credentials(url), "commit": commit},
            )

    def entries(self, commit: str) -> Iterator[tuple[str, TreeEntry]]:
        """Path and entry of each file, link and submodule of `commit`."""
        for line in self.ask("ls-tree", "-r", "-z", "--long", "--full-tree", commit).split(b"\0")[:-1]:
            facts, _, name = line.partition(b"\t")
            mode, _, digest, size = facts.decode("ascii").split()
            path = name.decode("utf-8", errors="surrogateescape")
            yield path, TreeEntry(mode, digest, int(size) if size.isdigit() else 0)

    def submodule_urls(self, modules: TreeEntry, parent: str) -> dict[str, str]:
        """Path → URL, as the file .gitmodules says; `parent` is what relative URLs are relative to."""
        listing = self.ask("config", "--blob", modules.object, "--null", "--list").decode("utf-8", "replace")
        found: dict[str, dict[str, str]] = {}
        for item in listing.split("\0")[:-1]:
            key, _, value = item.partition("\n")
            section, _, name = key.rpartition(".")
            found.setdefault(section, {})[name] = value
        return {
            table["path"].rstrip("/"): absolute_url(parent, table["url"])
            for table in found.values()
            if {"path", "url"} <= table.keys()
        }

    @contextmanager
    def blobs(self) -> Iterator[Blobs]:
        """A reader of files' contents, one after the other."""
        with (
            program(),
            subprocess.Popen(
                self._command(["cat-file", "--batch"]),
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield Blobs(process.stdin, process.stdout)
            finally:
                process.kill()

    def _type_of(self, commit: str) -> str:
        try:
            return self.ask("cat-file", "-t", commit).decode().strip()
        except InputError:
            return "missing"

    def _command(self, arguments: Sequence[str]) -> list[str]:
        # On the command line too: an old git doesn't know GIT_CONFIG_GLOBAL, and reads the user's file.
        settings = [word for item in _SETTINGS.items() for word in ("-c", "=".join(item))]
        return ["git", *settings, *arguments]

    def _listen(self, arguments: Sequence[str], what: str, url: str) -> tuple[int, bytes]:
        """Runs git and ends it when it has said nothing for too long; its exit status and last output."""
        output = b""
        with (
            program(),
            subprocess.Popen(
                self._command(arguments),
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # With what it starts, it can be ended whole.
                start_new_session=True,
            ) as process,
            selectors.DefaultSelector() as selector,
        ):
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ)
            try:
                while True:
                    if not selector.select(_SILENCE_S):
                        reason = f"said nothing for {_SILENCE_S:.0f} seconds"
                        raise self._network_error(what, url, reason, output)
                    if not (chunk := os.read(process.stdout.fileno(), 1 << 16)):
                        break
                    output = (output + chunk)[-(1 << 16) :]
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, output

    def _network_error(self, what: str, url: str, reason: str, output: bytes) -> NetworkError:
        return NetworkError(
            f"The git repository of {what} {reason}.",
            remedy=f"Check with: git ls-remote URL; another one for {self._package}: "
            f"export {self._variable}=URL",
            context={"url": without_credentials(url), "git": last_words(output)},
        )


class Blobs:
    """Contents by their hashes, from a running `git cat-file --batch`."""

    def __init__(self, asking: IO[bytes], answers: IO[bytes]) -> None:
        self._asking = asking
        self._answers = answers

    def read(self, entry: TreeEntry) -> bytes:
        """The whole content; for small files."""
        with self.open(entry) as stream:
            return stream.read(entry.size)

    @contextmanager
    def open(self, entry: TreeEntry) -> Iterator[BinaryIO]:
        """A stream whose next `entry.size` bytes are the content: the block must read them all."""
        self._asking.write(f"{entry.object}\n".encode())
        self._asking.flush()
        answer = self._answers.readline().decode().split()
        # fetch has checked that the tree is whole, and ls-tree has told the size.
        assert answer == [entry.object, "blob", str(entry.size)], answer
        yield self._answers  # type: ignore[misc]
        self._answers.read(1)
