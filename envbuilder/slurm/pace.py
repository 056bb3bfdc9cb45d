"""How often Slurm is asked. Centres watch their controllers, and throttle who asks them every second."""

from __future__ import annotations

import os
from dataclasses import dataclass

from envbuilder.errors import UsageError

PACE_VARIABLE = "ENVBUILDER_SLURM_PACE_S"
_ASK_S = 60.0
_LOOK_S, _SETTLE_S = 2.0, 10.0


@dataclass(frozen=True)
class Pace:
    """Times of the following, in seconds."""

    ask_s: float = _ASK_S
    """Between two questions to Slurm, whichever command asks it."""
    look_s: float = _LOOK_S
    """Between two looks at the files that the job writes, which cost Slurm nothing."""
    settle_s: float = _SETTLE_S
    """After a job was submitted, and after it wrote that it failed, until Slurm is asked about it."""
    tell_s: float = _ASK_S
    """Between two words about what has not changed: time left, place in the queue."""
    unknown: int = 5
    """How many questions in a row may find no such job: the accounting comes late."""


def usual_pace() -> Pace:
    """Once a minute, or as $ENVBUILDER_SLURM_PACE_S says. UsageError where that is no number of seconds."""
    told = os.environ.get(PACE_VARIABLE)
    if told is None:
        return Pace()
    try:
        ask_s = float(told)
    except ValueError:
        ask_s = 0.0
    if not 0 < ask_s < 86_400:
        raise UsageError(
            f"{PACE_VARIABLE} is {told!r}, which is no number of seconds.",
            remedy=f"unset {PACE_VARIABLE}; it is the time between two questions to Slurm, 60 without it",
        )
    return Pace(ask_s=ask_s, look_s=min(_LOOK_S, ask_s), settle_s=min(_SETTLE_S, ask_s))
