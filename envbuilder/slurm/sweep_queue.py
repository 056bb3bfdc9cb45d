"""The members of a sweep in the queue: which are there, and which the next array is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import MismatchError, SlurmError
from envbuilder.paths import Root
from envbuilder.progress_file import progress_path, read_progress
from envbuilder.slurm.overview import log_of, members_of, own_jobs
from envbuilder.slurm.script import Array
from envbuilder.slurm.submit import array_id
from envbuilder.slurm_queries import PREFIX, Listed, NoAnswerError, max_array_size, my_jobs
from envbuilder.sweep import Member, Sweep


@dataclass(frozen=True)
class Task:
    """A member's job."""

    id: str
    """As squeue shows it, "123_4"."""
    member: Member
    log: Path


def job_name(sweep: str) -> str:
    """What the jobs of a sweep are called in the queue."""
    return f"{PREFIX}sweep-{sweep}"


def tasks_of_array(root: Root, job_id: str) -> tuple[Task, ...]:
    """The tasks that the array `job_id` was submitted with; empty where it is none of this ROOT's."""
    members = members_of(root, job_id)
    return tuple(Task(task, member, log_of(root, task)) for task, member in members.items())


def queued_tasks(sweep: Sweep, root: Root) -> tuple[Task, ...]:
    """The tasks of the sweep that wait or run; empty where Slurm doesn't say.

    Raises SlurmError where a job of another command trains one of its runs, MismatchError where there is no
    Slurm on this machine.
    """
    try:
        listed = [job for job in my_jobs() if not _is_done(job, root)]
    except NoAnswerError:  # sbatch will say what is the matter
        return ()
    _check_runs_are_free(sweep, listed)
    there = {job.id for job in listed if job.name == job_name(sweep.name)}
    arrays = sorted({array_id(job_id) for job_id in there}, key=len)
    return tuple(task for array in arrays for task in tasks_of_array(root, array) if task.id in there)


def _is_done(job: Listed, root: Root) -> bool:
    # Not COMPLETING alone: such a one may be on the way back into the queue.
    progress = read_progress(progress_path(root, job.id))
    return progress is not None and progress.ended == 0


def _check_runs_are_free(sweep: Sweep, listed: Sequence[Listed]) -> None:
    names = {f"{PREFIX}train-{member.run}" for member in sweep.members}
    for job in listed:
        if job.name in names:
            raise SlurmError(
                f"The job {job.id} ({job.name}) trains a run of the sweep already: {job.state.lower()}.",
                remedy=f"Wait for its end: envbuilder status --follow {job.id}; or scancel {job.id}",
                context={"job": job.id},
            )


def check_no_sweep_trains(run_name: str, root: Root, *, after: str | None) -> None:
    """SlurmError where a sweep's task, but for the job `after`, waits or runs for the run `run_name`."""
    try:
        jobs = own_jobs(root)
    except (NoAnswerError, MismatchError):  # sbatch will say what is the matter
        return
    for job in jobs:
        if job.run == run_name and job.listed.id != after and not _is_done(job.listed, root):
            raise SlurmError(
                f"The job {job.listed.id} of a sweep trains this run already: {job.listed.state.lower()}.",
                remedy=f"envbuilder status --follow {job.listed.id}; or submit with --after {job.listed.id}",
                context={"job": job.listed.id},
            )


def largest_array() -> int | None:
    """One more than the highest index that an array may have; None where Slurm doesn't say.

    Raises SlurmError where the cluster takes no arrays.
    """
    largest = max_array_size()
    if largest == 0:
        raise SlurmError(
            "This cluster takes no job arrays (MaxArraySize is 0).",
            remedy="Train each run by itself: envbuilder train CONFIG --recipe NAME --sbatch --site SITE",
        )
    return largest


def next_array(
    sweep: str, rest: Sequence[Member], *, room: int | None, largest: int | None, at_once: int | None
) -> Array:
    """The array of the first of the members `rest`: of as many as there is `room` for (None: for all), with
    indices below `largest` (None: without a limit)."""
    numbers = [member.index for member in rest]
    first = numbers[0] - numbers[0] % largest if largest else 0
    within = [number for number in numbers if largest is None or number < first + largest][:room]
    return Array(sweep, tuple(within), first, at_once, later=len(rest) - len(within))
