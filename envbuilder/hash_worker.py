"""Hashes files in a process of its own, whose CPU time counts by itself.

    python3 hash_worker.py CPU_SECONDS

Reads one order a line from standard input, and answers each with JSON lines on standard output. Standard
library only: it starts in some hundredths of a second. An order is {"path": …}, with "into", "at" and "size"
where the bytes are also to be written into the file "into", from its byte "at" on, no more than "size".
Answers:

    {"done": N}                     so many bytes more
    {"sha256": …, "size": N, …}     the file is read
    {"errno": N, …}                 it can't be read
    {…}                             CPU_SECONDS are used up

where … is "cpu_seconds", what this process has used so far.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from typing import Any

CHUNK = 1 << 20
TOLD = 1 << 24
"""Bytes after which it is told how far it is."""


def main() -> None:
    cpu_seconds = float(sys.argv[1])
    with suppress(BrokenPipeError):  # whoever gave the orders has ended
        for line in sys.stdin:
            try:
                answer = hashed(cpu_seconds, **json.loads(line))
            except BrokenPipeError:
                raise
            except OSError as error:
                answer = {"errno": error.errno}
            say({**answer, "cpu_seconds": time.process_time()})


def hashed(
    cpu_seconds: float, path: str, into: str | None = None, at: int = 0, size: int | None = None
) -> dict[str, Any]:
    digest, count, told = hashlib.sha256(), 0, 0
    buffer = memoryview(bytearray(CHUNK))
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    copy = None if into is None else os.open(into, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while more := os.readv(source, [buffer]):
            count += more
            if size is not None and count > size:
                break
            piece = buffer[:more]
            digest.update(piece)
            if copy is not None:
                write(copy, piece, at + count - more)
            if count - told >= TOLD:
                say({"done": count - told})
                told = count
                if time.process_time() >= cpu_seconds:
                    return {}
    finally:
        os.close(source)
        if copy is not None:
            os.close(copy)
    say({"done": count - told})
    return {"sha256": digest.hexdigest(), "size": count}


def write(copy: int, piece: memoryview, at: int) -> None:
    while piece:
        written = os.pwrite(copy, piece, at)
        piece, at = piece[written:], at + written


def say(answer: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), f"{json.dumps(answer)}\n".encode())  # short, so whole


if __name__ == "__main__":
    main()
