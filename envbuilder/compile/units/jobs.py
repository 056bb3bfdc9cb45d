"""How much may run at once: the CPUs and the memory that this process really has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from envbuilder.cgroup import control_group_limits

_MEMORY_OF_NO_REPORT = 4 << 30
"""Bytes that are taken for there where nothing tells of any."""
_UNITS = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}
"""Powers of two of Slurm's suffixes; without one, sbatch(1) counts in MiB."""


@dataclass(frozen=True)
class MachineLimits:
    """What may be used here."""

    cpus: int
    """At least one."""
    memory: int
    """Bytes: what is free, or the smallest limit if that is less. The tool itself lives in it too."""
    source: str
    """Which limits these are, for people: "16 CPUs (SLURM_CPUS_ON_NODE), 60.0 GiB (control group)"."""


def machine_limits(system: Path = Path("/"), environment: Mapping[str, str] | None = None) -> MachineLimits:
    """The smallest of all limits on this process: a node has more than a job of the batch system may use.

    `system` is the folder that holds `proc` and `sys`; `environment` the variables, by default one's own.
    A variable that isn't a number sets no limit.
    """
    variables = os.environ if environment is None else environment
    group = control_group_limits(system)
    cpus: list[tuple[float, str]] = [(len(os.sched_getaffinity(0)), "affinity")]
    if group.cpus:
        cpus.append((group.cpus, "control group"))
    cpus += _slurm_cpus(variables)
    few, cpus_source = min(cpus, key=lambda limit: limit[0])
    count = max(1, math.ceil(few))
    memory: list[tuple[float, str]] = [(_available_memory(system), "available")]
    if group.memory:
        memory.append((group.memory, "control group"))
    memory += _slurm_memory(variables)
    little, memory_source = min(memory, key=lambda limit: limit[0])
    if math.isinf(little):
        little, memory_source = _MEMORY_OF_NO_REPORT, "nothing tells"
    size = f"{little / (1 << 30):.1f} GiB"
    words = f"{count} CPU{'s' if count > 1 else ''} ({cpus_source}), {size} ({memory_source})"
    return MachineLimits(count, int(little), words)


def _slurm_cpus(variables: Mapping[str, str]) -> list[tuple[float, str]]:
    """What sbatch(1) and srun(1) give this job, or this task where a step has several."""
    tasks = _number(variables, "SLURM_STEP_NUM_TASKS")
    names = ["SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"]
    if tasks and tasks > 1:
        # Other tasks of the step are on this node too, and CPUS_ON_NODE is for all of them.
        names.reverse()
    return next(([(count, name)] for name in names if (count := _number(variables, name))), [])


def _slurm_memory(variables: Mapping[str, str]) -> list[tuple[float, str]]:
    whole, each = (_memory(variables, f"SLURM_MEM_PER_{kind}") for kind in ("NODE", "CPU"))
    if whole:
        return [(whole, "SLURM_MEM_PER_NODE")]
    cpus = _number(variables, "SLURM_CPUS_ON_NODE") or _number(variables, "SLURM_CPUS_PER_TASK")
    return [(each * cpus, "SLURM_MEM_PER_CPU")] if each and cpus else []


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _memory(variables: Mapping[str, str], name: str) -> int | None:
    """Bytes; None without a limit, which 0 means too: all memory of the node."""
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", variables.get(name, ""), re.IGNORECASE)
    return int(found[1]) << _UNITS[found[2].upper()] or None if found else None


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
