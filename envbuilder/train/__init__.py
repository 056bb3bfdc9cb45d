"""`train`: the bundled trainer, in a built env, under torchrun.

A run is a folder, and everything about it lies there: what the ranks wrote (`log.txt`), the metrics, the
checkpoints and, written last by rank 0, `outcome.json`. That file alone says how the run ended, since
torchrun turns every exit code of its workers into 1. To stop a run, the file `stop` is put into its folder:
the trainer makes a checkpoint at the next step boundary and ends. No signal goes to torchrun, which would
kill its workers before they have saved anything.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.env_image import EnvImage, env_receipt, usable_env
from envbuilder.errors import InputError, MismatchError, StoppedError, UsageError
from envbuilder.model import EnvReceipt
from envbuilder.modules import check_there, load_again
from envbuilder.own_program import own_command
from envbuilder.paths import Root
from envbuilder.progress_file import job_progress
from envbuilder.report import Reporter
from envbuilder.train.allocation import find_allocation, job_times, name_of_node
from envbuilder.train.kernel_cache import KernelCache, kernel_cache
from envbuilder.train.launch import (
    command_line,
    environment,
    node_command_line,
    step_command_line,
    visible_gpus,
)
from envbuilder.train.network import warn_of_tcp
from envbuilder.train.outcome import conclude
from envbuilder.train.proof import EnvProof, drifted, image_proof, prove_env
from envbuilder.train.stamp import STAMP_VARIABLE, make_stamp
from envbuilder.train.supervision import supervise
from envbuilder.trainer_versions import check_trains


@dataclass(frozen=True)
class TrainReport:
    """A run that finished."""

    run: Path
    outcome: dict[str, Any]
    """What the trainer wrote into `outcome.json`: first_loss, last_loss, steps, adapter, …"""
    seconds: float
    """Wall time of this command's part of the run."""


class TimeEnded(StoppedError):
    """The run stopped because the job's time ends, so another job goes on with it."""


def run_training(
    config: Path,
    *,
    root: Root,
    recipe_name: str,
    processes: int | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    reporter: Reporter,
    time_limit_s: int | None = None,
    allow_drift: bool = False,
) -> TrainReport:
    """Trains as `config` says in the env of the recipe `recipe_name`; a run that was stopped goes on.

    In a Slurm job of several nodes it trains on all of them. `processes` are the ranks on each node: one for
    each visible GPU where it is None, one without a GPU. `overrides` are `key.path=value`. The run's name is
    the config's where `run_name` is None. The trainer is told when the job ends, or that it must end within
    `time_limit_s`.

    Raises InputError (config or data), MismatchError (env or GPUs; an env that is not as it was installed,
    without `allow_drift`; a folder of a module that it was compiled with is gone), TrainingError, and
    StoppedError where the run was stopped in good order and the same command goes on with it: TimeEnded where
    it was for the time's end.
    """
    began = time.monotonic()
    if not config.is_file():
        raise InputError(
            f"There is no training config at {config}.",
            remedy="Give the path of a config, e.g. recipes/train/quickstart.yaml.",
            context={"file": config},
        )
    name = checked_name(run_name or config.stem)
    receipt, image, proof = proved_env(root, recipe_name, reporter, allow_drift=allow_drift)
    check_there(receipt.modules, f"recipes/{recipe_name}.toml")
    run = root.run(name)
    count = processes or visible_gpus(os.environ) or 1
    allocation = find_allocation(os.environ)
    cache = kernel_cache(root, recipe_name, reporter)
    provided = receipt.provided is not None
    env = environment(
        load_again(os.environ, receipt.modules, keep_cuda_libraries=provided),
        run=run,
        cache=cache,
        processes=count,
        one_node=allocation.nodes == 1,
        keep_cuda_libraries=provided,
    )
    with usable_env(root, recipe_name, image, reporter) as used:
        stamp = make_stamp(
            used.python, config.absolute(), overrides, root=root, recipe_name=recipe_name, proof=proof,
            env=env, reporter=reporter,
        )  # fmt: skip
        env[STAMP_VARIABLE] = json.dumps(stamp)
        env |= job_times(os.environ, time_limit_s, reporter)
        make_folder(run)
        write_atomically(run / "envbuilder.json", receipt.model_dump_json(indent=2) + "\n")
        write_atomically(run / "stamp.json", json.dumps(stamp, indent=1) + "\n")
        command = command_line(used.python, config.absolute(), run, count, overrides)
        if allocation.nodes > 1:
            command = step_command_line(
                _node_program(config, root, recipe_name, count, run, overrides),
                allocation.nodes,
                os.environ.get("SLURM_CPUS_PER_TASK"),
            )
        cache.seed()
        nodes = f" on each of {allocation.nodes} nodes" if allocation.nodes > 1 else ""
        reporter.stage(f"training {name}, {count} process{'es' if count > 1 else ''}{nodes}")
        try:
            ended = supervise(
                command,
                env,
                run=run,
                reporter=reporter,
                progress=job_progress(root),
                on_first_step=partial(_at_first_step, cache, run, reporter),
            )
        finally:
            cache.save()
    try:
        outcome = conclude(run, recipe_name, ended)
    except StoppedError as error:
        # Where only the trainer was signalled, as when Slurm ends a step for a node's sake, it goes on too.
        if ended.stopped_by_hand:
            raise
        raise TimeEnded(error.message, remedy=error.remedy, context=error.context) from error
    return TrainReport(run, outcome, time.monotonic() - began)


def _at_first_step(cache: KernelCache, run: Path, reporter: Reporter) -> None:
    """By now all kernels are compiled, and all ranks have spoken to one another."""
    cache.save()
    warn_of_tcp(run, reporter)


def run_node(
    config: Path,
    *,
    root: Root,
    recipe_name: str,
    processes: int,
    overrides: tuple[str, ...],
    run: Path,
    reporter: Reporter,
) -> int:
    """One node's part of a run on several: the program that `run_training` has srun start on each of them.

    Returns what torchrun ended with; how the run ended is in its outcome alone.
    """
    meeting = find_allocation(os.environ)
    cache = kernel_cache(root, recipe_name, reporter)
    cache.seed()
    _, image = env_receipt(root, recipe_name)
    with usable_env(root, recipe_name, image, reporter) as used:
        _check_same(image, os.environ)
        command = node_command_line(
            used.python,
            config,
            run,
            processes,
            overrides,
            meeting=meeting,
            number=int(os.environ["SLURM_NODEID"]),
            name=name_of_node(os.environ["SLURMD_NODENAME"], os.environ),
        )
        return subprocess.run(command, env={**os.environ, **cache.variables}, check=False).returncode


def proved_env(
    root: Root, recipe_name: str, reporter: Reporter, *, allow_drift: bool
) -> tuple[EnvReceipt, EnvImage | None, EnvProof]:
    """The env's receipt, the image that it is kept as, if it is, and the proof that the env is what it says.

    With `allow_drift` it need not be. An image is hashed when it is used, not here. MismatchError too where
    the env holds versions that the trainer does not train with.
    """
    receipt, image = env_receipt(root, recipe_name)
    check_trains(receipt)
    if image is not None:
        return receipt, image, image_proof(image)
    env = root.env(recipe_name)
    proof = prove_env(env, receipt)
    if proof.faults:
        error = drifted(env, recipe_name, proof)
        if not allow_drift:
            raise error
        reporter.warn(f"{error.message} Trained all the same (--allow-drift), and recorded in the run.")
    else:
        reporter.note(
            f"the env is as it was installed: {len(receipt.packages)} packages, the sizes of {proof.files} "
            f"files and the bytes of {proof.hashed} newer ones, in {proof.seconds:.1f} s"
        )
    return receipt, None, proof


def _check_same(image: EnvImage | None, environ: Mapping[str, str]) -> None:
    """MismatchError where the run's first node began with another image than this node has."""
    wanted = json.loads(environ[STAMP_VARIABLE])["env"]
    if image is not None and wanted != f"sha256:{image.receipt.sha256}":
        raise MismatchError(
            f"The image of the env {image.name} has been made anew since the run began.",
            remedy="Run the same command again: it goes on from the last checkpoint.",
            context={"began with": wanted, "now": image.receipt.sha256},
        )


def _node_program(
    config: Path, root: Root, recipe_name: str, processes: int, run: Path, overrides: tuple[str, ...]
) -> tuple[str, ...]:
    settings = (word for override in overrides for word in ("--set", override))
    return own_command(
        *("--root", str(root.path), "--quiet", "train-node", str(config.absolute())),
        *("--recipe", recipe_name, "--processes", str(processes), "--run-dir", str(run), *settings),
    )


def checked_name(name: str) -> str:
    """`name`, where a run can be called so; else UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(
            f"{name!r} can't be a run's name: it is made of letters, digits, '.', '-' and '_'.",
            remedy="Give another name: envbuilder train CONFIG --recipe NAME --run my-run",
        )
    return name
