"""What a batch script asks Slurm for, in numbers, as sbatch's manual page has its options. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Amounts:
    """Of the whole job. Of a range of nodes, the most."""

    nodes: int
    cpus: int
    gpus: int


def amounts_of(options: Mapping[str, str]) -> Amounts:
    """What sbatch's `options` (long name → value) come to."""
    nodes, tasks = _nodes_and_tasks(options)
    gpus = _gpus(options, nodes, tasks)
    if "cpus-per-gpu" in options:
        return Amounts(nodes, gpus * _number(options["cpus-per-gpu"], 1), gpus)
    return Amounts(nodes, tasks * _number(options.get("cpus-per-task"), 1), gpus)


def _nodes_and_tasks(options: Mapping[str, str]) -> tuple[int, int]:
    per_node = _number(options.get("ntasks-per-node"), 0)
    nodes = _nodes(options["nodes"]) if "nodes" in options else None
    if "ntasks" not in options:
        return nodes or 1, (nodes or 1) * (per_node or 1)
    tasks = _number(options["ntasks"], 1)
    # Slurm gives no node that has no task.
    return min(nodes or (-(-tasks // per_node) if per_node else 1), tasks), tasks


def _nodes(asked: str) -> int:
    """The most of "2", "1-4", "1,2,8" and "1-15:4"."""
    return max((int(number) for number in re.findall(r"(?<![:\d])\d+", asked)), default=1)


def _gpus(options: Mapping[str, str], nodes: int, tasks: int) -> int:
    """Those that are asked for, by the first of the options that say how many."""
    times = {"gpus": 1, "gpus-per-node": nodes, "gres": nodes, "gpus-per-task": tasks}
    name = next((name for name in times if name in options), None)
    if name is None:
        return 0
    asked = options[name].split(",")
    if name == "gres":
        asked = [found[1] for one in asked if (found := re.fullmatch(r"(?:gres[:/])?gpu[:/]?(.*)", one))]
    return times[name] * sum(_number(one.rpartition(":")[2], 1) for one in asked)


def _number(text: str | None, otherwise: int) -> int:
    """`otherwise` for what is no number, as the name in "gpu:a100", which asks for one."""
    return int(text) if text and text.isdigit() else otherwise
