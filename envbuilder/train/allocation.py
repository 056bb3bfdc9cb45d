"""Where a run's processes are: the nodes of the Slurm job that this is a part of, and when it ends."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from envbuilder.cgroup import control_group_limits
from envbuilder.errors import MismatchError
from envbuilder.report import Reporter
from envbuilder.site import NODE_SUFFIX_VARIABLE
from envbuilder.slurm_queries import NoAnswerError, ask

END_VARIABLE = "ENVBUILDER_JOB_END"
"""Unix seconds, for the trainer: it stops in good order before."""
_BEGIN_VARIABLE = "SLURM_JOB_START_TIME"
"""The same of its beginning. Newer versions of Slurm than 22.05 set it themselves."""
_FIRST_PORT, _PORTS = 15_000, 15_000
"""Below the ports that Linux hands out by itself (from 32768)."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job."""

    nodes: int = 1
    first: str = ""
    """Name by which the others reach the first node; empty outside of a job of several nodes."""
    port: int = 0
    """Where the processes meet on the first node: another one for each job and each life of it."""
    meeting: str = ""
    """Name of the meeting."""


def find_allocation(environ: Mapping[str, str]) -> Allocation:
    """The nodes that this job has; one, outside of a job. MismatchError where Slurm doesn't name them."""
    nodes = environ.get("SLURM_JOB_NUM_NODES", "1")
    job_id, names = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_JOB_NODELIST", "")
    if not (nodes.isdigit() and int(nodes) > 1 and job_id.isdigit()):
        return Allocation()
    try:
        first = ask("scontrol", "show", "hostnames", names).split()[0]
    except (NoAnswerError, IndexError) as error:
        raise MismatchError(
            f"Slurm does not tell the names of the job's {nodes} nodes.",
            remedy=f"scontrol show hostnames '{names}'",
            context={"job": job_id, "error": error},
        ) from error
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return Allocation(
        int(nodes),
        name_of_node(first, environ),
        _FIRST_PORT + (int(job_id) + restarts) % _PORTS,
        f"{job_id}-{restarts}",
    )


def name_of_node(name: str, environ: Mapping[str, str]) -> str:
    """By what name the others reach the node that Slurm calls `name`: the site's node-suffix is added."""
    return name + environ.get(NODE_SUFFIX_VARIABLE, "")


def job_times(environ: Mapping[str, str], time_limit_s: int | None, reporter: Reporter) -> dict[str, str]:
    """The variables that tell the trainer when its job began and must have ended; empty where nothing does.

    The end is the earlier one of the Slurm job's and `time_limit_s` from now.
    """
    times = _slurm_times(environ, reporter) if environ.get("SLURM_JOB_ID", "").isdigit() else {}
    if time_limit_s is not None:
        limit = int(time.time()) + time_limit_s
        times[END_VARIABLE] = min(limit, times.get(END_VARIABLE, limit))
    return {name: str(seconds) for name, seconds in times.items()}


def _slurm_times(environ: Mapping[str, str], reporter: Reporter) -> dict[str, int]:
    try:
        shown = ask("scontrol", "--oneliner", "show", "job", environ["SLURM_JOB_ID"])
    except (NoAnswerError, MismatchError) as error:
        reporter.warn(f"Slurm does not tell when this job ends: {str(error).splitlines()[0]}")
        return {}
    times = {}
    for field, name in (("StartTime", _BEGIN_VARIABLE), ("EndTime", END_VARIABLE)):
        if found := re.search(rf"\s{field}=(\d{{4}}-\S+)", shown):
            times[name] = int(datetime.fromisoformat(found[1]).timestamp())
    return times


def cpus_here() -> int:
    """CPUs that this process may keep busy: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    quota = control_group_limits().cpus
    return max(1, allowed if quota is None else min(allowed, int(quota)))
