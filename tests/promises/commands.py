"""envbuilder's command line in processes of its own, in a folder with none of the machine's settings."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from envbuilder import cli
from envbuilder.paths import Root

# Forked from a process that has imported everything: a test can start, and kill, dozens of them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", __name__])

OPENED_A_SOCKET = 99
"""Exit code of a command that was started with `no_sockets`, and opened one."""
Before = Callable[[], object]
"""What a process does before its command; a function of a module, or a partial of one."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        """What it printed for machines: its outcome, or its error."""
        told: dict[str, Any] = json.loads(self.out)
        return told

    @property
    def context(self) -> dict[str, str]:
        """The facts of its error."""
        context: dict[str, str] = self.told["context"]
        return context


@dataclass(frozen=True)
class Running:
    """A command on its way."""

    process: ForkServerProcess
    outcome: Path

    def wait(self) -> Ended:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return Ended(code, (self.outcome / "out").read_text(), (self.outcome / "err").read_text())

    def kill(self) -> Ended:
        self.process.kill()
        return self.wait()


@dataclass(frozen=True)
class Workplace:
    """A folder with recipes and locks, where the command is typed."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment, beside those that every command gets."""

    @property
    def root(self) -> Root:
        return Root(self.folder / ".envbuilder")

    def recipe(self, name: str) -> Path:
        return self.folder / "recipes" / f"{name}.toml"

    def lock(self, name: str) -> Path:
        return self.folder / "lockfiles" / f"pylock.{name}.toml"

    def add(self, name: str, recipe: str, lock: str | None = None) -> None:
        """Writes a recipe, and its lock if there is one."""
        for path, text in ((self.recipe(name), recipe), (self.lock(name), lock)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_text(text, encoding="utf-8")

    def with_variables(self, **variables: str) -> Workplace:
        return replace(self, variables={**self.variables, **variables})

    def start(self, *words: str | Path, before: Before = int) -> Running:
        """`envbuilder --json WORDS`, after `before`."""
        for name in ("home", "tmp", "outcomes"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        outcome = Path(tempfile.mkdtemp(dir=self.folder / "outcomes"))
        for name in ("out", "err"):
            (outcome / name).touch()
        arguments = (self.folder, self.environment, ("--json", *map(str, words)), outcome, before)
        process = PROCESSES.Process(target=_command, args=arguments)
        process.start()
        return Running(process, outcome)

    def run(self, *words: str | Path, before: Before = int) -> Ended:
        return self.start(*words, before=before).wait()

    def succeed(self, *words: str | Path, before: Before = int) -> dict[str, Any]:
        """What it prints for machines, if it ends well."""
        ended = self.run(*words, before=before)
        assert ended.code == 0, ended
        return ended.told

    def fetch(self, name: str, *, before: Before = int) -> Ended:
        return self.run("fetch", self.recipe(name), before=before)

    @property
    def environment(self) -> dict[str, str]:
        """All variables of a command."""
        home = self.folder / "home"
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "TMPDIR": str(self.folder / "tmp"),
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "*",
            **self.variables,
        }


def _command(
    folder: Path, environment: dict[str, str], words: tuple[str, ...], outcome: Path, before: Before
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    # huggingface_hub has read these when it was imported.
    constants.HF_TOKEN_PATH = constants.HF_STORED_TOKENS_PATH = str(folder / "home" / "token")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(outcome / name, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["envbuilder", *words]
    before()
    cli.main()


def largest_file(size: int) -> None:
    """The disk is full after `size` bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_file_locks() -> None:
    """As on a file system where locks silently do nothing."""
    for module, name in ((fcntl, "flock"), (fcntl, "lockf"), (os, "lockf")):
        setattr(module, name, lambda *_: None)


def no_sockets() -> None:
    """Ends the process at the first socket."""

    def look(event: str, _: object) -> None:
        if event.startswith("socket."):
            os._exit(OPENED_A_SOCKET)

    sys.addaudithook(look)


_STEPS = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "os.truncate"})


def die_at_step(root: Path, step: int, counter: Path) -> None:
    """Kills the process just before the `step`th time that it changes something below `root`; the file
    `counter` gets a byte for each."""
    written = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    left = iter(range(step - 1))
    inside = f"{root}/"

    def look(event: str, arguments: tuple[object, ...]) -> None:
        changes = event in _STEPS
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        path = arguments[0] if changes else None
        if isinstance(path, int) or (isinstance(path, str | os.PathLike) and str(path).startswith(inside)):
            os.write(written, b".")
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_below(folder: Path) -> dict[str, Path]:
    """All that is no folder, by its path below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def state(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """What a write to any of `paths` changes."""
    found = [(path, path.lstat()) for path in paths]
    return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found}
