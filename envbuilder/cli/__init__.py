"""The command line: the only place that prints and exits. One module for each part of the commands."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

from rich.console import Console

from envbuilder import display
from envbuilder.cli import (
    building,
    bundle,
    doctoring,
    imaging,
    locking,
    probing,
    reporting,
    sharing,
    status,
    sweeping,
    training,
)
from envbuilder.cli.app import app, own_job
from envbuilder.errors import EnvbuilderError

__all__ = [
    "building",
    "bundle",
    "doctoring",
    "imaging",
    "locking",
    "main",
    "probing",
    "reporting",
    "sharing",
    "status",
    "sweeping",
    "training",
]

_FLAGS = frozenset({"--json", "--quiet", "-q", "--verbose", "-v"})


def _flags_first(arguments: list[str]) -> list[str]:
    """The flags that every command takes may stand anywhere; the parser wants them before the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, others = arguments[:end], arguments[end:]
    flags = [word for word in own if word in _FLAGS]
    return [*flags, *(word for word in own if word not in _FLAGS), *others]


def _upgrades_apart(arguments: list[str]) -> list[str]:
    """`--upgrade=PKG` is another way to write `--upgrade-package PKG`."""
    split = [word.partition("=") if word.startswith("--upgrade=") else (word, "", "") for word in arguments]
    return [
        part for word, equals, name in split for part in (("--upgrade-package", name) if equals else (word,))
    ]


def _with_recipe(remedy: str, arguments: list[str]) -> str:
    """`remedy` with the recipe's path as it was typed: a stage knows its name, or writes RECIPE."""
    recipes = [word for word in arguments if word.endswith(".toml") and not word.startswith("-")]
    if len(recipes) != 1:
        return remedy
    usual = re.escape(f"recipes/{Path(recipes[0]).stem}.toml")
    return re.sub(rf"(?<!\S){usual}|\bRECIPE\b", lambda _: recipes[0], remedy)


def main() -> None:
    """The entry point: runs a command, and turns a typed error into a message and its exit code."""
    arguments = _upgrades_apart(_flags_first(sys.argv[1:]))
    # The end of a Slurm job comes as SIGTERM: like Ctrl-C (exit 130), it must leave nothing half-made behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(arguments)
    except SystemExit as ended:
        own_job.end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
        raise


def _run(arguments: list[str]) -> None:
    try:
        app(arguments)
    except EnvbuilderError as error:
        error.remedy = _with_recipe(error.remedy, arguments)
        if "--json" in arguments:
            print(json.dumps(error.to_json(), indent=2, default=str))
        else:
            verbose = "--verbose" in arguments or "-v" in arguments
            display.print_error(Console(stderr=True, soft_wrap=True), error, verbose=verbose)
        sys.exit(error.exit_code)
