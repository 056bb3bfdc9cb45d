"""How the processes agree between two steps: on the host, so that no GPU has to be waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.parallel import World

T = TypeVar("T")


class Control:
    """A second way between the processes, over gloo; a CPU run's own way is gloo already."""

    def __init__(self, world: World) -> None:
        self._size = world.size
        apart = world.size > 1 and world.device.type == "cuda"
        self._group = dist.new_group(backend="gloo") if apart else None

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any process has it up. One message of a few bytes."""
        if self._size == 1:
            return list(flags)
        raised = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on every process."""
        if self._size == 1:
            return [value]
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every process."""
        values: list[Any] = [value]
        if self._size > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        received: T = values[0]
        return received
