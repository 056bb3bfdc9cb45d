"""The application, the options that every command takes, and how a command's outcome is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer
from rich.console import Console
from typing_extensions import get_annotations

from envbuilder import __version__, display
from envbuilder.paths import Root
from envbuilder.progress_file import ProgressFile, job_progress
from envbuilder.session import Session

if TYPE_CHECKING:
    from envbuilder.slurm.submit import Submitted

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class Commands(typer.Typer):
    """Commands whose options typer finds on Python 3.9 too, where it leaves postponed annotations as text."""

    def command(self, *words: Any, **settings: Any) -> Callable[[AnyFunction], AnyFunction]:
        register = super().command(*words, **settings)
        return lambda function: register(_with_annotations(function))

    def callback(self, *words: Any, **settings: Any) -> Callable[[AnyFunction], AnyFunction]:
        register = super().callback(*words, **settings)
        return lambda function: register(_with_annotations(function))


def _with_annotations(function: AnyFunction) -> AnyFunction:
    function.__annotations__ = get_annotations(function, eval_str=True)
    return function


app = Commands(
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

    def script(self, text: str) -> None:
        """Prints a batch script as it is."""
        self.result({"script": text}, lambda console: console.out(text, end="", highlight=False))

    def submitted(self, job: Submitted) -> None:
        """Prints the Slurm job that a command has submitted in its place."""
        self.lines(
            {"job": job.id, "script": job.script, "log": job.log},
            f"submitted job {job.id}",
            f"its log: {job.log}",
        )


class OwnJob:
    """The Slurm job whose program this process is: its follower reads that it began, and how it ended."""

    def __init__(self) -> None:
        self._file: ProgressFile | None = None

    def begin(self, root: Root) -> None:
        """For a command that jobs are submitted with; outside of a job it does nothing."""
        self._file = job_progress(root)
        if self._file is not None:
            self._file.begin()

    def end(self, exit_code: int) -> None:
        """The last thing that the process does; nothing where no command began as a job."""
        if self._file is not None:
            sys.stdout.flush()
            self._file.end(exit_code)


own_job = OwnJob()

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, e.g. recipes/quickstart.toml.")
]
PythonExe = Annotated[
    Optional[Path],
    typer.Option("--python", help="Interpreter to build for (default: the provider's, else this one)."),
]
LockFolder = Annotated[
    Optional[Path],
    typer.Option("--lockfiles", help="Folder of the locks (default: lockfiles/ beside the recipe's folder)."),
]

SiteName = Annotated[
    Optional[str],
    typer.Option("--site", help="The site's name (recipes/sites/NAME.toml) or file, for --sbatch."),
]

Overrides = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="A.B=C", help="Override a key of the config (may be repeated)."),
]
Processes = Annotated[
    Optional[int],
    typer.Option(help="Processes on each node (default: one for each visible GPU, else one).", min=1),
]
AllowDrift = Annotated[
    bool, typer.Option("--allow-drift", help="Train in an env that is not as it was installed.")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or leave it alone.")]
Requeue = Annotated[
    Optional[bool],
    typer.Option(
        "--requeue/--no-requeue",
        help="The job runs itself again until all is done (default: the site's allow-chain).",
    ),
]
After = Annotated[Optional[str], typer.Option(metavar="JOB", help="Start the job when this one has ended.")]
WaitForQos = Annotated[bool, typer.Option("--wait-for-qos", help="Submit once the QoS takes another job.")]
PrintScript = Annotated[
    bool, typer.Option("--print-script", help="Print what --sbatch would submit, and submit nothing.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say when it would start and what it would take, and submit nothing."),
]
ScriptTemplate = Annotated[
    Optional[Path],
    typer.Option("--template", metavar="FILE", help="Your own batch script, with a place for {{command}}."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"envbuilder {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[
        Optional[Path],
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
