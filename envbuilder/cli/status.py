"""`status`: what waits and runs in the queue, what is built, and which envs there are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from envbuilder import display
from envbuilder.cli.app import Options, app
from envbuilder.errors import IntegrityError
from envbuilder.model import BuiltWheel, EnvReceipt, read_record
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.wheelhouse import all_built

if TYPE_CHECKING:
    from envbuilder.slurm.overview import JobNow

_ENV_RECEIPT = "envbuilder.json"


@app.command()
def status(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Only what belongs to this recipe.")
    ] = None,
    follow: Annotated[
        str | None, typer.Option("--follow", metavar="JOB", help="Follow this job of yours to its end.")
    ] = None,
) -> None:
    """Say what is queued and running, what is built, and which envs there are."""
    opts: Options = context.obj
    if follow is not None:
        _follow(opts, follow)
        return
    wanted = load_recipe(recipe) if recipe else None
    jobs, silence = _jobs(opts.root, wanted)
    built, envs = _built(opts.root, wanted), _envs(opts.root, wanted)
    opts.result(
        {
            "jobs": [_job_data(job) for job in jobs],
            "slurm": silence,
            "built": [_built_data(wheel) for wheel in built],
            "envs": [_env_data(folder, receipt) for folder, receipt in envs],
        },
        lambda console: _show(console, opts.root, jobs, silence, built, envs),
    )


def _follow(opts: Options, job_id: str) -> None:
    from envbuilder.cli.submitting import print_ended
    from envbuilder.slurm.follow import follow
    from envbuilder.slurm.overview import log_of

    log = log_of(opts.root, job_id)
    again = "envbuilder compile RECIPE --sbatch --site SITE"
    print_ended(opts, follow(job_id, log, root=opts.root, reporter=opts.reporter, again=again))


def _jobs(root: Root, recipe: Recipe | None) -> tuple[list[JobNow], str | None]:
    """The jobs, or why there is nothing to say of them."""
    from envbuilder.slurm.overview import own_jobs
    from envbuilder.slurm_queries import NoAnswerError, is_slurm_here

    if not is_slurm_here():
        return [], "There is no Slurm on this machine."
    try:
        return own_jobs(root, recipe.name if recipe else None), None
    except NoAnswerError as error:
        return [], f"Slurm does not answer: {str(error).splitlines()[0]}"


def _built(root: Root, recipe: Recipe | None) -> list[BuiltWheel]:
    wheels = [w for w in all_built(root) if recipe is None or w.receipt.package in recipe.build]
    return sorted(wheels, key=lambda w: (w.receipt.package, w.receipt.built_at))


def _envs(root: Root, recipe: Recipe | None) -> list[tuple[Path, EnvReceipt]]:
    found = []
    for path in sorted(root.env("*").parent.glob(f"*/{_ENV_RECEIPT}")):
        try:
            receipt = read_record(path, EnvReceipt, remedy="")
        except IntegrityError:  # Being made, or of another version: as good as none.
            continue
        if recipe is None or receipt.recipe == recipe.name:
            found.append((path.parent, receipt))
    return found


def _job_data(job: JobNow) -> dict[str, Any]:
    progress = asdict(job.progress) if job.progress else None
    return {**asdict(job.listed), "waits_for": job.waits_for, "progress": progress, "log": job.log}


def _built_data(wheel: BuiltWheel) -> dict[str, Any]:
    receipt = wheel.receipt
    return {
        "package": receipt.package,
        "version": receipt.version,
        "torch": receipt.torch,
        "architectures": receipt.architectures_kept,
        "bytes": wheel.path.stat().st_size,
        "seconds": receipt.seconds,
        "built_at": receipt.built_at,
        "wheel": wheel.path,
    }


def _env_data(folder: Path, receipt: EnvReceipt) -> dict[str, Any]:
    return {
        "env": folder,
        "recipe": receipt.recipe,
        "python": receipt.python,
        "packages": len(receipt.packages),
        "created_at": receipt.created_at,
    }


def _show(
    console: Console,
    root: Root,
    jobs: list[JobNow],
    silence: str | None,
    built: list[BuiltWheel],
    envs: list[tuple[Path, EnvReceipt]],
) -> None:
    rows = [(job.listed.id, _job_words(job)) for job in jobs] or [("none", silence or "queued or running")]
    display.print_summary(console, "jobs", rows)
    display.print_summary(
        console,
        f"built, in {root.wheelhouse}",
        [(f"{w.receipt.package} {w.receipt.version}", _built_words(w)) for w in built] or [("nothing", "")],
    )
    display.print_summary(
        console,
        "envs",
        [
            (str(folder), f"Python {receipt.python}, {len(receipt.packages)} packages, {receipt.created_at}")
            for folder, receipt in envs
        ]
        or [("none", "")],
    )


def _job_words(job: JobNow) -> str:
    from envbuilder.slurm_time import spoken

    listed = job.listed
    words = [f"{listed.name}: {listed.state.lower()}"]
    if job.waits_for is not None:
        words.append(job.waits_for)
        if listed.start not in ("N/A", ""):
            words.append(f"expected to start at {listed.start}")
        return "; ".join(words)
    words.append(f"for {listed.used}, at most {listed.left} more")
    if job.progress is not None:
        words.append(f"{job.progress.done} of {job.progress.total} units; {job.progress.stage}")
        if job.progress.seconds_left is not None:
            words.append(f"about {spoken(job.progress.seconds_left)} left")
    return "; ".join(words)


def _built_words(wheel: BuiltWheel) -> str:
    receipt = wheel.receipt
    torch = f"for torch {receipt.torch}" if receipt.torch else "without torch"
    architectures = ", ".join(receipt.architectures_kept) or "no GPU code"
    size = display.human_bytes(wheel.path.stat().st_size)
    return f"{torch}; {architectures}; {size}; {receipt.seconds:.0f} s, {receipt.built_at}"
