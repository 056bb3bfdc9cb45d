"""The processes of one run: who this one is, and how they agree.

The adapters are small: every process holds them whole, in fp32, and their gradients are summed once for each
optimizer step. So clipping and checkpoints see whole tensors, and a checkpoint fits any number of processes.
Where the base lies is `placement.py`'s to decide and `sharding.py`'s to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.errors import EnvironmentMismatch, TrainingFailed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All processes of the run and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    on_this_node: int = 1
    """How many of them run on this one's node."""
    timeout: timedelta | None = None
    """After which what one of them doesn't take part in fails."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The element-wise sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag up."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every process."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        received: T = values[0]
        return received

    def write_on_first(self, what: str, folder: Path, write: Callable[[], None]) -> None:
        """Rank 0 writes, all wait for it. Raises TrainingFailed on every process if the writing fails."""
        failure: str | None = None
        if self.rank == 0:
            try:
                write()
            except (OSError, SafetensorError) as problem:
                failure = f"{type(problem).__name__}: {problem}"
        if failure := self.from_first(failure):
            raise TrainingFailed(
                f"{what} can't be written: {failure}",
                remedy=f"df -h {folder}",
                context={"folder": folder},
            )


@contextmanager
def open_world(device: str, *, timeout_minutes: float) -> Iterator[World]:
    """Joins the processes that torchrun started; alone without torchrun.

    Raises EnvironmentMismatch if a GPU is asked for and there is none for this process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = device_of(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, place)
        return
    backend = "nccl" if device == "cuda" else "gloo"
    # Buffers that a CUDA graph gathers into would be registered by processes that record for themselves.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        backend,
        timeout=timeout,
        device_id=place if device == "cuda" else None,
    )
    try:
        yield World(rank, size, place, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), timeout)
    finally:
        dist.destroy_process_group()


def make_deterministic(wanted: bool) -> None:
    """Lets PyTorch, and the mamba kernels, which ask it, take algorithms that give the same bits every
    time."""
    torch.use_deterministic_algorithms(wanted)
    # Uninitialised memory would be filled, for the sake of code that reads it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_of(kind: str, local_rank: int) -> torch.device:
    """The process's own. Raises EnvironmentMismatch where the node has fewer GPUs than processes."""
    if kind == "cpu":
        return torch.device("cpu")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= available:
        raise EnvironmentMismatch(
            f"The config asks for CUDA, and process {local_rank} of this node finds {available} GPUs.",
            remedy="nvidia-smi  # on a GPU node; or set `device: cpu` for a small model",
            context={
                "key": "device",
                "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
                "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
            },
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def sum_gradients(adapters: Sequence[nn.Parameter], world: World) -> None:
    """Adds up the adapters' gradients over all processes, in one message."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in adapters if parameter.grad is not None]
    together = world.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, part in zip(gradients, torch.split(together, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
