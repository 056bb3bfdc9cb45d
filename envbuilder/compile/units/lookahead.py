"""Plays the broker's policy through: when all work would end, were the estimates true. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from envbuilder.compile.units.records import SPLIT_MEMORY, Estimate

SPLIT_SECONDS = {1: 1.0, 2: 0.72, 3: 0.65, 4: 0.6}
"""Wall time of a unit on so many CPUs, by that on one: measured on units of 115 and 150 s."""
SPLIT_CPUS = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
"""CPUs that it keeps busy in the mean, for part of its way goes on one: on two, 150 CPU seconds in 102 s."""


class Share(NamedTuple):
    """What a unit has of the machine, and for how long."""

    seconds: float
    cpus: float
    """In the mean."""
    memory: int


def share_of(estimate: Estimate, threads: int = 1) -> Share:
    seconds, memory = estimate.seconds * SPLIT_SECONDS[threads], split_memory(estimate.memory, threads)
    return Share(seconds, SPLIT_CPUS[threads], memory)


def play(running: Sequence[Share], waiting: Sequence[Share], *, cpus: int, memory: int) -> float:
    """When the last of `running` and `waiting` ends: longest first, as CPUs and memory become free."""
    ends = list(running)
    heapq.heapify(ends)
    free = cpus - sum(unit.cpus for unit in running)
    used = sum(unit.memory for unit in running)
    queue = sorted(waiting, reverse=True)
    now = 0.0
    while queue or ends:
        fitting = (
            number
            for number, unit in enumerate(queue)
            if not ends or (unit.cpus <= free and used + unit.memory <= memory)
        )
        index = next(fitting, None) if free >= 1 or not ends else None
        if index is not None:
            unit = queue.pop(index)
            heapq.heappush(ends, unit._replace(seconds=now + unit.seconds))
            free, used = free - unit.cpus, used + unit.memory
        else:
            ended = heapq.heappop(ends)
            now, free, used = ended.seconds, free + ended.cpus, used - ended.memory
    return now


def split_memory(memory: int, threads: int) -> int:
    return int(memory * SPLIT_MEMORY) if threads > 1 else memory
