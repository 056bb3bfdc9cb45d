"""The training step: a global batch's passes, the sum of their gradients, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data import Batch, Row, Work, collate, recorded_shape, trained_tokens
from trainer.errors import TrainingFailed
from trainer.lora import require_gradients
from trainer.parallel import sum_gradients
from trainer.prepare import Run
from trainer.schedule import learning_rate, update

PASSES_AHEAD = 64
"""Started before one of them is waited for."""


@dataclass(frozen=True)
class Step:
    """What came of one optimizer step."""

    work: Work
    loss: float
    """The mean for a trained token."""
    rate: float
    norm: float
    """Of the gradient, before it was clipped."""
    seconds: float


def train_step(run: Run, step: int) -> Step:
    """One optimizer step over a global batch.

    Everything is started before anything is waited for; while the device works, the next step's batches are
    made. Raises TrainingFailed where loss or gradient is no finite number; the adapters are then as before
    the step.
    """
    started = time.perf_counter()
    work = run.work_ahead.pop(step, None) or _work_of(run, step)
    run.passes.weigh(work.trained)
    own = _losses(run, work.batches)
    if run.progress.first_step_seconds is None:
        if not bool(torch.isfinite(run.world.sum(own.sum()))):
            raise _not_finite(run, step, work.batches, own)
        require_gradients(run.adapters, run.world)
    sum_gradients(list(run.adapters.values()), run.world)
    norm = nn.utils.clip_grad_norm_(
        run.adapters.values(), run.config.optimizer.max_grad_norm or math.inf, error_if_nonfinite=False
    )
    rate = learning_rate(step, run.steps, peak=run.config.optimizer.lr, section=run.config.lr_scheduler)
    update(run.optimizer, rate, norm)
    run.passes.clear_gradients()
    outcome = torch.stack([run.world.sum(own.sum()), norm])
    if step < run.steps:
        run.work_ahead[step + 1] = _work_of(run, step + 1)
    loss, norm_value = outcome.tolist()
    if not math.isfinite(loss) or not math.isfinite(norm_value):
        raise _not_finite(run, step, work.batches, own)
    return Step(work, loss / work.trained, rate, norm_value, time.perf_counter() - started)


def _losses(run: Run, batches: Sequence[Batch]) -> Tensor:
    """Of each micro-batch, not yet divided."""
    losses: list[Tensor] = []
    for batch in batches:
        losses.append(run.passes(batch))
        run.pulse()
        if len(losses) % PASSES_AHEAD == 0:  # a sign of life should not be far ahead of the device
            losses[-1].item()
    return torch.stack(losses)


def _work_of(run: Run, step: int) -> Work:
    """This process's micro-batches of the step's global batch, and the whole batch's tokens.

    Every token of the global batch weighs the same, however it is cut into processes and micro-batches. All
    processes know all rows, so nobody has to ask.
    """
    scheduler = run.config.step_scheduler
    first = (step - 1) * scheduler.global_batch_size
    rows = [run.stream[first + n] for n in range(scheduler.global_batch_size)]
    examples = [example for row in rows for example in row]
    size = scheduler.local_batch_size
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    turns = range(0, len(batches), run.world.size)
    return Work(
        [_batch_of(run, batches[start : start + run.world.size]) for start in turns],
        tokens=sum(len(example.input_ids) for example in examples),
        trained=sum(map(trained_tokens, examples)),
    )


def _batch_of(run: Run, turn: Sequence[Sequence[Row]]) -> Batch:
    """This process's batch, of the rows that all processes take at the same time."""
    dataset, own = run.stream.dataset, turn[run.world.rank]
    if not run.plan.records:
        return collate(own, pad=run.pad, row_length=dataset.row_length)
    # Processes that share the base record the same passes at the same time: NCCL wants its part of a CUDA
    # graph to be recorded by all.
    shape = recorded_shape(turn if run.plan.shard else [own], longest=dataset.longest)
    return collate(own, pad=run.pad, row_length=dataset.row_length, shape=shape)


def _not_finite(run: Run, step: int, batches: Sequence[Batch], losses: Tensor) -> TrainingFailed:
    finite = torch.isfinite(losses).tolist()
    lines = [batch.lines for batch, fine in zip(batches, finite, strict=True) if not fine]
    named = sorted({line for own in run.world.gather(lines) for batch in own for line in batch})
    what = f"the examples of lines {', '.join(map(str, named))}" if named else "the gradient's norm"
    return TrainingFailed(
        f"Step {step}: {what} gave a loss or gradient that is no finite number.",
        remedy="look at those lines of the data file, or lower optimizer.lr",
        context={"step": step, "lines": ", ".join(map(str, named)), "file": run.stream.dataset.name},
    )
