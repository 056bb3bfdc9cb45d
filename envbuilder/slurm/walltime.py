"""How long a job may run: what is asked for, from an estimate and the limits. Pure; times are in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

_FACTOR, _ADDED_S = 1.5, 180
"""The margin: an estimate comes from other machines, and a job starts, loads modules and installs too."""
_WARN_S, _LEAST_WARN_S = 120, 20


@dataclass(frozen=True)
class Walltime:
    """What a job asks for, and whether its work fits."""

    seconds: int
    jobs: int = 1
    """How many jobs (or lives of one) of that length the work is expected to take."""


def choose_walltime(site_s: int, estimate_s: float | None, limits_s: tuple[int | None, ...] = ()) -> Walltime:
    """The walltime of a job whose work is expected to take `estimate_s` (None: nobody knows).

    `site_s` is the site's, `limits_s` those of QoS and partition (None: unlimited, or unknown): none is gone
    beyond. A short job starts sooner, so no more is asked for than the estimate with its margin. Without an
    estimate it is the site's, and Slurm says whether that is too much.
    """
    if estimate_s is None:
        return Walltime(site_s)
    most = min([site_s, *(limit for limit in limits_s if limit)])
    needed = estimate_s * _FACTOR
    wanted = math.ceil((needed + _ADDED_S) / 60) * 60
    if wanted <= most:
        return Walltime(wanted)
    # What one job gets done: it starts up and ends in good order, too.
    return Walltime(most, max(2, math.ceil(needed / max(most - _ADDED_S, most / 2))))


def warning_s(walltime_s: int) -> int:
    """How long before its end a job is told of it: two minutes, less for short jobs."""
    return max(_LEAST_WARN_S, min(_WARN_S, walltime_s // 5))
