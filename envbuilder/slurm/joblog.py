"""The part of a job's log that matters: its last lines, and the error that envbuilder itself wrote there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 256 * 1024
"""From the end: an error's context may hold a compiler's whole output."""
_LAST_LINES = 15


@dataclass(frozen=True)
class LogEnd:
    """What the end of a log says."""

    last: str = ""
    """The last lines; empty where there is no log."""
    message: str | None = None
    """Of the error that envbuilder ended with."""
    details: str = ""
    """That error's context, as it stands in the log."""
    remedy: str | None = None
    """Of that error."""


def read_log_end(path: Path) -> LogEnd:
    """The end of the log at `path`; an empty one where it isn't there."""
    try:
        with path.open("rb") as file:
            file.seek(-min(_READ_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            text = file.read().decode(errors="replace")
    except OSError:
        return LogEnd()
    return parse_log_end(text)


def parse_log_end(text: str) -> LogEnd:
    """The same of the log's text."""
    lines = text.rstrip().splitlines()
    last = "\n".join(lines[-_LAST_LINES:])
    starts = [i for i, line in enumerate(lines) if line.startswith(("error: ", "envbuilder: "))]
    if not starts:
        return LogEnd(last)
    start = starts[-1]
    message = lines[start].partition(": ")[2].strip()
    ends = [i for i, line in enumerate(lines) if i > start and line.startswith("remedy: ")]
    if not ends:
        return LogEnd(last, message)
    details = "\n".join(lines[start + 1 : ends[0]])
    return LogEnd(last, message, details, lines[ends[0]].removeprefix("remedy: ").strip())
