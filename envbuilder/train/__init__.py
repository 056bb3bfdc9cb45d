"""`train`: the bundled trainer, in a built env, under torchrun.

A run is a folder, and everything about it lies there: what the ranks wrote (`log.txt`), the metrics, the
checkpoints and, written last by rank 0, `outcome.json`. That file alone says how the run ended, since
torchrun turns every exit code of its workers into 1. To stop a run, the file `stop` is put into its folder:
the trainer makes a checkpoint at the next step boundary and ends. No signal goes to torchrun, which would
kill its workers before they have saved anything.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.errors import InputError, MismatchError, UsageError
from envbuilder.model import EnvReceipt, read_record
from envbuilder.paths import Root
from envbuilder.report import Reporter
from envbuilder.train.launch import command_line, environment, visible_gpus
from envbuilder.train.outcome import conclude
from envbuilder.train.supervision import supervise


@dataclass(frozen=True, slots=True)
class TrainReport:
    """A run that finished."""

    run: Path
    outcome: dict[str, Any]
    """What the trainer wrote into `outcome.json`: first_loss, last_loss, steps, adapter, …"""
    seconds: float
    """Wall time of this command's part of the run."""


def run_training(
    config: Path,
    *,
    root: Root,
    recipe_name: str,
    processes: int | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    reporter: Reporter,
) -> TrainReport:
    """Trains as `config` says in the env of the recipe `recipe_name`; a run that was stopped goes on.

    `processes` are the ranks on this node: one for each visible GPU where it is None, one without a GPU.
    `overrides` are `key.path=value`. The run's name is the config's where `run_name` is None.

    Raises InputError (config or data), MismatchError (env or GPUs), TrainingError, and StoppedError where the
    run was stopped in good order and the same command goes on with it.
    """
    began = time.monotonic()
    if not config.is_file():
        raise InputError(
            f"There is no training config at {config}.",
            remedy="Give the path of a config, e.g. recipes/train/quickstart.yaml.",
            context={"file": config},
        )
    receipt = _receipt(root, recipe_name)
    run = root.run(_checked_name(run_name or config.stem))
    count = processes or visible_gpus(os.environ) or 1
    make_folder(run)
    write_atomically(run / "envbuilder.json", receipt.model_dump_json(indent=2) + "\n")
    reporter.stage(f"training {run.name}, {count} process{'es' if count > 1 else ''}")
    ended = supervise(
        command_line(root.env(recipe_name) / "bin" / "python", config.absolute(), run, count, overrides),
        environment(os.environ, run=run, cache=root.cache / "triton" / recipe_name, processes=count),
        run=run,
        reporter=reporter,
    )
    return TrainReport(run, conclude(run, recipe_name, ended), time.monotonic() - began)


def _receipt(root: Root, recipe_name: str) -> EnvReceipt:
    path = root.env(recipe_name) / "envbuilder.json"
    remedy = f"envbuilder install recipes/{recipe_name}.toml"
    if not path.exists():
        raise MismatchError(
            f"There is no env of the recipe {recipe_name}, or its installation was not finished.",
            remedy=remedy,
            context={"missing": path},
        )
    return read_record(path, EnvReceipt, remedy=remedy)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"{name!r} can't be a run's name: it is made of letters, digits, '.', '-' and '_'.",
            remedy="Give another name: envbuilder train CONFIG --recipe NAME --run my-run",
        )
    return name
