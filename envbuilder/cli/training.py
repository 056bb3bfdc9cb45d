"""`train`, and `pipeline`: everything on one machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from envbuilder import display, summary
from envbuilder.cli.app import (
    After,
    AllowDrift,
    DryRun,
    Options,
    Overrides,
    PrintScript,
    Processes,
    PythonExe,
    RecipePath,
    Requeue,
    ScriptTemplate,
    SiteName,
    Wait,
    WaitForQos,
    app,
    own_job,
)
from envbuilder.cli.doctoring import failed_of
from envbuilder.errors import DoctorError, UsageError
from envbuilder.findings import counted, not_well
from envbuilder.progress_file import job_progress
from envbuilder.slurm_time import seconds_of


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The training config, YAML.")],
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Name of the recipe whose env to train in.")],
    overrides: Overrides = None,
    processes: Processes = None,
    run: Annotated[Optional[str], typer.Option(help="The run's name (default: the config's).")] = None,
    time_limit: Annotated[
        Optional[str],
        typer.Option(metavar="HH:MM:SS", help="Stop in good order within this time (in a job: its end)."),
    ] = None,
    allow_drift: AllowDrift = False,
    sbatch: Annotated[bool, typer.Option("--sbatch", help="Submit this command as a Slurm job.")] = False,
    site: SiteName = None,
    wait: Wait = True,
    requeue: Requeue = None,
    after: After = None,
    wait_for_qos: WaitForQos = False,
    print_script: PrintScript = False,
    dry_run: DryRun = False,
    template: ScriptTemplate = None,
    requeue_job: Annotated[bool, typer.Option("--requeue-job", hidden=True)] = False,
) -> None:
    """Train in the env; the same command goes on with a run that stopped."""
    from envbuilder.train import checked_name

    opts: Options = context.obj
    example = f"envbuilder train {config} --recipe {recipe} --sbatch --site generic"
    if sbatch != (site is not None):
        raise UsageError("--sbatch goes with --site, and only with it.", remedy=example)
    for_a_job = requeue is not None or after or wait_for_qos or print_script or dry_run or template
    if site is None and for_a_job:
        raise UsageError(
            "--requeue, --after, --wait-for-qos, --print-script, --dry-run and --template are for a job: "
            "they go with --sbatch.",
            remedy=example,
        )
    if site is not None:
        from envbuilder.cli.submitting import Instead, train_in_a_job

        train_in_a_job(
            opts,
            config,
            recipe,
            site,
            tuple(overrides or ()),
            run_name=checked_name(run or config.stem),
            processes=processes,
            allow_drift=allow_drift,
            requeue=requeue,
            after=after,
            wait_for_qos=wait_for_qos,
            template=template,
            wait=wait,
            instead=Instead(print_script, dry_run),
        )
        return
    train_here(
        opts,
        config,
        recipe,
        tuple(overrides or ()),
        run_name=run,
        processes=processes,
        time_limit_s=_seconds(time_limit),
        allow_drift=allow_drift,
        requeue_job=requeue_job,
    )


def train_here(
    opts: Options,
    config: Path,
    recipe_name: str,
    overrides: tuple[str, ...],
    *,
    run_name: str | None,
    processes: int | None,
    time_limit_s: int | None,
    allow_drift: bool,
    requeue_job: bool,
) -> None:
    """Trains on this machine, in a job too, and prints the outcome.

    With `requeue_job` the job runs itself again where its time ends before the run does.
    """
    from envbuilder.train import TimeEnded, run_training

    own_job.begin(opts.root)
    try:
        report = run_training(
            config,
            root=opts.root,
            recipe_name=recipe_name,
            processes=processes,
            overrides=overrides,
            run_name=run_name,
            reporter=opts.reporter,
            time_limit_s=time_limit_s,
            allow_drift=allow_drift,
        )
    except TimeEnded:
        if requeue_job:
            from envbuilder.slurm.requeue import requeue_this_job
            from envbuilder.slurm.work import TRAINING

            requeue_this_job(opts.root, opts.reporter, TRAINING)
        raise
    if file := job_progress(opts.root):
        file.finish()
    opts.result(
        {"run": report.run, "outcome": report.outcome, "seconds": report.seconds},
        lambda console: display.print_summary(console, str(report.run), summary.trained(report)),
    )


def _seconds(time_limit: str | None) -> int | None:
    if time_limit is None:
        return None
    seconds = seconds_of(time_limit)
    if not seconds:
        raise UsageError(
            f"{time_limit!r} is no time as Slurm writes them.", remedy="Give it as --time-limit 00:30:00"
        )
    return seconds


@app.command("train-node", hidden=True)
def train_node(
    context: typer.Context,
    config: Path,
    recipe: Annotated[str, typer.Option()],
    processes: Annotated[int, typer.Option()],
    run_dir: Annotated[Path, typer.Option()],
    overrides: Annotated[Optional[list[str]], typer.Option("--set")] = None,
) -> None:
    """One node's part of a run on several: `train` has srun start it on each of them."""
    from envbuilder.train import run_node

    opts: Options = context.obj
    returncode = run_node(
        config,
        root=opts.root,
        recipe_name=recipe,
        processes=processes,
        overrides=tuple(overrides or ()),
        run=run_dir,
        reporter=opts.reporter,
    )
    raise typer.Exit(returncode if returncode >= 0 else 128 - returncode)


@app.command()
def pipeline(
    context: typer.Context,
    recipe: RecipePath,
    config: Annotated[Path, typer.Option("--train", metavar="CONFIG", help="The training config, YAML.")],
    processes: Annotated[Optional[int], typer.Option(min=1, help="Training processes.")] = None,
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
