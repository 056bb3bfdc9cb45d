"""`train`, and `pipeline`: everything on one machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from envbuilder import display, summary
from envbuilder.cli.app import Options, PythonExe, RecipePath, app
from envbuilder.cli.doctoring import failed_of
from envbuilder.errors import DoctorError
from envbuilder.findings import counted, not_well


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
    from envbuilder.train import run_training

    opts: Options = context.obj
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
    from envbuilder.train import run_training

    opts: Options = context.obj
    began = time.monotonic()
    session = opts.session(recipe)
    session.current_lock()  # Where there is no lock, `fetch` alone would make one.
    fetched = session.fetch(session.python_minor(python))
    built = session.compile(python)
    env = session.install(python)
    findings = session.doctor()
    if failed := failed_of(findings):
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
        ("checked", counted(findings)),
        *((f"checked {f.check}", f"{f.verdict}: {f.summary}") for f in not_well(findings)),
        *((f"trained: {key}", value) for key, value in summary.trained(trained)),
        ("in all", f"{time.monotonic() - began:.0f} s"),
    ]
    opts.result(
        {"summary": rows, "outcome": trained.outcome},
        lambda console: display.print_summary(console, f"{session.recipe.name}: everything worked", rows),
    )
