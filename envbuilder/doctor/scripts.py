"""Runs doctor's standalone scripts by the env's interpreter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from envbuilder.errors import MismatchError
from envbuilder.process import run

_FOLDER = Path(__file__).parent


def run_script(
    python: Path,
    script: str,
    *arguments: str,
    timeout_s: float,
    remedy: str,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object that `script` of this folder prints when the interpreter `python` runs it.

    `env` are its variables, this process's where None. MismatchError with `remedy` where it prints none: it
    crashed, or took longer than `timeout_s` seconds.
    """
    # -P: this folder's modules must not be importable there.
    ended = run([python, "-P", _FOLDER / script, *arguments], timeout_s=timeout_s, env=env)
    if (printed := json_object(ended.output)) is not None:
        return printed
    how = f"took longer than {timeout_s:.0f} s" if ended.timed_out else f"ended with {ended.returncode}"
    last = ended.output.strip().splitlines()[-5:]
    raise MismatchError(
        f"The env's interpreter {how} when it ran {' '.join((script, *arguments))}.",
        remedy=remedy,
        context={"interpreter": python, "output": "\n".join(last)},
    )


def json_object(output: str) -> dict[str, Any] | None:
    """The last line of `output` that is a JSON object: libraries print warnings of their own around it."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                return dict(json.loads(line))
    return None
