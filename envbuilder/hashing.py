"""The sha256 of many files at a time: in this process or, where its CPU time is limited, in short-lived ones.

A limit on CPU time counts for each process by itself. Under one, files are given to workers
(`hash_worker.py`) that are replaced when they have used half of it, so there is no end to what may be hashed;
one file alone must be done within it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from envbuilder.budget import ENOUGH, budget
from envbuilder.errors import MismatchError, StoppedError

OnBytes = Callable[[int], None]
"""Is told how many bytes more are done; what it raises ends the work."""
_File = TypeVar("_File")
_Result = TypeVar("_Result")
_CHUNK = 1 << 20
_MOST_AT_ONCE = 16
"""Files read at the same time."""
_RETIRED = 0.5
"""Of the CPU time: a worker that has used more is given no further file."""
_SCRIPT = Path(__file__).with_name("hash_worker.py")


class Hasher(Protocol):
    """Hashes files; from any thread. OSError where a file can't be read, or is a link."""

    def sha256(self, path: Path, on_bytes: OnBytes) -> str:
        """Of the file `path`, in hexadecimal."""

    def copy(self, path: Path, size: int, into: BinaryIO, on_bytes: OnBytes) -> tuple[str, int]:
        """Appends the file `path` to `into`, at whose end it stands; its sha256, and its size.

        Where it has more than `size` bytes, it is not copied to its end, and what it returns is no more than
        that there are more.
        """


@contextmanager
def hashing(cpu_seconds: float | None = None) -> Iterator[Hasher]:
    """A `Hasher` for the block. `cpu_seconds`: what a process may use, by default the limit in force here."""
    limit = budget().cpu_seconds if cpu_seconds is None else cpu_seconds
    if limit is None:
        yield _Here()
        return
    workers = _Workers(ENOUGH * limit)
    try:
        yield workers
    finally:
        workers.end()


def hash_in_parallel(
    files: Sequence[_File], work: Callable[[_File, Hasher, OnBytes], _Result], on_bytes: OnBytes
) -> list[_Result]:
    """What `work` makes of each of `files`, in their order; `on_bytes` is called by one thread at a time.

    What is raised meanwhile, Ctrl-C too, ends them all: without this, threads would read on to the end.
    """
    stop, lock = threading.Event(), threading.Lock()

    def count(more: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            on_bytes(more)

    with hashing() as hasher, ThreadPoolExecutor(budget().at_once(_MOST_AT_ONCE)) as pool:
        futures = [pool.submit(work, file, hasher, count) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Ends the other threads."""


def open_plain(path: Path) -> FileIO:
    """The file `path`, unbuffered; OSError where it is a link, or can't be opened."""
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def pieces(file: FileIO) -> Iterator[memoryview]:
    """What is left of `file`, piece by piece; one is valid until the next is taken."""
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        yield buffer[:count]


class _Here:
    """In this process: hashing lets its other threads run."""

    def sha256(self, path: Path, on_bytes: OnBytes) -> str:
        digest = hashlib.sha256()
        with open_plain(path) as file:
            for piece in pieces(file):
                digest.update(piece)
                on_bytes(len(piece))
        return digest.hexdigest()

    def copy(self, path: Path, size: int, into: BinaryIO, on_bytes: OnBytes) -> tuple[str, int]:
        digest, count = hashlib.sha256(), 0
        with open_plain(path) as file:
            for piece in pieces(file):
                count += len(piece)
                if count > size:
                    break
                digest.update(piece)
                into.write(piece)
                on_bytes(len(piece))
        return digest.hexdigest(), count


class _Workers:
    """In processes that each use no more than `cpu_seconds`."""

    def __init__(self, cpu_seconds: float) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []

    def sha256(self, path: Path, on_bytes: OnBytes) -> str:
        sha256: str = self._answer({"path": str(path)}, on_bytes)["sha256"]
        return sha256

    def copy(self, path: Path, size: int, into: BinaryIO, on_bytes: OnBytes) -> tuple[str, int]:
        into.flush()
        # By its descriptor: a file on its way to its name may have none that another process can open.
        place = f"/proc/{os.getpid()}/fd/{into.fileno()}"
        order = {"path": str(path), "into": place, "at": into.tell(), "size": size}
        answer = self._answer(order, on_bytes)
        into.seek(0, os.SEEK_END)
        return answer["sha256"], answer["size"]

    def end(self) -> None:
        """Ends all workers: those that have work are no longer waited for."""
        for worker in self._all:
            worker.end()

    def _answer(self, order: dict[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
        worker = self._take()
        is_fresh = worker.cpu_seconds == 0
        answer = worker.answer(order, on_bytes)
        if "sha256" not in answer and "errno" not in answer:
            worker.end()
            if is_fresh:
                raise _too_large(Path(order["path"]), self._cpu_seconds)
            on_bytes(-worker.done)
            return self._answer(order, on_bytes)  # there may be enough time for another one
        if worker.cpu_seconds < _RETIRED * self._cpu_seconds:
            with self._lock:
                self._idle.append(worker)
        else:
            worker.end()
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), order["path"])
        return answer

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self._cpu_seconds)
            self._all.append(worker)
            return worker


class _Worker:
    """One process of `hash_worker.py`, for one thread at a time."""

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = 0.0
        """Used so far, as of its last answer."""
        self.done = 0
        """Bytes of the last order."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), str(cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to hear; without it, its pipes are closed
        )

    def answer(self, order: dict[str, Any], on_bytes: OnBytes) -> dict[str, Any]:
        """The last answer to `order`; StoppedError where the worker was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.done = 0
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{json.dumps(order)}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "done" not in answer:
                self.cpu_seconds = answer["cpu_seconds"]
                return answer
            self.done += answer["done"]
            on_bytes(answer["done"])
        raise StoppedError(
            "A process that hashed a file was ended by something else.",
            remedy="Run the same command again: it goes on from what it has.",
            context={"file": order["path"], "exit status": self._process.wait()},
        )

    def end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # of an order that was not read
            self._process.communicate()


def _too_large(path: Path, cpu_seconds: float) -> MismatchError:
    return MismatchError(
        f"Hashing {path.name} alone takes more CPU time than a process may use here.",
        remedy="Where jobs run, by the same command with srun before it: srun --cpus-per-task=4 envbuilder …",
        context={"file": path, "size": f"{path.stat().st_size:,} bytes", "CPU seconds": f"{cpu_seconds:.0f}"},
    )
