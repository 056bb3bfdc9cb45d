"""Running other programs: the one place where a subprocess is started and its output kept."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import MismatchError


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that has ended."""

    argv: tuple[str, ...]
    returncode: int
    output: str
    """stdout and stderr in the order they came."""


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> Completed:
    """Runs `argv` to its end with no standard input; output goes to `log` too, as it comes.

    Raises MismatchError where the program is not on this machine.
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
        )
    except FileNotFoundError as error:
        raise MismatchError(
            f"The program {words[0]} is not on this machine.",
            remedy=f"Install {Path(words[0]).name}, or load the module that has it.",
            context={"command": " ".join(words)},
        ) from error
    lines: list[str] = []
    with process, Path(log or os.devnull).open("a", encoding="utf-8") as sink:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            sink.write(line)
            sink.flush()
    return Completed(words, process.returncode, "".join(lines))
