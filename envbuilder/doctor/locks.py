"""Whether file locks keep processes apart: takes each kind here, and tries it in a second process.

A standalone script: standard library alone, run as `python locks.py FOLDER`. It prints one line of JSON,
"flock" and "lockf" → "works", "does nothing" or the error.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Callable

_REFUSED, _GRANTED, _BROKEN = range(3)
_AT_ONCE = fcntl.LOCK_EX | fcntl.LOCK_NB
Lock = Callable[[int, int], object]


def try_lock(lock: Lock, path: str) -> str:
    """What a second process is told that asks for the lock on `path` which this one holds."""
    file = os.open(path, os.O_RDWR)
    try:
        lock(file, _AT_ONCE)
        child = os.fork()
        if child == 0:
            os._exit(_second(lock, path))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.close(file)
    return {_REFUSED: "works", _GRANTED: "does nothing"}.get(status, "fails in a second process")


def _second(lock: Lock, path: str) -> int:
    try:
        # Opened anew: a file that was opened once is locked once, however many processes share it.
        lock(os.open(path, os.O_RDWR), _AT_ONCE)
    except (BlockingIOError, PermissionError):  # the two words that fcntl(2) has for a lock held elsewhere
        return _REFUSED
    except BaseException:
        return _BROKEN
    return _GRANTED


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile(dir=sys.argv[1], prefix=".envbuilder-locks-") as own:
        found = {"flock": try_lock(fcntl.flock, own.name), "lockf": try_lock(fcntl.lockf, own.name)}
    sys.stdout.write(json.dumps(found) + "\n")
