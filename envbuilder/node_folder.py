"""This user's private folder on the node's own disk, at the same path on every node."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NODE_FOLDERS = Path("/tmp")
"""Not $TMPDIR: the same for all jobs and on all nodes."""


def node_folder() -> Path:
    """Where it is, or would be."""
    return NODE_FOLDERS / f"envbuilder-{os.getuid()}"


def private_node_folder() -> Path | None:
    """The folder, made where it is missing; None where it can't be had.

    Everybody can write into its parent, so one that somebody else has put there, or that others can read or
    write, is not to be trusted.
    """
    mine = node_folder()
    try:
        mine.mkdir(mode=0o700, exist_ok=True)
        status = mine.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return mine if private else None
