"""The training run, from config to adapter: `train` reads as the pipeline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.chat import IGNORED
from trainer.checkpoint import State, load_checkpoint, newest_sound, remove_unfinished, save_checkpoint
from trainer.config import Config
from trainer.data import Batch, Dataset, Example, Row, collate
from trainer.errors import ConfigError, Stopped, TrainingFailed
from trainer.lora import require_gradients, save_adapter
from trainer.metrics import Metrics, memory_bytes
from trainer.outcome import Progress
from trainer.parallel import World, sum_gradients
from trainer.prepare import Run, prepare
from trainer.schedule import learning_rate

StopRequested = Callable[[], bool]


def train(
    config: Config,
    run_dir: Path,
    world: World,
    metrics: Metrics,
    progress: Progress,
    stop_requested: StopRequested,
) -> None:
    """Trains to the last step and saves the adapter; goes on from the newest checkpoint if there is one.

    Raises TrainerError; Stopped after a checkpoint, if `stop_requested` says so at a step boundary.
    """
    run = prepare(config, run_dir, world, metrics, progress)
    _resume(run)
    validated = None
    for step in range(progress.steps + 1, run.steps + 1):
        _train_step(run, step)
        if _due(step, config.step_scheduler.val_every_steps):
            _validate(run, step)
            validated = step
        last = step == run.steps
        stopping = not last and world.any(stop_requested())
        if config.checkpoint.enabled and (
            last or stopping or _due(step, config.step_scheduler.ckpt_every_steps)
        ):
            _checkpoint(run, step)
        if stopping:
            raise _stopped(run, step)
    if run.validation is not None and validated != run.steps:
        _validate(run, run.steps)
    adapter = run_dir / "adapter"
    world.write_on_first("The adapter", adapter, lambda: save_adapter(run.peft_model, adapter))
    progress.adapter = str(adapter)
    progress.peak_memory_bytes = max(world.gather(memory_bytes(world.device)))
    metrics.write("end", step=progress.steps, loss=progress.last_loss, adapter=progress.adapter)
    metrics.say(
        f"finished: loss {progress.first_loss:.4f} → {progress.last_loss:.4f}, adapter in {progress.adapter}"
    )


def _resume(run: Run) -> None:
    """Goes on from the newest sound checkpoint, if there is one and the config wants that."""
    if not run.config.checkpoint.enabled:
        return
    if run.world.rank == 0:
        remove_unfinished(run.checkpoints)
    found = run.world.from_first(
        newest_sound(run.checkpoints, run.metrics.note) if run.world.rank == 0 else None
    )
    if found is None:
        return
    if not run.config.checkpoint.resume:
        raise ConfigError(
            f"{run.run_dir} already has checkpoints, and checkpoint.resume is false.",
            remedy="give the run another name, or --set checkpoint.resume=true",
            context={"key": "checkpoint.resume", "checkpoint": found},
        )
    state = load_checkpoint(
        found,
        run.adapters,
        run.optimizer,
        run.world,
        global_batch_size=run.config.step_scheduler.global_batch_size,
        seed=run.config.seed,
    )
    run.progress.steps = state.step
    run.progress.first_loss, run.progress.last_loss = state.first_loss, state.last_loss
    run.metrics.note(f"going on after step {state.step}, from {found.name}")


def _train_step(run: Run, step: int) -> None:
    """One optimizer step over a global batch, and its record."""
    started = time.perf_counter()
    batches = _local_batches(run, step)
    # Every token of the global batch weighs the same, however it is cut into processes and micro-batches.
    counts = torch.tensor([sum(b.trained_tokens for b in batches), sum(b.tokens for b in batches)])
    trained, tokens = (int(n) for n in run.world.sum(counts.to(run.world.device)).tolist())
    losses = []
    for batch in batches:
        on_device = batch.to(run.world.device)
        loss: Tensor = run.training_model(on_device.input_ids, on_device.labels, **on_device.layout)
        (loss / trained).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    own = torch.stack(losses)
    loss_value = run.world.sum(own.sum()).item() / trained
    if not math.isfinite(loss_value):
        raise _not_finite(run, step, batches, own)
    if run.progress.first_step_seconds is None:
        require_gradients(run.adapters, run.world)
    sum_gradients(list(run.adapters.values()), run.world)
    norm = nn.utils.clip_grad_norm_(
        run.adapters.values(), run.config.optimizer.max_grad_norm or math.inf, error_if_nonfinite=False
    ).item()
    if not math.isfinite(norm):
        raise _not_finite(run, step, batches, own)
    rate = learning_rate(step, run.steps, peak=run.config.optimizer.lr, section=run.config.lr_scheduler)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    _record_step(run, step, loss_value, rate, norm, tokens, trained, time.perf_counter() - started)


def _record_step(
    run: Run, step: int, loss: float, rate: float, norm: float, tokens: int, trained: int, seconds: float
) -> None:
    progress = run.progress
    memory = memory_bytes(run.world.device)
    progress.steps, progress.last_loss, progress.peak_memory_bytes = step, loss, memory
    progress.first_loss = loss if progress.first_loss is None else progress.first_loss
    if progress.first_step_seconds is None:
        progress.first_step_seconds = seconds
    else:
        progress.tokens += tokens
        progress.seconds += seconds
    run.metrics.write(
        "step",
        step=step,
        steps=run.steps,
        loss=loss,
        lr=rate,
        grad_norm=norm,
        tokens=tokens,
        trained_tokens=trained,
        tokens_per_second=tokens / seconds,
        seconds=seconds,
        memory_bytes=memory,
    )
    if step == 1 or step == run.steps or step % max(1, run.steps // 10) == 0:
        run.metrics.say(f"step {step}/{run.steps}: loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")


def _local_batches(run: Run, step: int) -> list[Batch]:
    """This process's micro-batches of the step's global batch."""
    scheduler = run.config.step_scheduler
    first = (step - 1) * scheduler.global_batch_size
    per_pass = scheduler.local_batch_size * run.world.size
    return [
        _collate(run, [run.stream[start + n] for n in range(scheduler.local_batch_size)], run.stream.dataset)
        for start in range(
            first + run.world.rank * scheduler.local_batch_size, first + scheduler.global_batch_size, per_pass
        )
    ]


def _collate(run: Run, rows: list[Row], dataset: Dataset) -> Batch:
    return collate(rows, pad=run.pad, row_length=dataset.row_length)


def _not_finite(run: Run, step: int, batches: list[Batch], losses: Tensor) -> TrainingFailed:
    finite = torch.isfinite(losses).tolist()
    lines = [batch.lines for batch, fine in zip(batches, finite, strict=True) if not fine]
    named = sorted({line for own in run.world.gather(lines) for batch in own for line in batch})
    what = f"the examples of lines {', '.join(map(str, named))}" if named else "the gradient's norm"
    return TrainingFailed(
        f"Step {step}: {what} gave a loss or gradient that is no finite number.",
        remedy="look at those lines of the data file, or lower optimizer.lr",
        context={"step": step, "lines": ", ".join(map(str, named)), "file": run.stream.dataset.name},
    )


@torch.no_grad()
def _validate(run: Run, step: int) -> None:
    """The mean loss for a trained token of the validation set."""
    assert run.validation is not None
    started = time.perf_counter()
    run.training_model.eval()
    everything = run.validation.rows(range(len(run.validation.examples)))
    size = run.config.step_scheduler.local_batch_size
    total = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    for turn in count():
        first = (turn * run.world.size + run.world.rank) * size
        if turn * run.world.size * size >= len(everything):
            break
        # With sharded weights every process must take part in every pass, also one that has no row left.
        rows = everything[first : first + size] or [(_untrained(run.validation.examples[0]),)]
        batch = _collate(run, rows, run.validation)
        on_device = batch.to(run.world.device)
        total[0] += run.training_model(on_device.input_ids, on_device.labels, **on_device.layout).double()
        total[1] += batch.trained_tokens
    run.training_model.train()
    summed, tokens = run.world.sum(total).tolist()
    loss, seconds = summed / tokens, time.perf_counter() - started
    run.metrics.write("validation", step=step, loss=loss, trained_tokens=int(tokens), seconds=seconds)
    run.metrics.say(f"step {step}/{run.steps}: validation loss {loss:.4f}")


def _untrained(example: Example) -> Example:
    return Example(example.input_ids, [IGNORED] * len(example.labels), example.line)


def _checkpoint(run: Run, step: int) -> None:
    started = time.perf_counter()
    assert run.progress.first_loss is not None
    assert run.progress.last_loss is not None
    state = State(
        step,
        run.config.step_scheduler.global_batch_size,
        run.progress.first_loss,
        run.progress.last_loss,
        run.world.size,
        run.config.seed,
    )
    saved = save_checkpoint(
        run.checkpoints,
        state,
        run.adapters,
        run.optimizer,
        run.world,
        keep_last=run.config.checkpoint.keep_last,
    )
    run.metrics.write("checkpoint", step=step, path=str(saved), seconds=time.perf_counter() - started)


def _stopped(run: Run, step: int) -> Stopped:
    kept = run.config.checkpoint.enabled
    return Stopped(
        f"Stopped as asked after step {step} of {run.steps}, "
        + ("with a checkpoint." if kept else "without a checkpoint: checkpoint.enabled is false."),
        remedy="run the same command again to go on"
        if kept
        else "set checkpoint.enabled: true to be able to go on",
        context={"step": step, "run": run.run_dir},
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
