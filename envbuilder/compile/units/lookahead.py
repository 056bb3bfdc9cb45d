"""Plays the broker's policy through: when all work would end, were the estimates true. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from envbuilder.compile.units.records import SPLIT_MEMORY, Estimate

SPLIT_SECONDS = {1: 1.0, 2: 0.72, 3: 0.65, 4: 0.6}
"""Wall time of a unit on so many CPUs, by that on one: measured on units of 115 and 150 s."""


class Share(NamedTuple):
    """What a unit has of the machine, and for how long."""

    seconds: float
    threads: int
    memory: int


def share_of(estimate: Estimate, threads: int = 1) -> Share:
    return Share(estimate.seconds * SPLIT_SECONDS[threads], threads, split_memory(estimate.memory, threads))


def play(running: Sequence[Share], waiting: Sequence[Share], *, cpus: int, memory: int) -> float:
    """When the last of `running` and `waiting` ends: longest first, as CPUs and memory become free."""
    ends = list(running)
    heapq.heapify(ends)
    free = cpus - sum(unit.threads for unit in running)
    used = sum(unit.memory for unit in running)
    queue = sorted(waiting, reverse=True)
    now = 0.0
    while queue or ends:
        fitting = (
            number
            for number, unit in enumerate(queue)
            if not ends or (unit.threads <= free and used + unit.memory <= memory)
        )
        index = next(fitting, None) if free > 0 else None
        if index is not None:
            unit = queue.pop(index)
            heapq.heappush(ends, unit._replace(seconds=now + unit.seconds))
            free, used = free - unit.threads, used + unit.memory
        else:
            ended = heapq.heappop(ends)
            now, free, used = ended.seconds, free + ended.threads, used - ended.memory
    return now


def split_memory(memory: int, threads: int) -> int:
    return int(memory * SPLIT_MEMORY) if threads > 1 else memory
