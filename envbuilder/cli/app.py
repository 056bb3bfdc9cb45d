"""The application, the options that every command takes, and how a command's outcome is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from envbuilder import __version__, display
from envbuilder.paths import Root
from envbuilder.session import Session

if TYPE_CHECKING:
    from envbuilder.slurm.submit import Submitted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Gets a GPU training environment onto a cluster without internet on its compute nodes.",
)


@dataclass(frozen=True)
class Options:
    """What the options before the command say."""

    root: Root
    json: bool
    verbose: bool
    console: Console
    reporter: display.ConsoleReporter

    def session(self, recipe_path: Path, lockfiles: Path | None = None) -> Session:
        return Session.open(self.root, self.reporter, recipe_path, lockfiles)

    def result(self, data: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Prints a command's outcome: `data` for machines, `show` for people."""
        if self.json:
            print(json.dumps(data, indent=2, default=str))
        else:
            show(self.console)

    def lines(self, data: dict[str, Any], *lines: str) -> None:
        """`result` with plain lines for people."""
        self.result(data, lambda console: console.print(*lines, sep="\n", highlight=False, markup=False))

    def submitted(self, job: Submitted) -> None:
        """Prints the Slurm job that a command has submitted in its place."""
        self.lines(
            {"job": job.id, "script": job.script, "log": job.log},
            f"submitted job {job.id}",
            f"its log: {job.log}",
        )


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, e.g. recipes/quickstart.toml.")
]
PythonExe = Annotated[
    Path | None,
    typer.Option("--python", help="Interpreter to build for (default: the provider's, else this one)."),
]
LockFolder = Annotated[
    Path | None,
    typer.Option("--lockfiles", help="Folder of the locks (default: lockfiles/ beside the recipe's folder)."),
]

SiteName = Annotated[
    str | None,
    typer.Option("--site", help="The site's name (recipes/sites/NAME.toml) or file, for --sbatch."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"envbuilder {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[
        Path | None,
        typer.Option(
            help="The tool's folder on the shared disk (default: $ENVBUILDER_ROOT, else .envbuilder)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="All evidence and whole logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    console = Console(stderr=as_json, soft_wrap=True)
    reporter = display.ConsoleReporter(console, quiet=quiet or as_json)
    context.obj = Options(Root.resolve(root), as_json, verbose, console, reporter)
    context.with_resource(reporter)
