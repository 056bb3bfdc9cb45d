"""Running other programs: the one place where a subprocess is started and its output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import MismatchError


class Cancel:
    """Ends programs from another thread or a signal handler."""

    def __init__(self) -> None:
        self.asked = False
        self._running: set[int] = set()

    def now(self) -> None:
        """Kills what runs, with all that it started; what is started later is killed at once."""
        self.asked = True
        for group in list(self._running):
            _kill_group(group)

    @contextmanager
    def watching(self, group: int) -> Iterator[None]:
        """`group` (of processes) is one to be killed while the block runs."""
        self._running.add(group)
        try:
            if self.asked:
                _kill_group(group)
            yield
        finally:
            self._running.discard(group)


@dataclass(frozen=True)
class Completed:
    """A program that has ended."""

    argv: tuple[str, ...]
    returncode: int
    output: str
    """stdout and stderr in the order they came."""
    timed_out: bool = False
    """It was killed for taking longer than it was given."""


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    timeout_s: float | None = None,
    on_line: Callable[[str], None] | None = None,
    cancel: Cancel | None = None,
) -> Completed:
    """Runs `argv` to its end with no standard input; output goes to `log` and `on_line` too, as it comes.

    After `timeout_s` seconds, or when `cancel` says so, it is killed, with all that it started.

    Raises MismatchError where the program is not on this machine, or its CPU time (RLIMIT_CPU) is used up.
    """
    words = tuple(str(word) for word in argv)
    try:
        process = subprocess.Popen(
            words,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session of its own can be killed whole; without a time limit, Ctrl-C must reach it.
            start_new_session=timeout_s is not None or cancel is not None,
        )
    except FileNotFoundError as error:
        raise MismatchError(
            f"The program {words[0]} is not on this machine.",
            remedy=f"Install {Path(words[0]).name}, or load the module that has it.",
            context={"command": " ".join(words).splitlines()[0][:200]},
        ) from error
    lines: list[str] = []
    with (
        process,
        Path(log or os.devnull).open("a", encoding="utf-8") as sink,
        _killed_after(timeout_s, process) as overdue,
        cancel.watching(process.pid) if cancel else nullcontext(),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            sink.write(line)
            sink.flush()
            if on_line is not None:
                on_line(line)
    if process.returncode == -signal.SIGXCPU:
        raise MismatchError(
            f"The program {Path(words[0]).name} has used all CPU time that a process may use here.",
            remedy="ulimit -t; and run the command where jobs run, or where that limit is higher.",
            context={"command": " ".join(words).splitlines()[0][:200]},
        )
    return Completed(words, process.returncode, "".join(lines), timed_out=overdue.is_set())


@contextmanager
def _killed_after(timeout_s: float | None, process: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Kills `process` and its group after `timeout_s` seconds, and when the block is left by an exception."""
    overdue = threading.Event()
    if timeout_s is None:
        yield overdue
        return

    def give_up() -> None:
        overdue.set()
        _kill_group(process.pid)

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    try:
        yield overdue
    except BaseException:
        _kill_group(process.pid)
        raise
    finally:
        timer.cancel()


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
