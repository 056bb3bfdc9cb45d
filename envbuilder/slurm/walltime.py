"""How long a job may run: what is asked for, from an estimate and the limits. Pure; times are in seconds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_FACTOR, _ADDED_S = 1.5, 180
"""The margin: an estimate comes from other machines, and a job starts, loads modules and installs too."""
_WARN_S, _LEAST_WARN_S = 120, 20


@dataclass(frozen=True, slots=True)
class Walltime:
    """What a job asks for, and whether its work fits."""

    seconds: int
    jobs: int = 1
    """How many jobs (or lives of one) of that length the work is expected to take."""


def seconds_of(text: str) -> int | None:
    """Seconds of a time as Slurm writes them: [D-]HH:MM:SS or MM:SS; None for UNLIMITED and for nothing."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def slurm_time(seconds: int) -> str:
    """`seconds` as sbatch's --time takes them: "00:30:00", "1-12:00:00"."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def spoken(seconds: float) -> str:
    """`seconds` for people: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


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
