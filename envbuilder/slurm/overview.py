"""The tool's own jobs that wait or run, each with how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.paths import Root
from envbuilder.progress_file import Progress, progress_path, read_progress
from envbuilder.slurm.waiting import waiting_for
from envbuilder.slurm_queries import PREFIX, Listed, my_jobs


@dataclass(frozen=True, slots=True)
class JobNow:
    """One job as it is now."""

    listed: Listed
    progress: Progress | None
    """None where it wrote none, or writes it under another ROOT."""
    log: Path | None
    """None where it is not under this ROOT (yet)."""

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
    return [JobNow(job, read_progress(progress_path(root, job.id)), find_log(root, job.id)) for job in jobs]


def _is_own(job: Listed) -> bool:
    return job.name.startswith(PREFIX)


def find_log(root: Root, job_id: str) -> Path | None:
    """The log of the job under this ROOT; None where there is none."""
    return next(iter(sorted((root.logs / "slurm").glob(f"*-{job_id}.log"))), None)


def log_of(root: Root, job_id: str) -> Path:
    """Where the job's log is, or will be: a job that still waits has none.

    Raises InputError where `job_id` is no job's number.
    """
    if not job_id.isdigit():
        raise InputError(
            f"{job_id!r} is no job's number.", remedy="Give one that is listed by: envbuilder status"
        )
    if log := find_log(root, job_id):
        return log
    name = next((job.name for job in my_jobs() if job.id == job_id), f"{PREFIX}compile")
    return root.logs / "slurm" / f"{name.removeprefix(PREFIX)}-{job_id}.log"
