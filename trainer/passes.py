"""Forward and backward pass of a micro-batch: kernel by kernel, or replayed as a CUDA graph.

A pass of a hybrid model starts thousands of kernels, and Python takes longer to start them than a GPU to
run them for one row of 4,096 tokens. So passes are recorded, one for each shape that a batch has, and from
then on started as a whole. Recordings keep their memory, but share it: the first is of the largest shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data import RECORDED_LENGTHS, RECORDED_PARTS, Batch
from trainer.parallel import World
from trainer.sharding import SharedBlocks

MOST_GRAPHS = RECORDED_LENGTHS * RECORDED_PARTS
"""Shapes that are recorded, as many as `collate` makes; batches of others run kernel by kernel."""

Shapes = tuple[object, ...]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    """The tensors that the graph reads."""
    loss: Tensor
    """The tensor that it writes."""


class Passes:
    """Adds a micro-batch's gradients to the adapters' and returns its loss."""

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[nn.Parameter],
        world: World,
        *,
        largest: Batch | None,
        shared: SharedBlocks | None,
        warn: Callable[[str], None],
    ) -> None:
        """Passes are recorded if `largest` is given, a batch of the largest shape that there will be."""
        self._model, self._adapters, self._world = model, adapters, world
        self._largest, self._shared, self._warn = largest, shared, warn
        self._weight = torch.zeros((), dtype=torch.float32, device=world.device)
        self._kernels_are_known = False
        self._recorded: dict[Shapes, _Recorded] = {}

    @property
    def recorded(self) -> int:
        """How many shapes are."""
        return len(self._recorded)

    def weigh(self, trained: int) -> None:
        """Divides the losses of the passes to come by the step's trained tokens."""
        self._weight.fill_(1 / trained)

    def __call__(self, batch: Batch) -> Tensor:
        """The summed loss of the batch's trained tokens, not yet divided; nothing waits for the device."""
        if self._shared:
            self._shared.settle()
        recorded = self._recording_of(batch) if self._largest and self._kernels_are_known else None
        self._kernels_are_known = True
        if recorded is None:
            return self._run(batch.to(self._world.device))
        for theirs, ours in zip(_tensors(recorded.batch), _tensors(batch), strict=True):
            theirs.copy_(ours, non_blocking=True)
        recorded.graph.replay()
        return recorded.loss.clone()  # the next replay writes there again

    def clear_gradients(self) -> None:
        """To be called after each step: a recorded pass adds to the same memory every time."""
        if self._recorded:
            torch._foreach_zero_([p.grad for p in self._adapters if p.grad is not None])
            return
        for parameter in self._adapters:
            parameter.grad = None

    def _run(self, batch: Batch) -> Tensor:
        loss: Tensor = self._model(batch.input_ids, batch.labels, predicting=batch.predicting, **batch.layout)
        (loss * self._weight).backward()  # type: ignore[no-untyped-call]
        if self._shared:
            self._shared.settle()  # also where the first blocks had no way back
        return loss.detach()

    def _recording_of(self, batch: Batch) -> _Recorded | None:
        assert self._largest is not None
        shapes = _shapes(batch)
        if shapes in self._recorded or len(self._recorded) == MOST_GRAPHS:
            return self._recorded.get(shapes)
        for parameter in self._adapters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        failure = None if self._recorded else self._record(self._largest)
        if not failure and shapes not in self._recorded:
            failure = self._record(batch)
        # Processes that share the base record together, and give up together.
        if self._world.any(failure is not None) if self._shared else failure:
            self._give_up(failure or "another process can't")
        return self._recorded.get(shapes)

    def _record(self, batch: Batch) -> str | None:
        """Nothing is computed meanwhile. Returns why it can't be done."""
        static = batch.to(self._world.device)
        pool = next((recorded.graph.pool() for recorded in self._recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        failure = None
        caller = torch.cuda.current_stream(self._world.device)
        try:
            # Only this thread is watched: NCCL's own and that of a checkpoint may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    loss = self._run(static)
                except RuntimeError as problem:
                    # Recording ends in good order all the same: else its memory would never come back.
                    failure = _first_line(problem)
                    if self._shared:
                        self._shared.nothing_moved()
        except RuntimeError as problem:
            torch.cuda.set_stream(caller)  # which a recording that is broken off doesn't go back to
            failure = failure or _first_line(problem)
        if failure is None:
            self._recorded[_shapes(batch)] = _Recorded(graph, static, loss)
        return failure

    def _give_up(self, why: str) -> None:
        """No more recordings, and their memory back: a pass without one may need all that there is."""
        self._largest = None
        self._recorded.clear()
        torch.cuda.empty_cache()
        if self._shared:
            self._shared.nothing_moved()
        self._warn(f"passes are not recorded as CUDA graphs: {why}")


def _first_line(problem: RuntimeError) -> str:
    return str(problem).splitlines()[0]


def _tensors(batch: Batch) -> list[Tensor]:
    layout = [part for part in batch.layout.values() if isinstance(part, Tensor)]
    return [part for part in (batch.input_ids, batch.labels, batch.predicting, *layout) if part is not None]


def _shapes(batch: Batch) -> Shapes:
    """What must be the same for one recording to serve two batches."""
    numbers = tuple((name, part) for name, part in batch.layout.items() if not isinstance(part, Tensor))
    return (*(part.shape for part in _tensors(batch)), numbers)
