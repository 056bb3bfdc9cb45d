"""The command line: the only place that prints and exits."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from envbuilder import __version__, display, summary
from envbuilder.doctor import CHECKS, explain_log, run_checks
from envbuilder.errors import DoctorError, EnvbuilderError, UsageError
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.session import Session
from envbuilder.slurm.submit import submit_compile
from envbuilder.train import run_training

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Gets a GPU training environment onto a cluster without internet on its compute nodes.",
)


@dataclass(frozen=True)
class _Options:
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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"envbuilder {__version__}")
        raise typer.Exit


_FLAGS = frozenset({"--json", "--quiet", "-q", "--verbose", "-v"})


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
    context.obj = _Options(Root.resolve(root), as_json, verbose, console, reporter)
    context.with_resource(reporter)


@app.command()
def lock(
    context: typer.Context,
    recipe: RecipePath,
    check: Annotated[bool, typer.Option("--check", help="Only check that the lock is current.")] = False,
    resolver: Annotated[str, typer.Option(help="uv or pip-tools.")] = "uv",
    lockfiles: LockFolder = None,
) -> None:
    """Resolve a recipe into its source lock: every byte, hashed (login node)."""
    opts: _Options = context.obj
    session = opts.session(recipe, lockfiles)
    made = session.current_lock() if check else session.make_lock(resolver)
    packages = len(made.pylock.packages)
    opts.lines(
        {"lock": session.lock_path, "sha256": made.digest, "packages": packages},
        f"{session.lock_path}: {packages} packages",
    )


@app.command()
def fetch(
    context: typer.Context,
    recipe: RecipePath,
    python: Annotated[
        str | None,
        typer.Option(help='Python version of the compute node, e.g. "3.12" (default: this one\'s).'),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file that is there, and mend.")
    ] = False,
    lockfiles: LockFolder = None,
) -> None:
    """Bring every file of the lock into a bundle, each checked against its hash (login node)."""
    opts: _Options = context.obj
    report = opts.session(recipe, lockfiles).fetch(python, verify=verify)
    opts.lines(
        {
            "bundle": report.bundle.path,
            "files": report.files,
            "bytes": report.bytes,
            "transferred_files": report.transferred_files,
            "transferred_bytes": report.transferred_bytes,
            "seconds": report.seconds,
        },
        f"{report.bundle.path}: {summary.fetched(report)}",
    )


@app.command("compile")
def compile_(
    context: typer.Context,
    recipe: RecipePath,
    local: Annotated[
        bool, typer.Option("--local", help="Compile here (the default without --sbatch).")
    ] = False,
    sbatch: Annotated[bool, typer.Option("--sbatch", help="Submit this command as a Slurm job.")] = False,
    site: Annotated[
        str | None, typer.Option(help="The site's name (recipes/sites/NAME.toml) or file, for --sbatch.")
    ] = None,
    python: PythonExe = None,
    require_isolation: Annotated[
        bool,
        typer.Option("--require-isolation", help="Fail where a build can't be cut off from the network."),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is in the wheelhouse.")
    ] = False,
) -> None:
    """Build the source packages into the wheelhouse, without internet, and install the env (compute node)."""
    opts: _Options = context.obj
    if local and sbatch:
        raise UsageError(
            "--local and --sbatch exclude one another.",
            remedy=f"On a login node: envbuilder compile {recipe} --sbatch --site generic",
        )
    if sbatch != (site is not None):
        raise UsageError(
            "--sbatch goes with --site, and only with it.",
            remedy=f"envbuilder compile {recipe} --sbatch --site generic",
        )
    session = opts.session(recipe)
    if site is not None:
        session.bundle()  # An incomplete bundle is found here, not after hours in a queue.
        flags = ["--python", str(python)] if python else []
        flags += ["--require-isolation"] if require_isolation else []
        flags += ["--rebuild"] if rebuild else []
        job = submit_compile(session.recipe_path, session.recipe.name, site, opts.root, flags)
        opts.lines(
            {"job": job.id, "script": job.script, "log": job.log},
            f"submitted job {job.id}",
            f"its log: {job.log}",
        )
        return
    built = session.compile(python, require_isolation=require_isolation, rebuild=rebuild)
    env = session.install(python)
    opts.lines(
        {
            "wheels": [wheel.model_dump(mode="json") for wheel in built.wheels],
            "reused": built.reused,
            "seconds": built.seconds,
            "env": env.path,
        },
        summary.compiled(built),
        f"{env.path}: {summary.installed(env)}",
    )


@app.command()
def install(
    context: typer.Context,
    recipe: RecipePath,
    python: PythonExe = None,
    reinstall: Annotated[
        bool, typer.Option("--reinstall", help="Make the env anew, whatever is there.")
    ] = False,
) -> None:
    """Make the env from bundle and wheelhouse alone."""
    opts: _Options = context.obj
    report = opts.session(recipe).install(python, reinstall=reinstall)
    opts.lines(
        {"env": report.path, "packages": len(report.receipt.packages), "seconds": report.seconds},
        f"{report.path}: {summary.installed(report)}",
    )


@app.command()
def doctor(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this check alone (may be repeated).")] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks.")] = False,
    log: Annotated[Path | None, typer.Option(help="Explain a failed build's or job's log.")] = None,
) -> None:
    """Say what is wrong, prove it, and give the command that mends it."""
    opts: _Options = context.obj
    if list_checks:
        opts.result(
            {"checks": [{"id": c.id, "title": c.title, "looks_at": c.looks_at} for c in CHECKS]},
            lambda console: display.print_summary(console, "checks", [(c.id, c.looks_at) for c in CHECKS]),
        )
        return
    if log is not None:
        findings = explain_log(log)
    elif recipe is not None:
        findings = opts.session(recipe).doctor(frozenset(only or ()))
    else:
        findings = run_checks(
            None, root=opts.root, lock=None, only=frozenset(only or ()), reporter=opts.reporter
        )
    opts.result(
        {"findings": [finding.model_dump(mode="json") for finding in findings]},
        lambda console: display.print_findings(console, findings, verbose=opts.verbose),
    )
    if _failed(findings):
        raise typer.Exit(DoctorError.exit_code)


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The training config, YAML.")],
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Name of the recipe whose env to train in.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key (may be repeated).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes (default: one for each visible GPU, else one).", min=1)
    ] = None,
    run: Annotated[str | None, typer.Option(help="The run's name (default: the config's).")] = None,
) -> None:
    """Train in the env; the same command goes on with a run that stopped."""
    opts: _Options = context.obj
    report = run_training(
        config,
        root=opts.root,
        recipe_name=recipe,
        processes=processes,
        overrides=tuple(overrides or ()),
        run_name=run,
        reporter=opts.reporter,
    )
    opts.result(
        {"run": report.run, "outcome": report.outcome, "seconds": report.seconds},
        lambda console: display.print_summary(console, str(report.run), summary.trained(report)),
    )


@app.command()
def pipeline(
    context: typer.Context,
    recipe: RecipePath,
    config: Annotated[Path, typer.Option("--train", metavar="CONFIG", help="The training config, YAML.")],
    processes: Annotated[int | None, typer.Option(min=1, help="Training processes.")] = None,
    python: PythonExe = None,
) -> None:
    """Everything on one machine: lock --check, fetch, compile, install, doctor, train, and a summary."""
    opts: _Options = context.obj
    began = time.monotonic()
    session = opts.session(recipe)
    session.current_lock()  # Where there is no lock, `fetch` alone would make one.
    fetched = session.fetch(session.python_minor(python))
    built = session.compile(python)
    env = session.install(python)
    findings = session.doctor()
    if failed := _failed(findings):
        display.print_findings(opts.console, findings, verbose=opts.verbose)
        raise DoctorError(
            f"{len(failed)} of {len(findings)} checks failed: {', '.join(f.check for f in failed)}.",
            remedy=failed[0].remedy or f"envbuilder doctor {recipe} --verbose",
        )
    trained = run_training(
        config,
        root=opts.root,
        recipe_name=session.recipe.name,
        processes=processes,
        overrides=(),
        # A run of its own each time: in a finished one nothing is left to train.
        run_name=f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}",
        reporter=opts.reporter,
    )
    rows = [
        ("fetched", summary.fetched(fetched)),
        ("compiled", summary.compiled(built)),
        ("installed", f"{env.path}: {summary.installed(env)}"),
        *((f"checked {f.check}", f"{f.verdict}: {f.summary}") for f in findings),
        *((f"trained: {key}", value) for key, value in summary.trained(trained)),
        ("in all", f"{time.monotonic() - began:.0f} s"),
    ]
    opts.result(
        {"summary": rows, "outcome": trained.outcome},
        lambda console: display.print_summary(console, f"{session.recipe.name}: everything worked", rows),
    )


def _failed(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict == "failed"]


def _flags_first(arguments: list[str]) -> list[str]:
    """The flags that every command takes may stand anywhere; the parser wants them before the command."""
    flags = [word for word in arguments if word in _FLAGS]
    return [*flags, *(word for word in arguments if word not in _FLAGS)]


def main() -> None:
    """The entry point: runs a command, and turns a typed error into a message and its exit code."""
    arguments = _flags_first(sys.argv[1:])
    # The end of a Slurm job comes as SIGTERM: like Ctrl-C (exit 130), it must leave nothing half-made behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(arguments)
    except EnvbuilderError as error:
        if "--json" in arguments:
            print(json.dumps(error.to_json(), indent=2))
        else:
            verbose = "--verbose" in arguments or "-v" in arguments
            display.print_error(Console(stderr=True, soft_wrap=True), error, verbose=verbose)
        sys.exit(error.exit_code)
