"""How many compilers may run at once: by the CPUs and the memory that this process really has."""

from __future__ import annotations

import math
import os
from pathlib import Path

_MEMORY_PER_JOB = 4 << 30
"""Bytes: the largest translation units of these packages take 3 to 6 GB."""


def max_jobs(system: Path = Path("/")) -> int:
    """Compilers to run at once, at least one: a node has more than a job of the batch system may use.

    `system` is the folder that holds `proc` and `sys`.
    """
    groups = _control_groups(system)
    cpus = min([float(len(os.sched_getaffinity(0))), *(_cpu_quota(group) for group in groups)])
    memory = min([_available_memory(system), *(_memory_limit(group) for group in groups)])
    return max(1, int(min(math.ceil(cpus), memory / _MEMORY_PER_JOB)))


def _control_groups(system: Path) -> list[Path]:
    """This process's control groups and those above them, for version 2 and for version 1's memory."""
    folders = []
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory", "cpu", "cpu,cpuacct"):
            top = system / "sys/fs/cgroup" / controllers
            group = top / path.lstrip("/")
            folders += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return folders


def _cpu_quota(group: Path) -> float:
    """CPUs; infinite where there is no limit."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    try:
        limit = float(quota) / float(period)
    except ValueError:
        return math.inf
    return limit if limit > 0 else math.inf


def _memory_limit(group: Path) -> float:
    """Bytes; infinite where there is no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _read(group / name)
        if text.isdigit():
            return float(text)
    return math.inf


def _available_memory(system: Path) -> float:
    for line in _read(system / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
