"""What the tool's jobs do, in the words that following, verdicts and requeueing need. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from envbuilder.report import Unit


@dataclass(frozen=True)
class Work:
    """One kind of job."""

    unit: Unit
    """What its progress counts, in the plural."""
    ready: str
    """What a counted unit is."""
    kept: str
    """What is left of a job that ended too early, as a sentence without its full stop."""
    goes_on: str
    """What the command that goes on with it has to have beside what was typed, to run itself again."""
    most_lives: int
    """How often one job runs: whoever needs more should look at the walltime."""


COMPILING = Work("units", "ready", "What was built is kept", " --requeue", 21)
TRAINING = Work("steps", "done", "The run's checkpoints are kept", "", 500)


def work_of(job_name: str) -> Work:
    """What the job (or the log) called `job_name` does: names of jobs begin with it."""
    return TRAINING if job_name.startswith(("train-", "sweep-")) else COMPILING
