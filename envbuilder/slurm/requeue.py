"""A job that runs itself again: the same job id, so it works where a QoS takes one job at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from envbuilder.atomic import write_atomically
from envbuilder.errors import SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.progress_file import own_job_id, progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.slurm.work import COMPILING, Work
from envbuilder.slurm_queries import NoAnswerError, ask


def requeue_this_job(root: Root, reporter: Reporter, work: Work = COMPILING) -> str:
    """Has Slurm run this job again, from its beginning, and returns its id.

    For a program inside a job that stopped in good order, after its last word to the progress file. Slurm
    ends this life with SIGTERM, so exit right after.

    Raises UsageError outside of a job; SlurmError where the job has lived as often as it may, where this life
    brought no more than the one before, and where Slurm refuses.
    """
    job_id = own_job_id()
    if job_id is None:
        raise UsageError(
            "This is no Slurm job, so there is nothing to run again.",
            remedy="Run the same command again: it goes on from where it stopped.",
        )
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    lives = 1 + (int(restarts) if restarts.isdigit() else 0)
    progress = read_progress(progress_path(root, job_id))
    done = progress.done if progress else 0
    if lives >= work.most_lives:
        raise SlurmError(
            f"The job {job_id} has run {lives} times, and is not run again.",
            remedy=f"Set a longer walltime in the site file, and submit again. {work.kept}.",
            context={"job": job_id, f"{work.unit} {work.ready}": done},
        )
    record = lives_path(root, job_id)
    before = _done_before(record)
    # The first life may have spent its time on modules and cold disks: it alone is compared with nothing.
    if before and done <= before[-1]:
        raise SlurmError(
            f"The job {job_id} is not run again: this life, number {lives}, brought none of its {work.unit}.",
            remedy="Set a longer walltime in the site file (one takes longer than a life), and submit again. "
            f"{work.kept}.",
            context={
                "job": job_id,
                f"{work.unit} {work.ready}": done,
                f"{work.unit} {work.ready} in the last life": before[-1],
            },
        )
    write_atomically(record, json.dumps({"done": [*before, done]}) + "\n")
    try:
        ask("scontrol", "requeue", job_id)
    except NoAnswerError as error:
        raise SlurmError(
            f"Slurm does not run the job {job_id} again: {error}.",
            remedy=f"Submit the same command again. {work.kept}. Jobs that Slurm may run again are submitted "
            "with --requeue.",
            context={"job": job_id},
        ) from error
    reporter.note(f"job {job_id} is queued again for life {lives + 1}; {done} {work.unit} are {work.ready}")
    return job_id


def lives_path(root: Root, job_id: str) -> Path:
    """Where a job notes how many units were ready at the end of each of its lives."""
    return root.logs / "slurm" / f"lives-{job_id}.json"


def _done_before(path: Path) -> list[int]:
    try:
        return [int(count) for count in json.loads(path.read_bytes())["done"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
