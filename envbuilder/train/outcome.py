"""How a run ended: `outcome.json` where the trainer could write it, else what killed it."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envbuilder.errors import EnvbuilderError, InputError, MismatchError, StoppedError, TrainingError
from envbuilder.slurm_time import spoken
from envbuilder.train.supervision import Ended

_TAIL_BYTES = 64 * 1024
_SHOWN_LINES = 15
_GO_ON = "Run the same command again: it goes on from the last checkpoint."


class _Failure(BaseModel):
    message: str
    remedy: str
    context: dict[str, Any] = Field(default_factory=dict)


class _Outcome(BaseModel):
    """The fields of `outcome.json` that decide; the trainer writes figures beside them."""

    model_config = ConfigDict(extra="allow")

    status: Literal["finished", "stopped", "failed"]
    exit_code: int
    error: _Failure | None = None
    jobs_left: int | None = None
    """Jobs like this one that the rest is expected to take."""
    seconds_left: float | None = None
    """That the rest is expected to take."""
    job_seconds: float | None = None
    """Length of this job."""

    @property
    def rest(self) -> str:
        """What is left of a run that was stopped, in a sentence; empty where nobody knows."""
        if self.seconds_left is None:
            return ""
        jobs = ""
        if self.jobs_left:
            length = f"of {spoken(self.job_seconds)}" if self.job_seconds else "like this one"
            jobs = f": about {self.jobs_left} more job{'s' if self.jobs_left > 1 else ''} {length}"
        return f" About {spoken(self.seconds_left)} of training are left{jobs}."


@dataclass(frozen=True)
class _Death:
    """What a signal that ended a process most often means."""

    meaning: str
    remedy: str
    """`{recipe}` is the recipe's name."""


_DEATHS: dict[int, _Death] = {
    signal.SIGKILL: _Death(
        "was killed, most often because the host's memory ran out",
        "Give the job more memory (`memory` under [train] in the site file), or use fewer processes.",
    ),
    signal.SIGTERM: _Death(
        "was ended from outside before it could save, e.g. at the job's time limit", _GO_ON
    ),
    signal.SIGBUS: _Death(
        "lost memory that it shares with others, most often because /dev/shm is full",
        "See how full it is: df -h /dev/shm",
    ),
    signal.SIGSEGV: _Death("crashed in compiled code", "envbuilder doctor recipes/{recipe}.toml"),
    signal.SIGILL: _Death(
        "met an instruction that this CPU has not",
        "Compile on the kind of node that trains: envbuilder compile recipes/{recipe}.toml --local --rebuild",
    ),
    signal.SIGABRT: _Death(
        "gave up by itself, e.g. because another process did not answer in time",
        "Read the first error in the log: it tells which process was late, and where.",
    ),
}


def has_finished(run: Path) -> bool:
    """Whether the run in the folder `run` came to its end."""
    try:
        return _Outcome.model_validate_json((run / "outcome.json").read_bytes()).status == "finished"
    except (OSError, ValueError):
        return False


def conclude(run: Path, recipe_name: str, ended: Ended) -> dict[str, Any]:
    """What `outcome.json` says of a run that finished; every other end is raised as its typed error."""
    try:
        fields: dict[str, Any] = json.loads((run / "outcome.json").read_bytes())
        outcome = _Outcome.model_validate(fields)
    except (OSError, ValueError):
        raise _without_outcome(run, recipe_name, ended) from None
    if outcome.status == "finished":
        return fields
    raise _with_outcome(run, recipe_name, outcome, ended)


def _with_outcome(run: Path, recipe_name: str, outcome: _Outcome, ended: Ended) -> EnvbuilderError:
    kinds: dict[int, type[EnvbuilderError]] = {3: InputError, 7: MismatchError, 75: StoppedError}
    kind = kinds.get(outcome.exit_code, TrainingError)
    facts = {"run": run, "log": ended.log}
    if kind is TrainingError and -_exit_code(ended.returncode, _tail(ended)) in _DEATHS:
        # The other processes lost their connection to the one that a signal ended: that is the news.
        return _without_outcome(run, recipe_name, ended)
    if outcome.error is None:
        ending = "stopped in good order" if kind is StoppedError else "failed, and gave no reason"
        return kind(f"The run {run.name} {ending}.{outcome.rest}", remedy=_GO_ON, context=facts)
    return kind(
        outcome.error.message + (outcome.rest if kind is StoppedError else ""),
        remedy=outcome.error.remedy,
        context={**outcome.error.context, **facts},
    )


def _without_outcome(run: Path, recipe_name: str, ended: Ended) -> TrainingError:
    tail = _tail(ended)
    code = _exit_code(ended.returncode, tail)
    death = _DEATHS.get(-code)
    ending = death.meaning if death else f"ended with exit code {code} before it could say why"
    return TrainingError(
        f"A process of the run {run.name} {ending}.",
        remedy=death.remedy.format(recipe=recipe_name) if death else f"Read its log: less {ended.log}",
        context={
            "exit code": f"{code} ({signal.Signals(-code).name})" if death else code,
            "log": ended.log,
            "last lines": "\n" + "\n".join(tail.rstrip().splitlines()[-_SHOWN_LINES:]),
        },
    )


def _tail(ended: Ended) -> str:
    """The end of what this part of the run wrote."""
    try:
        with ended.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(ended.log_start, size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"(the log can't be read: {error})"


def _exit_code(returncode: int, log: str) -> int:
    """The exit code of the process that failed first: torchrun logs it, and itself always ends with 1."""
    root_cause = re.search(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", log, re.DOTALL)
    return int(root_cause[1]) if root_cause else returncode
