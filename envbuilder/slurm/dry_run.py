"""What a job would come to, without submitting it: when it would start, and what it would cost."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from envbuilder.report import Reporter
from envbuilder.slurm.amounts import amounts_of
from envbuilder.slurm.plan import Plan
from envbuilder.slurm.preflight import tell_account
from envbuilder.slurm.rejections import rejection_error
from envbuilder.slurm.submit import run_sbatch
from envbuilder.slurm.template import head_options

_HOUR_S = 3600


@dataclass(frozen=True)
class Start:
    """What `sbatch --test-only` expects, were the job submitted now."""

    at: str
    """Local time, ISO 8601."""
    processors: int
    """That the job would get, and be charged for: whole nodes' where they are not shared."""
    nodes: str
    """As Slurm writes lists of nodes."""
    partition: str


@dataclass(frozen=True)
class Hours:
    """What some wall time on the job's nodes is charged with."""

    gpu_hours: float
    core_hours: float


@dataclass(frozen=True)
class DryRun:
    """What a plan would come to."""

    script: str
    start: Start | None
    """None where Slurm would take the job, and says nothing of when."""
    walltime_s: int
    """Of one job, at most."""
    one_job: Hours
    """Of one job that runs to its time limit."""
    estimate_s: float | None
    """Of the whole work, of all jobs that it takes; None where nobody knows."""
    whole: Hours | None
    jobs: int | None
    """How many jobs of that length, or lives of one, the work is expected to take."""
    own_options: tuple[str, ...]
    """What the user's template asks for itself, in place of the site file; the hours are of that."""
    runs: int
    """How many a sweep still has; all of the above is of one of them."""
    all_runs: Hours
    """Of all of them, by the estimate; without one, where each runs one job to its time limit."""


def dry_run(plan: Plan, reporter: Reporter) -> DryRun:
    """Asks Slurm what would become of `plan`; nothing is submitted, and nothing is left on the disk.

    Raises SlurmError where Slurm would refuse the job, MismatchError where there is no sbatch.
    """
    script = plan.script
    with tempfile.TemporaryDirectory(prefix="envbuilder-dry-run-") as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script, encoding="utf-8")
        answer = run_sbatch("--test-only", path)
    if answer.returncode != 0:
        raise rejection_error(answer.output, plan.spec)
    tell_account(plan.site, plan.spec, reporter)
    start = parse_start(answer.output)
    estimate_s = plan.wishes.estimate_s
    array = plan.job.array
    runs = len(array.members) + array.later if array else 1
    return DryRun(
        script=script,
        start=start,
        walltime_s=plan.walltime.seconds,
        one_job=_hours(plan, start, plan.walltime.seconds),
        estimate_s=estimate_s,
        whole=None if estimate_s is None else _hours(plan, start, estimate_s),
        jobs=None if estimate_s is None else plan.walltime.jobs,
        own_options=plan.own_options,
        runs=runs,
        all_runs=_hours(plan, start, runs * (plan.walltime.seconds if estimate_s is None else estimate_s)),
    )


def parse_start(said: str) -> Start | None:
    """The line "Job N to start at … using … processors on nodes … in partition …" in what sbatch said."""
    found = re.search(
        r"Job \d+ to start at (\S+) (?:a )?using (\d+) processors on (?:nodes )?(\S+)"
        r"(?: in partition (\S+))?",
        said,
    )
    return Start(found[1], int(found[2]), found[3], found[4] or "") if found else None


def _hours(plan: Plan, start: Start | None, seconds: float) -> Hours:
    asked = amounts_of(head_options(plan.script))
    cores = start.processors if start else asked.cpus
    return Hours(asked.gpus * seconds / _HOUR_S, cores * seconds / _HOUR_S)
