"""Before a job is submitted: whether its QoS takes it now, and how long it is to run."""

from __future__ import annotations

import time

from envbuilder.errors import SlurmError
from envbuilder.report import Reporter
from envbuilder.site import JobSpec
from envbuilder.slurm.walltime import Walltime, choose_walltime
from envbuilder.slurm_queries import Listed, NoAnswerError, my_jobs, partition_wall_s, qos_limits
from envbuilder.slurm_time import seconds_of

_LOOK_S, _LONGEST_S = 5.0, 60.0


def planned_walltime(spec: JobSpec, estimate_s: float | None) -> Walltime:
    """How long a job of `spec` is to run for work of `estimate_s` seconds (None: nobody knows).

    Never longer than the section's walltime, nor than what QoS and partition allow, as far as Slurm says.
    """
    site_s = seconds_of(spec.walltime)
    assert site_s is not None, spec.walltime  # the site file's own check holds it
    if estimate_s is None:
        return choose_walltime(site_s, None)
    limits = (qos_limits(spec.qos).wall_s if spec.qos else None, partition_wall_s(spec.partition))
    return choose_walltime(site_s, estimate_s, limits)


def check_qos_is_free(spec: JobSpec, again: str) -> None:
    """SlurmError where the QoS of `spec` takes no further job of the user now, with what is in it.

    `again` is the command that was typed, for the remedy.
    """
    if spec.qos is None or not (there := _in_the_way(spec.qos)):
        return
    raise SlurmError(
        f"The QoS {spec.qos} takes no further job of yours now; in it: {_listed(there)}.",
        remedy=f"Have it submitted once there is room: {again} --wait-for-qos; or cancel one: "
        f"scancel {there[0].id}",
        context={"qos": spec.qos, "jobs": ", ".join(job.id for job in there)},
    )


def wait_for_qos(spec: JobSpec, reporter: Reporter, *, look_s: float = _LOOK_S) -> None:
    """Waits until the QoS of `spec` takes another job of the user, as far as Slurm says."""
    told, interval = "", look_s
    while spec.qos is not None and (there := _in_the_way(spec.qos)):
        words = _listed(there, with_times=False)
        if words != told:
            told, interval = words, look_s
            reporter.stage(f"waiting for the QoS {spec.qos}; in it: {_listed(there)}")
        time.sleep(interval)
        interval = min(interval * 1.5, _LONGEST_S)


def _in_the_way(qos: str) -> list[Listed]:
    """The user's jobs in `qos`, where they are as many as it takes."""
    most = qos_limits(qos).jobs
    if most is None:
        return []
    try:
        there = my_jobs(qos)
    except NoAnswerError:  # sbatch will say what is the matter
        return []
    return there if len(there) >= most else []


def _listed(jobs: list[Listed], *, with_times: bool = True) -> str:
    return "; ".join(
        f"{job.id} {job.name} ({job.state.lower()}{f', at most {job.left} left' if with_times else ''})"
        for job in jobs
    )
