"""Going on with a run: from which checkpoint, and what must be as it was."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint import State, load_checkpoint, newest_sound, read_state, remove_unfinished
from trainer.errors import ConfigError
from trainer.prepare import Run
from trainer.stamp import Stamp, compare_stamps

DATASET_KEYS = ("kind", "examples", "seq_length", "overlong", "train_on", "packing", "shuffle")


def settings_of(run: Run) -> dict[str, Any]:
    """What decides which rows a step has, and what the adapters' numbers mean; by config key."""
    config, data = run.config, run.stream.dataset
    return {
        "seed": config.seed,
        "step_scheduler.global_batch_size": config.step_scheduler.global_batch_size,
        **{f"dataset.{key}": getattr(config.dataset, key) for key in DATASET_KEYS},
        "dataset: its examples": len(data.examples),
        "dataset: its tokens": sum(len(example.input_ids) for example in data.examples),
        "peft.alpha": config.peft.alpha,
        "peft.use_rslora": config.peft.use_rslora,
    }


def resume(run: Run, stamp: Stamp) -> State | None:
    """Goes on from the newest sound checkpoint, if there is one; its state. All processes call it.

    Raises ConfigError if the config doesn't want that, or is another one in what a run must keep.
    """
    if not run.config.checkpoint.enabled:
        return None
    if run.world.rank == 0:
        remove_unfinished(run.checkpoints)
    found = run.world.from_first(
        newest_sound(run.checkpoints, run.metrics.note) if run.world.rank == 0 else None
    )
    if found is None:
        return None
    if not run.config.checkpoint.resume:
        raise ConfigError(
            f"{run.run_dir} already has checkpoints, and checkpoint.resume is false.",
            remedy="give the run another name, or --set checkpoint.resume=true",
            context={"key": "checkpoint.resume", "checkpoint": found},
        )
    state = read_state(found)
    _refuse_others(found.name, state.settings, settings_of(run))
    changed, notes = compare_stamps(state.stamp, stamp)
    if changed:
        raise ConfigError(
            f"The run began with another {' and another '.join(changed)} than now.",
            remedy="give the run another name, or put back what it began with",
            context={"checkpoint": found, **changed},
        )
    for note in notes:
        run.metrics.note(note)
    load_checkpoint(found, state, run.adapters, run.optimizer, run.world)
    run.progress.steps = state.step
    run.progress.first_loss, run.progress.last_loss = state.first_loss, state.last_loss
    run.metrics.note(f"going on after step {state.step}, from {found.name}")
    return state


def _refuse_others(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = {key: f"was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]}
    if changed:
        raise ConfigError(
            f"The checkpoint {name} was made with another {' and another '.join(changed)}.",
            remedy="start another run, or go back to this one's config.yaml, beside the checkpoints",
            context=changed,
        )
