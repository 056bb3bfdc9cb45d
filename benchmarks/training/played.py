"""Our trainer as one of several processes that share the base, on a single GPU: the others are played.

Its weights are sharded as they would be, in place or by FSDP2, over a process group that moves nothing. What
the others would send comes from a kernel that writes as many bytes at a link's rate, and holds as many
multiprocessors meanwhile as NCCL's would; the bytes are this process's own, so the losses mean nothing. The
GPU's and the host's time goes where it does with real processes, except for waiting until all have come.

Options: processes=4, link=370 (GB/s that each receives), held=24 (multiprocessors).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.training.ours import Ours
from benchmarks.training.work import Work
from trainer.metrics import Metrics
from trainer.outcome import Progress
from trainer.parallel import World, device_of
from trainer.prepare import prepare
from trainer.reading import read_config

SMALLEST_MESSAGE = 2**20
"""Bytes; what is smaller takes no time here."""


class Link:
    """What each process receives from the others, at a rate in bytes a nanosecond."""

    def __init__(self, rate: float, held: int) -> None:
        self._rate, self._held = rate, held

    def receive(self, own: Tensor, into: Tensor) -> None:
        """Fills all of `into` but its first part, of `own`'s size, on the current stream."""
        if own.device.type != "cuda":
            into.view(-1, own.numel())[1:] = own
            return
        from benchmarks.training.played_kernel import receive

        receive(own, into, rate=self._rate, programs=self._held)

    def gather(self, whole: Tensor, part: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """In place of `all_gather_into_tensor`."""
        whole[: part.numel()].copy_(part)
        self.receive(part, whole)


@dataclass(frozen=True)
class Played(World):
    """Where all processes have the same."""

    link: Link | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        if self.link and tensor.is_cuda and tensor.nbytes >= SMALLEST_MESSAGE:
            # A ring sends everything around twice, but for each one's own part.
            parts = torch.empty(
                2 * self.size - 1, tensor.numel() // self.size, dtype=tensor.dtype, device=tensor.device
            )
            self.link.receive(parts[0], parts)
        return tensor.mul_(self.size)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def from_first(self, value: Any) -> Any:
        return value


class FSDP2Gather:
    """For `set_custom_all_gather`. FSDP2 has put this process's own part in its place already."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self._link.receive(input_tensor, output_tensor)


@contextmanager
def contestant(work: Work) -> Iterator[Ours]:
    options = dict(option.split("=") for option in work.options)
    processes = int(options.get("processes", "4"))
    link = Link(float(options.get("link", "370")), int(options.get("held", "24")))
    config = read_config(work.config, work.config_overrides(processes))
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    world = Played(0, processes, device_of(config.device, 0), on_this_node=processes, link=link)
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(Path(folder), rank=0, logging=config.logging)
        try:
            with mock.patch("trainer.sharding.dist.all_gather_into_tensor", link.gather):
                run = prepare(config, Path(folder), world, metrics, Progress())
                for module in run.training_model.modules():
                    if isinstance(module, FSDPModule):
                        module.set_custom_all_gather(FSDP2Gather(link))
                yield Ours(run, world)
        finally:
            metrics.close()
            dist.destroy_process_group()
