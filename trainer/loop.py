"""The training run, from config to adapter: `train` reads as the pipeline."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import torch

from trainer.boundary import Boundary, StopRequested
from trainer.chat import IGNORED
from trainer.config import Config
from trainer.data import Example, collate
from trainer.governor import Job
from trainer.lora import describe_base, save_adapter
from trainer.metrics import Metrics, memory_bytes
from trainer.outcome import Progress
from trainer.parallel import World
from trainer.prepare import Run, prepare
from trainer.samples import write_samples
from trainer.step import train_step
from trainer.watch import Watch


def train(
    config: Config,
    run_dir: Path,
    world: World,
    metrics: Metrics,
    progress: Progress,
    job: Job,
    stop_requested: StopRequested,
    watch: Watch,
) -> None:
    """Trains to the last step and saves the adapter; goes on from the newest checkpoint if there is one.

    Raises TrainerError; Stopped after a checkpoint, if `stop_requested` says so at a step boundary or the
    job's end is near.
    """
    run = prepare(config, run_dir, world, metrics, progress)
    run.pulse = watch.pulse
    boundary = Boundary(run, job, progress.stamp, stop_requested, watch)
    validated = None
    try:
        boundary.before_the_first_step()
        if progress.steps == 0:
            write_samples(run, "before", watch.pulse)
        for step in range(progress.steps + 1, run.steps + 1):
            _train_step(run, step)
            if _due(step, config.step_scheduler.val_every_steps):
                boundary.validated(_validate(run, step))
                validated = step
            boundary.after(step)
    finally:
        boundary.close()
    if run.validation is not None and validated != run.steps:
        _validate(run, run.steps)
    write_samples(run, "after", watch.pulse)
    adapter = run_dir / "adapter"
    base = describe_base(run.peft_model, run.shared)
    world.write_on_first("The adapter", adapter, lambda: save_adapter(run.peft_model, adapter, base))
    progress.adapter = str(adapter)
    progress.peak_memory_bytes = max(world.gather(memory_bytes(world.device)))
    metrics.write("end", step=progress.steps, loss=progress.last_loss, adapter=progress.adapter)
    metrics.say(
        f"finished: loss {progress.first_loss:.4f} → {progress.last_loss:.4f}, adapter in {progress.adapter}"
    )


def _train_step(run: Run, step: int) -> None:
    """One optimizer step over a global batch, and its record."""
    done = train_step(run, step)
    _record_step(
        run, step, done.loss, done.rate, done.norm, done.work.tokens, done.work.trained, done.seconds
    )


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
        flops_per_second=run.flops.of(tokens, trained) / seconds,
        mfu=run.flops.mfu(tokens, trained, seconds),
        seconds=seconds,
        # Both were reckoned before this step.
        seconds_left=progress.seconds_left and max(0.0, progress.seconds_left - seconds),
        jobs_left=progress.jobs_left,
        memory_bytes=memory,
    )
    if step == 1 or step == run.steps or step % max(1, run.steps // 10) == 0:
        run.metrics.say(f"step {step}/{run.steps}: loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")


@torch.no_grad()
def _validate(run: Run, step: int) -> float:
    """The mean loss for a trained token of the validation set. Returns how many seconds it took."""
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
        batch = collate(rows, pad=run.pad, row_length=run.validation.row_length)
        on_device = batch.to(run.world.device)
        total[0] += run.training_model(
            on_device.input_ids, on_device.labels, predicting=on_device.predicting, **on_device.layout
        ).double()
        total[1] += batch.trained_tokens
        run.pulse()
    run.training_model.train()
    summed, tokens = run.world.sum(total).tolist()
    loss, seconds = summed / tokens, time.perf_counter() - started
    run.metrics.write("validation", step=step, loss=loss, trained_tokens=int(tokens), seconds=seconds)
    run.metrics.say(f"step {step}/{run.steps}: validation loss {loss:.4f}")
    return seconds


def _untrained(example: Example) -> Example:
    return Example(example.input_ids, [IGNORED] * len(example.labels), example.line)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
