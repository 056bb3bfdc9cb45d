"""The training step: a global batch's passes, the sum of their gradients, the update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data import Batch, Dataset, Row, Work, collate, trained_tokens
from trainer.errors import TrainingFailed
from trainer.lora import require_gradients
from trainer.parallel import sum_gradients
from trainer.prepare import Run
from trainer.schedule import learning_rate, update


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
    own = torch.stack([run.passes(batch) for batch in work.batches])
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
    own = range(run.world.rank * size, len(rows), size * run.world.size)
    return Work(
        [collate_rows(run, rows[start : start + size], run.stream.dataset) for start in own],
        tokens=sum(len(example.input_ids) for example in examples),
        trained=sum(map(trained_tokens, examples)),
    )


def collate_rows(run: Run, rows: Sequence[Row], dataset: Dataset) -> Batch:
    """The rows of `dataset` as a batch for the run's model."""
    return collate(
        rows,
        pad=run.pad,
        row_length=dataset.row_length,
        recorded_length=run.config.dataset.seq_length if run.plan.records else None,
    )


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
