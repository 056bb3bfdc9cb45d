"""A run's curves for TensorBoard and Weights & Biases, where their packages are in the env.

Both only write files, in RUN/tensorboard and RUN/wandb: nothing is sent. `wandb sync RUN/wandb/*run-*` sends
them, from a machine with internet. The jobs of a run are one run there too.
"""

from __future__ import annotations

import importlib.metadata
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.config import LoggingSection
from trainer.errors import EnvironmentMismatch

KINDS = ("step", "validation")
"""Records whose numbers are curves."""


class CurveWriter(Protocol):
    """Takes numbers by name; those of one step together."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers as they are after `step`."""

    def close(self) -> None:
        """Everything is in the files afterwards."""


class TensorBoard:
    """Event files; those of a job that went on from an earlier step replace what came after that step."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writer: Any = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See CurveWriter."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            make: Any = SummaryWriter
            self._writer = make(str(self._folder), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See CurveWriter."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """An offline run for each job, all of one id: they are one run once they are synced."""

    def __init__(self, run_dir: Path, *, project: str, name: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        known = folder / "run-id"
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        self._run: Any = wandb.init(
            mode="offline",
            project=project,
            name=name,
            id=known.read_text(),
            dir=str(run_dir),
            settings=wandb.Settings(console="off", silent=True),
        )
        # A resumed job repeats steps: wandb's own step must only grow.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """See CurveWriter."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """See CurveWriter."""
        self._run.finish()


WRITERS: Mapping[str, Callable[[Path, LoggingSection], CurveWriter]] = {
    "tensorboard": lambda run_dir, section: TensorBoard(run_dir),
    "wandb": lambda run_dir, section: WeightsAndBiases(
        run_dir, project=section.wandb_project, name=section.wandb_name or run_dir.name
    ),
}


def open_writers(run_dir: Path, section: LoggingSection) -> tuple[list[CurveWriter], list[str]]:
    """The writers that the config asks for and the env has; and the packages that the env lacks for others.

    Raises EnvironmentMismatch where one is demanded and absent.
    """
    wishes: dict[str, bool | Literal["auto"]] = {"tensorboard": section.tensorboard, "wandb": section.wandb}
    installed = {name: _is_installed(name) for name in wishes}
    for name, wish in wishes.items():
        if wish is True and not installed[name]:
            raise EnvironmentMismatch(
                f"logging.{name} is true, and the env has no package {name}.",
                remedy=f"add {name} to the recipe's requirements, lock and install again; "
                f"or --set logging.{name}=auto",
                context={"key": f"logging.{name}"},
            )
    writers = [WRITERS[name](run_dir, section) for name, wish in wishes.items() if wish and installed[name]]
    return writers, [name for name, wish in wishes.items() if wish and not installed[name]]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def numbers_of(kind: str, fields: Mapping[str, object]) -> dict[str, float]:
    """The record's numbers, named `step/loss`, `validation/loss`, …; its step is no curve."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in fields.items()
        if isinstance(value, int | float) and name not in ("step", "steps")
    }
