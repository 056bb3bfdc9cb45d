"""`status`: what waits and runs in the queue, the runs, what is built, and which envs there are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from envbuilder import display
from envbuilder.cli.app import Options, app
from envbuilder.errors import IntegrityError
from envbuilder.kept_images import KeptImage, kept_images
from envbuilder.model import ENV_RECEIPT, BuiltWheel, EnvReceipt, read_record
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.wheelhouse import all_built

if TYPE_CHECKING:
    from envbuilder.run_report import RunNow
    from envbuilder.slurm.overview import JobNow
    from envbuilder.slurm.sweep_queue import Task


@app.command()
def status(
    context: typer.Context,
    recipe: Annotated[
        Optional[Path], typer.Argument(metavar="[RECIPE]", help="Only what belongs to this recipe.")
    ] = None,
    follow: Annotated[
        Optional[str], typer.Option("--follow", metavar="JOB", help="Follow this job of yours to its end.")
    ] = None,
) -> None:
    """Say what is queued and running, how far runs are, what is built, and which envs there are."""
    opts: Options = context.obj
    if follow is not None:
        _follow(opts, follow)
        return
    wanted = load_recipe(recipe) if recipe else None
    jobs, silence = _jobs(opts.root, wanted)
    built, envs = _built(opts.root, wanted), _envs(opts.root, wanted)
    images = [image for image in kept_images(opts.root) if wanted is None or image.recipe == wanted.name]
    runs = _runs(opts.root, wanted)
    opts.result(
        {
            "jobs": [_job_data(job) for job in jobs],
            "slurm": silence,
            "runs": [asdict(run) for run in runs],
            "built": [_built_data(wheel) for wheel in built],
            "envs": [_env_data(folder, receipt) for folder, receipt in envs],
            "images": [asdict(image) for image in images],
        },
        lambda console: _show(console, opts.root, jobs, silence, runs, built, envs, images),
    )


def _follow(opts: Options, job_id: str) -> None:
    from envbuilder.cli.submitting import print_ended
    from envbuilder.slurm.follow import follow
    from envbuilder.slurm.overview import log_of
    from envbuilder.slurm.sweep_queue import tasks_of_array

    log = log_of(opts.root, job_id)
    if tasks := tasks_of_array(opts.root, job_id):
        _follow_array(opts, job_id, tasks)
        return
    again = "envbuilder compile RECIPE --sbatch --site SITE"
    print_ended(opts, follow(job_id, log, root=opts.root, reporter=opts.reporter, again=again))


def _follow_array(opts: Options, job_id: str, tasks: tuple[Task, ...]) -> None:
    from envbuilder.cli.sweep_standing import follow_tasks, print_standing
    from envbuilder.slurm.submit import array_of, submitted_with
    from envbuilder.sweep_record import read_sweep

    array = array_of(opts.root, job_id)
    sweep = read_sweep(opts.root, array.sweep) if array else None
    assert sweep is not None, "it has tasks"
    again = submitted_with(opts.root, job_id) or "envbuilder sweep CONFIG --recipe NAME --site SITE --over …"
    failures = follow_tasks(opts, sweep, tasks, again)
    print_standing(opts, sweep, tasks, failures, again, is_over=True)


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
    for path in sorted(root.env("*").parent.glob(f"*/{ENV_RECEIPT}")):
        try:
            receipt = read_record(path, EnvReceipt, remedy="")
        except IntegrityError:  # Being made, or of another version: as good as none.
            continue
        if recipe is None or receipt.recipe == recipe.name:
            found.append((path.parent, receipt))
    return found


def _runs(root: Root, recipe: Recipe | None) -> list[RunNow]:
    from envbuilder.run_report import runs_now
    from envbuilder.train.supervision import processes_of

    return runs_now(root, recipe.name if recipe else None, is_here=lambda run: bool(processes_of(run)))


def _job_data(job: JobNow) -> dict[str, Any]:
    progress = asdict(job.progress) if job.progress else None
    return {
        **asdict(job.listed),
        "waits_for": job.waits_for,
        "run": job.run,
        "progress": progress,
        "log": job.log,
    }


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
    runs: list[RunNow],
    built: list[BuiltWheel],
    envs: list[tuple[Path, EnvReceipt]],
    images: list[KeptImage],
) -> None:
    display.print_summary(console, "jobs", _job_rows(jobs) or [("none", silence or "queued or running")])
    display.print_summary(console, "runs", [(run.name, _run_words(run)) for run in runs] or [("none", "")])
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
    if images:
        display.print_summary(console, "images", [(str(image.path), _image_words(image)) for image in images])


def _job_rows(jobs: list[JobNow]) -> list[tuple[str, str]]:
    """A row for each job, but one for all tasks of an array that wait for the same."""
    groups: dict[tuple[str, str | None], list[JobNow]] = {}
    for job in jobs:
        array, _, index = job.listed.id.partition("_")
        alike = (array, job.waits_for) if index and job.waits_for else (job.listed.id, None)
        groups.setdefault(alike, []).append(job)
    return [_job_row(alike) for alike in groups.values()]


def _job_row(alike: list[JobNow]) -> tuple[str, str]:
    from envbuilder.sweep import ranges

    job_id, words = alike[0].listed.id, _job_words(alike[0])
    if len(alike) == 1:
        return job_id, words
    indices = ranges(sorted(int(job.listed.id.partition("_")[2]) for job in alike))
    return f"{job_id.partition('_')[0]}_[{indices}]", f"{len(alike)} runs of {words}"


def _job_words(job: JobNow) -> str:
    from envbuilder.slurm_time import spoken

    listed = job.listed
    run = f" ({job.run})" if job.run and job.waits_for is None else ""
    words = [f"{listed.name}{run}: {listed.state.lower()}"]
    if job.waits_for is not None:
        words.append(job.waits_for)
        if listed.start not in ("N/A", ""):
            words.append(f"expected to start at {listed.start}")
        return "; ".join(words)
    words.append(f"for {listed.used}, at most {listed.left} more")
    if job.progress is not None:
        counted = f"{job.progress.done} of {job.progress.total} {job.work.unit}; "
        words.append((counted if job.progress.total else "") + job.progress.stage)
        if job.progress.seconds_left is not None:
            words.append(f"about {spoken(job.progress.seconds_left)} left")
    return "; ".join(words)


def _run_words(run: RunNow) -> str:
    from envbuilder.slurm_time import spoken

    steps = f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    words = [run.state + (f", silent for {spoken(run.silent_s)}" if run.silent_s else ""), steps]
    if run.loss is not None:
        words.append(f"loss {run.loss:.4f}")
    if run.seconds_left is not None:
        words.append(f"about {spoken(run.seconds_left)} of training left")
    if run.jobs_left is not None:
        words.append(f"{run.jobs_left} more job{'s' if run.jobs_left != 1 else ''}")
    return "; ".join(words)


def _image_words(image: KeptImage) -> str:
    size = display.human_bytes(image.size)
    superseded = "; superseded: bundle gc removes it once nobody uses it" if image.superseded else ""
    return f"{size}, sha256 {image.digest}…, {image.made_at}{superseded}"


def _built_words(wheel: BuiltWheel) -> str:
    receipt = wheel.receipt
    torch = f"for torch {receipt.torch}" if receipt.torch else "without torch"
    architectures = ", ".join(receipt.architectures_kept) or "no GPU code"
    size = display.human_bytes(wheel.path.stat().st_size)
    return f"{torch}; {architectures}; {size}; {receipt.seconds:.0f} s, {receipt.built_at}"
