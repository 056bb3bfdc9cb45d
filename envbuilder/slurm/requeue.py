"""A job that runs itself again: the same job id, so it works where a QoS takes one job at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from envbuilder.atomic import write_atomically
from envbuilder.errors import SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.progress_file import progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.slurm_queries import NoAnswerError, ask

MOST_LIVES = 21
"""The first one and 20 more: whoever needs that many should look at the walltime."""


def requeue_this_job(root: Root, reporter: Reporter) -> str:
    """Has Slurm run this job again, from its beginning, and returns its id.

    For a program inside a job that stopped in good order, after its last word to the progress file. Slurm
    ends this life with SIGTERM, so exit right after.

    Raises UsageError outside of a job; SlurmError where the job has lived MOST_LIVES times, where this life
    made no more units ready than the one before, and where Slurm refuses.
    """
    job_id = os.environ.get("SLURM_JOB_ID", "")
    if not job_id.isdigit():
        raise UsageError(
            "This is no Slurm job, so there is nothing to run again.",
            remedy="Run the same command again: it goes on from where it stopped.",
        )
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    lives = 1 + (int(restarts) if restarts.isdigit() else 0)
    progress = read_progress(progress_path(root, job_id))
    done = progress.done if progress else 0
    if lives >= MOST_LIVES:
        raise SlurmError(
            f"The job {job_id} has run {lives} times, and is not run again.",
            remedy="Set a longer walltime in the site file, and submit again: what was built is kept.",
            context={"job": job_id, "units ready": done},
        )
    record = lives_path(root, job_id)
    before = _done_before(record)
    # The first life may have spent its time on modules and cold disks: it alone is compared with nothing.
    if before and done <= before[-1]:
        raise SlurmError(
            f"The job {job_id} is not run again: this life, number {lives}, made no unit ready.",
            remedy="Set a longer walltime in the site file (one unit takes longer than one life), and submit "
            "again: what was built is kept.",
            context={"job": job_id, "units ready": done, "units ready in the last life": before[-1]},
        )
    write_atomically(record, json.dumps({"done": [*before, done]}) + "\n")
    try:
        ask("scontrol", "requeue", job_id)
    except NoAnswerError as error:
        raise SlurmError(
            f"Slurm does not run the job {job_id} again: {error}.",
            remedy="Submit the same command again: what was built is kept. Jobs that Slurm may run again are "
            "submitted with --requeue.",
            context={"job": job_id},
        ) from error
    reporter.note(f"job {job_id} is queued again for life {lives + 1}; {done} units are ready")
    return job_id


def lives_path(root: Root, job_id: str) -> Path:
    """Where a job notes how many units were ready at the end of each of its lives."""
    return root.logs / "slurm" / f"lives-{job_id}.json"


def _done_before(path: Path) -> list[int]:
    try:
        match json.loads(path.read_bytes()):
            case {"done": list(counts)}:
                return [int(count) for count in counts]
    except (OSError, ValueError, TypeError):
        pass
    return []
