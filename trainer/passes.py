"""Forward and backward pass of a micro-batch: kernel by kernel, or replayed as a CUDA graph.

A pass of a hybrid model starts thousands of kernels, and Python takes longer to start them than a GPU to
run them for one row of 4,096 tokens. So a pass whose shapes have come before is recorded once, and from
then on started as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data import Batch

MOST_GRAPHS = 4
"""Shapes that are recorded; batches of others run kernel by kernel."""

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
        device: torch.device,
        *,
        record: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._model, self._adapters, self._device = model, adapters, device
        self._record, self._warn = record, warn
        self._weight = torch.zeros((), dtype=torch.float32, device=device)
        self._seen: set[Shapes] = set()
        self._recorded: dict[Shapes, _Recorded] = {}

    def weigh(self, trained: int) -> None:
        """Divides the losses of the passes to come by the step's trained tokens."""
        self._weight.fill_(1 / trained)

    def __call__(self, batch: Batch) -> Tensor:
        """The summed loss of the batch's trained tokens, not yet divided; nothing waits for the device."""
        shapes = _shapes(batch)
        if self._record and shapes in self._seen and shapes not in self._recorded:
            self._try_to_record(shapes, batch)
        recorded = self._recorded.get(shapes)
        if recorded is None:
            self._seen.add(shapes)
            return self._run(batch.to(self._device))
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
        return loss.detach()

    def _try_to_record(self, shapes: Shapes, batch: Batch) -> None:
        if len(self._recorded) == MOST_GRAPHS:
            return
        for parameter in self._adapters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        static = batch.to(self._device)
        pool = next((recorded.graph.pool() for recorded in self._recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread is watched: NCCL's own and that of a checkpoint may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                loss = self._run(static)
        except RuntimeError as problem:
            self._record = False
            self._warn(f"passes are not recorded as CUDA graphs: {str(problem).splitlines()[0]}")
            return
        self._recorded[shapes] = _Recorded(graph, static, loss)


def _tensors(batch: Batch) -> list[Tensor]:
    layout = [part for part in batch.layout.values() if isinstance(part, Tensor)]
    return [part for part in (batch.input_ids, batch.labels, batch.predicting, *layout) if part is not None]


def _shapes(batch: Batch) -> Shapes:
    """What must be the same for one recording to serve two batches."""
    numbers = tuple((name, part) for name, part in batch.layout.items() if not isinstance(part, Tensor))
    return (*(part.shape for part in _tensors(batch)), numbers)
