"""How many compilers may run at once: by the CPUs and the memory that this process really has."""

from __future__ import annotations

import math
import os
from pathlib import Path

from envbuilder.cgroup import control_group_limits

_MEMORY_PER_JOB = 4 << 30
"""Bytes: the largest translation units of these packages take 3 to 6 GB."""


def max_jobs(system: Path = Path("/")) -> int:
    """Compilers to run at once, at least one: a node has more than a job of the batch system may use.

    `system` is the folder that holds `proc` and `sys`.
    """
    limits = control_group_limits(system)
    cpus = min(float(len(os.sched_getaffinity(0))), limits.cpus or math.inf)
    memory = min(_available_memory(system), limits.memory or math.inf)
    return max(1, int(min(math.ceil(cpus), memory / _MEMORY_PER_JOB)))


def _available_memory(system: Path) -> float:
    """Bytes; infinite where the kernel doesn't tell."""
    try:
        lines = (system / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    # proc_meminfo(5) counts in KiB.
    return next(
        (float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf
    )
