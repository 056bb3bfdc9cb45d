"""Before a job is submitted: whether its QoS takes it now, and how long it is to run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envbuilder.errors import SlurmError
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.progress_file import progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.site import JobSpec, Site
from envbuilder.slurm.pace import Pace, usual_pace
from envbuilder.slurm.walltime import Walltime, choose_walltime
from envbuilder.slurm_queries import (
    PREFIX,
    Listed,
    NoAnswerError,
    account_limit,
    ask,
    my_jobs,
    partition_wall_s,
    qos_limits,
)
from envbuilder.slurm_time import seconds_of

_ACCOUNT_S = 20.0


def planned_walltime(spec: JobSpec, estimate_s: float | None) -> Walltime:
    """How long a job of `spec` is to run for work of `estimate_s` seconds (None: nobody knows).

    Never longer than the section's walltime, nor than what QoS and partition allow, as far as Slurm says.
    """
    site_s = seconds_of(spec.walltime)
    assert site_s is not None, spec.walltime  # the site file's own check holds it
    if estimate_s is None:
        return choose_walltime(site_s, None)
    limits = (
        qos_limits(spec.qos).wall_s if spec.qos else None,
        partition_wall_s(spec.partition) if spec.partition else None,
    )
    return choose_walltime(site_s, estimate_s, limits)


def check_run_is_free(name: str, root: Root, *, after: str | None = None) -> None:
    """SlurmError where a job called `name`, under this ROOT, already waits or runs, but for the job `after`.

    Another ROOT may have a run of that name: a job's script tells them apart.
    """
    try:
        listed = ask("squeue", "--me", "-h", f"--name={PREFIX}{name}", "-o", "%i|%T|%o")
    except NoAnswerError:  # sbatch will say what is the matter
        return
    for job_id, state, script in (line.split("|", 2) for line in listed.splitlines() if line.count("|") > 1):
        is_over = (progress := read_progress(progress_path(root, job_id))) and progress.ended == 0
        if job_id != after and Path(script).parent == scripts_folder(root) and not is_over:
            raise SlurmError(
                f"The job {job_id} already trains this run: it is {state.lower()}.",
                remedy=f"envbuilder status --follow {job_id}; or submit the next one with --after {job_id}",
                context={"job": job_id, "script": script},
            )


def scripts_folder(root: Root) -> Path:
    """Where the scripts and logs of jobs lie."""
    return root.logs / "slurm"


@dataclass(frozen=True)
class _Limit:
    """How many jobs of the user a QoS or an account takes, queued and running together."""

    most: int
    kind: Literal["QoS", "account"]
    name: str

    def there(self, root: Root) -> list[Listed]:
        """Those that are in it; none where Slurm does not answer: sbatch will say what is the matter."""
        try:
            jobs = my_jobs(self.name) if self.kind == "QoS" else my_jobs(account=self.name)
        except NoAnswerError:
            return []
        return [job for job in jobs if not _is_over(job, root)]

    def in_the_way(self, root: Root) -> list[Listed]:
        """Those that are in it, where it takes no further one."""
        there = self.there(root)
        return there if len(there) >= self.most else []


def _limits(spec: JobSpec) -> list[_Limit]:
    limits: list[_Limit] = []
    if spec.qos is not None and (most := qos_limits(spec.qos).jobs) is not None:
        limits.append(_Limit(most, "QoS", spec.qos))
    if (charged := account_limit(spec.account or os.environ.get("SBATCH_ACCOUNT"))) is not None:
        limits.append(_Limit(charged[0], "account", charged[1]))
    return limits


def room_for_jobs(spec: JobSpec, root: Root) -> int | None:
    """How many more jobs of the user QoS and account of `spec` take now; None where there is no limit."""
    return min((max(0, limit.most - len(limit.there(root))) for limit in _limits(spec)), default=None)


def check_qos_is_free(spec: JobSpec, root: Root, again: str) -> None:
    """SlurmError where QoS or account of `spec` take no further job of the user now, with what is in it.

    `again` is the command that was typed, for the remedy.
    """
    for limit in _limits(spec):
        if there := limit.in_the_way(root):
            raise SlurmError(
                f"The {limit.kind} {limit.name} takes no further job of yours now; in it: {_listed(there)}.",
                remedy=f"Have it submitted once there is room: {again} --wait-for-qos; or cancel one: "
                f"scancel {there[0].id}",
                context={limit.kind.lower(): limit.name, "jobs": ", ".join(job.id for job in there)},
            )


def tell_account(site: Site, spec: JobSpec, reporter: Reporter) -> None:
    """Says what the site's account-command shows, and which account is charged; nothing without that key.

    The command's failure is told, and keeps nothing from being submitted.
    """
    if site.account_command is None:
        return
    account = spec.account or os.environ.get("SBATCH_ACCOUNT")
    reporter.note(f"charged to {f'the account {account}' if account else 'your default account'}")
    shown = run(("bash", "-c", site.account_command), timeout_s=_ACCOUNT_S)
    if text := shown.output.rstrip():
        reporter.note(text)
    if shown.timed_out:
        reporter.warn(f"{site.account_command}: stopped after {_ACCOUNT_S:.0f} s")
    elif shown.returncode != 0:
        reporter.warn(f"{site.account_command}: ended with {shown.returncode}")


def wait_for_qos(spec: JobSpec, root: Root, reporter: Reporter, *, pace: Pace | None = None) -> None:
    """Waits until QoS and account of `spec` take another job of the user, as far as Slurm says."""
    told, pace = "", pace or usual_pace()
    for limit in _limits(spec):
        while there := limit.in_the_way(root):
            words = _listed(there, with_times=False)
            if words != told:
                told = words
                reporter.stage(f"waiting for the {limit.kind} {limit.name}; in it: {_listed(there)}")
            time.sleep(pace.ask_s)


def _is_over(job: Listed, root: Root) -> bool:
    """Whether the job has said itself that it is done: Slurm may take a moment longer to clear it away."""
    progress = read_progress(progress_path(root, job.id))
    return job.state == "COMPLETING" or (progress is not None and progress.ended == 0)


def _listed(jobs: list[Listed], *, with_times: bool = True) -> str:
    return "; ".join(
        f"{job.id} {job.name} ({job.state.lower()}{f', at most {job.left} left' if with_times else ''})"
        for job in jobs
    )
