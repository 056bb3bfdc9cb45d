"""Whether the other processes still live: a thread of each process tells the others of itself, every second.

A process that was stopped, or whose node is gone, is silent; one that hangs is behind the others. Either
would keep the others waiting in a collective operation, with the job's time running out. The lowest process
that is heard then ends the run with a sentence that names the late one. A failure on another process than
rank 0 reaches `outcome.json` in the same way.

The processes tell each other through the store that torchrun keeps for them, over a connection of its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.errors import TrainerError, TrainingFailed
from trainer.parallel import World

BEAT_SECONDS = 1.0
SILENT_SECONDS = 120.0
"""For so long, a process may be silent: a call into compiled code can hold Python's lock."""
SOON_SILENT_BEATS = 5
"""Enough to blame a process once it is known that one of them is late."""
GRACE_SECONDS = 5.0
"""For this process to end by itself after another one failed: mostly both met the same failure."""

End = Callable[[TrainerError], None]


@dataclass
class Heard:
    """What was last heard of a process."""

    message: dict[str, Any]
    at: float
    """By this process's monotonic clock."""


class Watch:
    """One process's watch over the others; without others it does nothing."""

    def __init__(self, world: World, *, timeout: float, end: End) -> None:
        self.before_the_end: Callable[[float], None] = lambda timeout: None
        """Called before the run is broken off: what is being written comes to its end."""
        self._world, self._timeout, self._end = world, timeout, end
        self._beat = min(BEAT_SECONDS, timeout / 10)
        self._silent = min(SILENT_SECONDS, timeout)
        self._beats = self._pulses = 0
        self._pulsed: float | None = None
        self._failure: dict[str, Any] | None = None
        self._failure_seen: float | None = None
        self._heard: dict[int, Heard] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._store: Any = None
        if world.size > 1:
            self._store = _connect(self._silent)
            self._exchange()  # one that ends before the first beat is known too
            self._thread = threading.Thread(target=self._go_on, name="watch", daemon=True)
            self._thread.start()

    def pulse(self) -> None:
        """The main thread came a step further. Before the first call, only silence counts."""
        self._pulses += 1
        self._pulsed = time.monotonic()

    def failed(self, error: TrainerError) -> None:
        """Tells the others of this process's failure at once."""
        self._failure = {"exit_code": error.exit_code, **error.described()}
        self._exchange()

    def close(self) -> None:
        """The run ends in good order: the others don't miss this process."""
        self._closing.set()
        self._exchange()

    def cause_of(self, error: TrainerError) -> TrainerError:
        """For a failure that only says that another process is gone: that one's own, or who it is."""
        if self._store is None:
            return error
        deadline = time.monotonic() + (SOON_SILENT_BEATS + 2) * self._beat
        while time.monotonic() < deadline:
            self._exchange()
            if other := self._others_failure():
                return other
            time.sleep(self._beat)
        silent = self._silent_for(SOON_SILENT_BEATS * self._beat)
        return self._gone(silent) if silent else error

    def _go_on(self) -> None:
        while not self._closing.wait(self._beat):
            self._exchange()
            error = self._verdict()
            if error is not None and not self._closing.is_set():
                self.before_the_end(60.0)
                self._end(error)
                return

    def _exchange(self) -> None:
        """Tells of this process and hears of the others."""
        if self._store is None:
            return
        with self._lock:
            self._beats += 1
            message = {
                "beats": self._beats,
                "pulses": self._pulses,
                "at": _place(self._main),
                "failure": self._failure,
                "closed": self._closing.is_set(),
            }
            try:
                self._store.set(_key(self._world.rank), json.dumps(message))
                for rank in range(self._world.size):
                    if self._store.check([_key(rank)]):
                        self._hear(rank, json.loads(self._store.get(_key(rank))))
            except RuntimeError:  # the store is gone with its process: nothing is heard of anyone
                return

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        before = self._heard.get(rank)
        if before is None or message["beats"] != before.message["beats"]:
            self._heard[rank] = Heard(message, time.monotonic())

    def _verdict(self) -> TrainerError | None:
        """Why the run must end, on the one process that is to end it."""
        now = time.monotonic()
        error: TrainerError | None = None
        if failure := self._others_failure():
            self._failure_seen = self._failure_seen or now
            if now - self._failure_seen > GRACE_SECONDS:
                error = failure
        elif silent := self._silent_for(self._silent):
            error = self._gone(silent)
        elif self._pulsed is not None and now - self._pulsed > self._timeout:
            silent = self._silent_for(SOON_SILENT_BEATS * self._beat)
            error = self._gone(silent) if silent else self._stuck()
        first = min(
            (rank for rank, heard in self._heard.items() if now - heard.at < SOON_SILENT_BEATS * self._beat),
            default=self._world.rank,
        )
        return error if first == self._world.rank else None

    def _others_failure(self) -> TrainerError | None:
        for rank, heard in sorted(self._heard.items()):
            failure = heard.message["failure"]
            if failure is not None and rank != self._world.rank:
                error = TrainingFailed(
                    failure["message"], remedy=failure["remedy"], context={**failure["context"], "rank": rank}
                )
                error.exit_code = failure["exit_code"]
                return error
        return None

    def _silent_for(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [
            rank
            for rank, heard in sorted(self._heard.items())
            if rank != self._world.rank and not heard.message["closed"] and now - heard.at > seconds
        ]

    def _gone(self, silent: list[int]) -> TrainingFailed:
        seconds = time.monotonic() - min(self._heard[rank].at for rank in silent)
        return TrainingFailed(
            f"{_named(silent)} not been heard of for {seconds:.0f} s: stopped, killed, or the node is gone.",
            remedy=GO_ON,
            context=self._places(),
        )

    def _stuck(self) -> TrainingFailed:
        pulses = {rank: heard.message["pulses"] for rank, heard in self._heard.items()}
        late = [rank for rank, count in sorted(pulses.items()) if count < max(pulses.values())]
        seconds = f"{self._timeout:.0f} s"
        return TrainingFailed(
            f"{_named(late)} not come further for {seconds}, and the others wait."
            if late
            else f"No process has come further for {seconds}.",
            remedy=f"{GO_ON}; if its work takes so long, raise distributed.timeout_minutes",
            context=self._places(),
        )

    def _places(self) -> dict[str, object]:
        return {f"rank {rank} is at": heard.message["at"] for rank, heard in sorted(self._heard.items())}


GO_ON = (
    "run the same command again to go on from the newest checkpoint; if it happens again: envbuilder doctor"
)


@contextmanager
def watching(world: World, *, timeout: float, end: End) -> Iterator[Watch]:
    """A watch that tells the others how this process's part of the run ended. `timeout` in seconds."""
    watch = Watch(world, timeout=timeout, end=end)
    try:
        yield watch
    finally:
        watch.close()


def _connect(timeout: float) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]  # documented, and not in __all__
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
    )


def _key(rank: int) -> str:
    return f"trainer/watch/{rank}"


def _named(ranks: list[int]) -> str:
    return f"Rank {ranks[0]} has" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))} have"


def _place(thread: int | None) -> str:
    """Where the thread's innermost frame of the trainer is."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("trainer"):
            code = frame.f_code
            return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "its beginning"
