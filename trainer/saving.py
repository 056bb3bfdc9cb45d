"""Checkpoints while training goes on: a copy at the step boundary, written by a thread of rank 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.checkpoint import (
    State,
    Tensors,
    committed,
    generator_states,
    optimizer_tensors,
    remove_checkpoint,
    step_of,
    write_checkpoint,
)
from trainer.control import Control
from trainer.errors import TrainingFailed
from trainer.parallel import World


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk, and what it cost."""

    step: int
    path: Path
    held_up_seconds: float
    """How long training waited for it."""
    seconds: float
    """From the copy to the last byte on the disk."""
    bytes: int


class Saver:
    """Every process has one and calls `begin` at the same boundaries; only rank 0 copies and writes."""

    def __init__(self, folder: Path, world: World, control: Control, *, keep_last: int) -> None:
        self.last_step: int | None = None
        """Of the newest checkpoint begun, on every process."""
        self._folder, self._world, self._control, self._keep_last = folder, world, control, keep_last
        self._thread: threading.Thread | None = None
        self._saved: list[Saved] = []
        self._failure: str | None = None
        self._buffers: Tensors = {}

    @property
    def failed(self) -> bool:
        """Whether this process couldn't write a checkpoint."""
        return self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written by this process."""
        return self._thread is not None and self._thread.is_alive()

    def begin(
        self, state: State, adapters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the copy and goes on; waits first for one that is still being written."""
        generators = self._control.gather(generator_states(self._world.device))
        self.last_step = state.step
        if self._world.rank != 0:
            return
        began = time.perf_counter()
        self.wait()
        tensors = (
            self._copies("adapter", {name: parameter.detach() for name, parameter in adapters.items()}),
            self._copies("optimizer", optimizer_tensors(adapters, optimizer)),
            {f"{rank}.{kind}": own for rank, states in enumerate(generators) for kind, own in states.items()},
        )
        copied = torch.cuda.current_stream().record_event() if self._world.device.type == "cuda" else None
        held_up = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(state, tensors, copied, began, held_up), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join(timeout)

    def collect(self) -> list[Saved]:
        """What has come onto the disk since the last time."""
        saved, self._saved = self._saved, []
        return saved

    def drop_after(self, step: int) -> int | None:
        """Removes the checkpoints of later steps, unless there is no other; the newest one's step, if any.

        All processes call it. Raises TrainingFailed if the files can't be removed.
        """
        self.wait()

        def drop() -> None:
            later = [checkpoint for checkpoint in committed(self._folder) if step_of(checkpoint) > step]
            if len(later) < len(committed(self._folder)):
                for checkpoint in later:
                    remove_checkpoint(checkpoint)

        self._world.write_on_first("The list of checkpoints", self._folder, drop)
        kept = committed(self._folder) if self._world.rank == 0 else []
        return self._control.from_first(step_of(kept[0]) if kept else None)

    def raise_failure(self) -> None:
        """On every process, which all call it: TrainingFailed if rank 0 couldn't write."""
        if failure := self._control.from_first(self._failure):
            raise TrainingFailed(failure, remedy=f"df -h {self._folder}", context={"folder": self._folder})

    def _copies(self, file: str, tensors: Mapping[str, Tensor]) -> Tensors:
        """On the CPU. From a GPU into pinned memory, in the order of the GPU's own work: nobody waits."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{file}/{name}"
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies[name] = self._buffers[key].copy_(tensor, non_blocking=True)
        return copies

    def _write(
        self,
        state: State,
        tensors: tuple[Tensors, ...],
        copied: torch.cuda.Event | None,
        began: float,
        held_up: float,
    ) -> None:
        place = self._folder / f"step-{state.step:06d}"
        try:
            if copied is not None:
                copied.synchronize()
            write_checkpoint(place, state, tensors)
            for old in committed(self._folder)[self._keep_last :]:
                remove_checkpoint(old)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as problem:  # RuntimeError: CUDA's, of a GPU that is gone
            self._failure = (
                f"The checkpoint of step {state.step} can't be written: {type(problem).__name__}: {problem}"
            )
            return
        size = sum(tensor.nbytes for file in tensors for tensor in file.values())
        self._saved.append(Saved(state.step, place, held_up, time.perf_counter() - began, size))
