"""The tool's own jobs that wait or run, each with how far it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.paths import Root
from envbuilder.progress_file import Progress, progress_path, read_progress
from envbuilder.slurm.submit import array_id, array_of, log_of_submitted
from envbuilder.slurm.waiting import waiting_for
from envbuilder.slurm.work import Work, work_of
from envbuilder.slurm_queries import PREFIX, Listed, my_jobs
from envbuilder.sweep import Member
from envbuilder.sweep_record import read_sweep


@dataclass(frozen=True)
class JobNow:
    """One job as it is now."""

    listed: Listed
    progress: Progress | None
    """None where it wrote none, or writes it under another ROOT."""
    log: Path | None
    """None where it is not under this ROOT (yet)."""
    run: str | None = None
    """Of a task of a sweep, the run that it trains."""

    @property
    def work(self) -> Work:
        """What kind of job it is."""
        return work_of(self.listed.name.removeprefix(PREFIX))

    @property
    def waits_for(self) -> str | None:
        """Why it waits, in words; None where it does not."""
        if self.listed.state != "PENDING":
            return None
        job = self.listed
        return waiting_for(job.reason, job_id=job.id, partition=job.partition, qos=job.qos).words


def own_jobs(root: Root, recipe_name: str | None = None) -> list[JobNow]:
    """The user's jobs that this tool submitted; with `recipe_name`, those that compile it.

    Raises queries.NoAnswerError where Slurm does not answer, MismatchError where it is not on this machine.
    """
    wanted = PREFIX if recipe_name is None else f"{PREFIX}compile-{recipe_name}"
    jobs = [job for job in my_jobs() if job.name == wanted or (recipe_name is None and _is_own(job))]
    runs = _SweptRuns(root)
    return [
        JobNow(job, read_progress(progress_path(root, job.id)), find_log(root, job.id), runs.of(job.id))
        for job in jobs
    ]


class _SweptRuns:
    """The runs of arrays' tasks; what is noted of an array and its sweep is read once."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._known: dict[str, dict[str, Member]] = {}

    def of(self, job_id: str) -> str | None:
        if "_" not in job_id:
            return None
        array = array_id(job_id)
        if array not in self._known:
            self._known[array] = members_of(self._root, array)
        member = self._known[array].get(job_id)
        return member.run if member else None


def members_of(root: Root, job_id: str) -> dict[str, Member]:
    """Task's id → the member that it trains, of all tasks of the array `job_id`; empty where it is none."""
    array = array_of(root, job_id)
    sweep = read_sweep(root, array.sweep) if array else None
    if array is None or sweep is None:
        return {}
    return {f"{job_id}_{index - array.first}": sweep.members[index] for index in array.members}


def _is_own(job: Listed) -> bool:
    return job.name.startswith(PREFIX)


def find_log(root: Root, job_id: str) -> Path | None:
    """The log of the job under this ROOT; None where there is none."""
    return next(iter(sorted((root.logs / "slurm").glob(f"*-{job_id}.log"))), None)


def log_of(root: Root, job_id: str) -> Path:
    """Where the job's log is, or will be: a job that still waits has none.

    Raises InputError where `job_id` is no job's number ("123", or "123_4" of an array's task).
    """
    if not re.fullmatch(r"\d+(_\d+)?", job_id):
        raise InputError(
            f"{job_id!r} is no job's number.", remedy="Give one that is listed by: envbuilder status"
        )
    return (
        log_of_submitted(root, job_id)
        or find_log(root, job_id)
        or root.logs / "slurm" / f"compile-{job_id}.log"
    )
