"""Asks the env's own trainer what it makes of a training config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envbuilder.doctor.scripts import json_object
from envbuilder.errors import EnvbuilderError, InputError, MismatchError
from envbuilder.process import run

TIMEOUT_S = 240
"""torch and transformers alone take a minute to import from a busy shared disk."""
# They would bring other code into the env's interpreter.
_DROPPED = re.compile(r"PYTHON\w*|VIRTUAL_ENV")
_SET = {
    "PYTHONNOUSERSITE": "1",
    # Or a folder called `trainer` where the command is typed would be imported, not the env's.
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
    "USE_HUB_KERNELS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # No GPU is needed, and one that hangs would hang this too.
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Inspection:
    """What `trainer.inspection` printed, or why it printed nothing."""

    parts: Mapping[str, Any] = field(default_factory=dict)
    """By name; one with "error" in it is what the trainer itself would end with."""
    problem: EnvbuilderError | None = None

    def error_of(self, part: str) -> EnvbuilderError | None:
        """What is wrong with `part` by the trainer's own words."""
        error = self.parts.get(part, {}).get("error")
        return (
            InputError(error["message"], remedy=error["remedy"], context=error["context"]) if error else None
        )


def inspect_config(
    python: Path, config: Path, *options: str, renew: str, environ: Mapping[str, str]
) -> Inspection:
    """Runs `trainer.inspection` by `python`; `renew` is the command that renews the env's trainer.

    `environ` are the variables that a training would start from.
    """
    kept = {name: value for name, value in environ.items() if not _DROPPED.fullmatch(name)}
    ended = run(
        [python, "-m", "trainer.inspection", config.absolute(), *options],
        env={**kept, **_SET},
        timeout_s=TIMEOUT_S,
    )
    if (parts := json_object(ended.output)) is not None:
        return Inspection(parts)
    facts = {"interpreter": python, "output": "\n".join(ended.output.strip().splitlines()[-5:])}
    if re.search(r"No module named '?trainer", ended.output):
        return Inspection(
            problem=MismatchError(
                "The env's trainer is missing, or too old to look into a config.", remedy=renew, context=facts
            )
        )
    how = f"took longer than {TIMEOUT_S} s" if ended.timed_out else f"ended with {ended.returncode}"
    return Inspection(
        problem=MismatchError(
            f"The env's trainer {how} when it looked into the config.",
            remedy=f"{python} -m trainer.inspection {config} {' '.join(options)}",
            context=facts,
        )
    )
