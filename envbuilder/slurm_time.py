"""Times as Slurm writes them, and as people read them. Pure; times are in seconds."""

from __future__ import annotations

import math
import re


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
