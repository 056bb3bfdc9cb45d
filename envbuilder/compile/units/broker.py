"""Who compiles when: one broker shares the machine out among all builds, and starts the longest unit first.

A unit is granted when a CPU is free and the memory that is estimated for all granted units is there. A
smaller one may pass a unit that doesn't fit yet, but not without end. When nothing runs, the first is granted
whatever its estimate: estimates never keep a build from its end.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from envbuilder.compile.units.lookahead import (
    SPLIT_CPUS,
    SPLIT_SECONDS,
    Share,
    play,
    share_of,
    split_memory,
)
from envbuilder.compile.units.records import Estimate, UnitId
from envbuilder.errors import StoppedError

_GATHER = 0.3
"""Seconds after each request. Build tools ask for units one by one, and the longest may be the last."""
_LONGEST_GATHER = 3.0
"""Seconds that this may go on."""
_HOLD = 15.0
"""Seconds that the first units wait for those of packages that are still on their way."""
_PASSES = 8
"""How often smaller units may pass one that doesn't fit; then nothing is granted until it fits."""
_WORTH_SPLITTING = 60.0
"""Seconds. Below this, several CPUs made units no faster."""
_GAIN = 0.985
"""More CPUs for one unit must bring the end of all work at least this near."""
_AS_LONG = 0.9
"""Units that take this much of another's time are taken to be split as that one is."""
_OVERDUE = 0.1
"""What is left of a unit that has taken longer than estimated, by what it has taken."""
_BURST = 10.0
"""Seconds within which kills are for one shortage of memory."""


class Stopped(StoppedError):
    """The broker grants nothing any more."""


class Verdict(enum.Enum):
    """What becomes of a unit that was killed for memory."""

    AGAIN = "again"
    """Ask for a new slot for the same unit: it will have fewer beside it, in the end none."""
    FAILED = "failed"
    """It ran alone, on one CPU: the machine has too little memory for it."""


@dataclass(frozen=True)
class Outcome:
    """What the compilation of a unit took."""

    cpu_seconds: float
    memory: int
    """Bytes at the peak."""
    returncode: int


@dataclass(frozen=True)
class RunningUnit:
    """A granted unit."""

    unit: UnitId
    threads: int
    memory: int
    """Bytes that are reserved for it."""
    began: float
    """Seconds since the broker was made."""
    seconds_left: float


@dataclass(frozen=True)
class WaitingUnit:
    """A unit that was asked for and not granted yet."""

    unit: UnitId
    estimate: Estimate
    asked: float
    """Seconds since the broker was made."""


@dataclass(frozen=True)
class DoneUnit:
    """A unit whose slot was given back."""

    unit: UnitId
    threads: int
    began: float
    ended: float
    """Both in seconds since the broker was made."""
    outcome: Outcome | None
    """None where the compilation broke off."""


@dataclass(frozen=True)
class Snapshot:
    """How things stand at one moment."""

    running: tuple[RunningUnit, ...]
    """In the order of their beginning."""
    waiting: tuple[WaitingUnit, ...]
    """In the order in which they would be granted."""
    done: tuple[DoneUnit, ...]
    """In the order of their end."""
    seconds_left: float
    """An estimate, of what was asked for."""
    memory: int
    """Bytes that the broker shares out: less than at first, once a unit was killed for memory."""


class Slot:
    """The right to compile one unit now."""

    def __init__(self, unit: UnitId, *, seconds: float, threads: int, memory: int, began: float) -> None:
        self.unit = unit
        self.threads = threads
        """CPUs that it may use at once."""
        self.cpus = SPLIT_CPUS[threads]
        """CPUs that it keeps busy in the mean."""
        self.memory = memory
        """Bytes that are reserved for it."""
        self.began = began
        """Seconds since the broker was made."""
        self.outcome: Outcome | None = None
        self._seconds = seconds * SPLIT_SECONDS[threads]

    def finish(self, outcome: Outcome) -> None:
        """Says how it ended; the slot is given back at the end of its block."""
        self.outcome = outcome

    def seconds_left(self, now: float) -> float:
        """An estimate; `now` in seconds since the broker was made."""
        elapsed = now - self.began
        return max(self._seconds - elapsed, elapsed * _OVERDUE)


@dataclass(eq=False)
class _Request:
    unit: UnitId
    estimate: Estimate
    splittable: bool
    number: int
    asked: float
    passed: int = 0
    """How often a unit behind it was granted because this one didn't fit."""
    slot: Slot | None = None

    @property
    def rank(self) -> tuple[float, int]:
        """Longest first, and the first asked of those that take as long."""
        return (-self.estimate.seconds, self.number)


class Broker:
    """Shares `cpus` and `memory` (bytes) out among threads that each compile one unit at a time.

    `gather_s` is how long (seconds) CPUs stay free after the first request, for a longer one to come.
    """

    def __init__(
        self,
        *,
        cpus: int,
        memory: int,
        clock: Callable[[], float] = time.monotonic,
        gather_s: float = _GATHER,
    ) -> None:
        self.cpus = max(1, cpus)
        self._memory = memory
        self._clock = clock
        self._start = clock()
        self._gather = gather_s
        self._gathered_at = self._gather_until = 0.0
        self._changed = threading.Condition()
        """Holds all that follows."""
        self._waiting: list[_Request] = []
        self._running: list[Slot] = []
        self._done: list[DoneUnit] = []
        self._asked = 0
        self._expected: set[str] = set()
        """Packages that have asked for nothing yet."""
        self._hold_until: float | None = None
        self._stopped: dict[str | None, str] = {}
        """Package, None for all → reason."""
        self._raised: dict[UnitId, int] = {}
        """Bytes of units that were killed for memory."""
        self._killed: list[tuple[float, Slot]] = []

    @contextmanager
    def slot(self, unit: UnitId, estimate: Estimate, *, splittable: bool = False) -> Iterator[Slot]:
        """Waits until `unit` may be compiled; the slot is given back when the block ends, however it ends.

        A `splittable` unit may get several CPUs, where that shortens the whole. Stopped after `stop`.
        """
        request = self._request(unit, estimate, splittable)
        try:
            yield self._wait(request)
        finally:
            self._leave(request)

    def expect(self, package: str) -> None:
        """Says that `package` will ask for units: until its first, others wait, for `_HOLD` s at most.

        Else the units of the package that asks first have all CPUs, and longer ones of another come last.
        """
        with self._changed:
            self._expected.add(package)

    def stop(self, reason: str, *, package: str | None = None) -> None:
        """No more grants, for `package` or for all: who waits, or asks, gets Stopped. What runs may end."""
        with self._changed:
            self._stopped.setdefault(package, reason)
            self._expected -= {package} if package else self._expected
            self._changed.notify_all()

    def out_of_memory(self, slot: Slot) -> Verdict:
        """What to do with a unit that was killed for memory; to be asked within its block.

        Once AGAIN was the answer, less memory is shared out: no more than the others had then.
        """
        with self._changed:
            now = self._now()
            # Of several that one shortage killed, some may have left already.
            gone = [one for at, one in self._killed if now - at < _BURST and at > slot.began]
            others = {id(one): one for one in (*self._running, *gone) if one is not slot}
            again = slot.unit in self._raised
            self._killed.append((now, slot))
            if not others and slot.threads == 1:
                return Verdict.FAILED
            if others:
                self._memory = min(self._memory, sum(one.memory for one in others.values()))
            # At the second time it is made to run alone.
            self._raised[slot.unit] = max(2 * slot.memory, self._memory + 1 if again else 0)
            return Verdict.AGAIN

    def snapshot(self) -> Snapshot:
        """What runs, what waits, what is done, and how long the rest will take."""
        with self._changed:
            now = self._now()
            running = tuple(
                RunningUnit(slot.unit, slot.threads, slot.memory, slot.began, slot.seconds_left(now))
                for slot in self._running
            )
            waiting = sorted(self._waiting, key=lambda request: request.rank)
            left = time_left(
                running, [request.estimate for request in waiting], cpus=self.cpus, memory=self._memory
            )
            return Snapshot(
                running=running,
                waiting=tuple(WaitingUnit(one.unit, one.estimate, one.asked) for one in waiting),
                done=tuple(self._done),
                seconds_left=max(left, self._work(now) / self.cpus),
                memory=self._memory,
            )

    def _now(self) -> float:
        return self._clock() - self._start

    def _request(self, unit: UnitId, estimate: Estimate, splittable: bool) -> _Request:
        with self._changed:
            if raised := self._raised.get(unit):
                estimate = Estimate(estimate.seconds, max(estimate.memory, raised), estimate.known)
                splittable = False
            now = self._now()
            if not self._waiting or unit.package in self._expected:
                self._gather_until = now + _LONGEST_GATHER
            self._gathered_at = min(now + self._gather, self._gather_until)
            self._asked += 1
            request = _Request(unit, estimate, splittable, self._asked, now)
            self._expected.discard(unit.package)
            if self._hold_until is None:
                self._hold_until = now + _HOLD
            self._waiting.append(request)
            self._grant()
            return request

    def _wait(self, request: _Request) -> Slot:
        with self._changed:
            while True:
                self._grant()
                if request.slot is not None:
                    return request.slot
                package = request.unit.package
                reason = self._stopped.get(None) or self._stopped.get(package)
                if reason is not None:
                    raise Stopped(
                        reason,
                        remedy="Run the same command again: what was compiled is not compiled again.",
                        context={"package": package, "source": request.unit.source},
                    )
                pause = self._pause(self._now())
                self._changed.wait(pause if pause > 0 else None)

    def _leave(self, request: _Request) -> None:
        with self._changed:
            slot = request.slot
            if slot is None:
                self._waiting.remove(request)
            else:
                self._running.remove(slot)
                done = DoneUnit(slot.unit, slot.threads, slot.began, self._now(), slot.outcome)
                self._done.append(done)
            self._grant()
            self._changed.notify_all()

    def _grant(self) -> None:
        """Grants what can be granted now."""
        now = self._now()
        if self._pause(now) > 0:
            return
        while (request := self._next()) is not None:
            threads = self._threads(request, now)
            memory = split_memory(request.estimate.memory, threads)
            slot = Slot(
                request.unit, seconds=request.estimate.seconds, threads=threads, memory=memory, began=now
            )
            request.slot = slot
            self._waiting.remove(request)
            self._running.append(slot)
            self._changed.notify_all()

    def _pause(self, now: float) -> float:
        """Seconds in which nothing is granted, since longer units may be asked for."""
        held = self._hold_until if self._expected and self._hold_until is not None else 0.0
        return max(held, self._gathered_at) - now

    def _next(self) -> _Request | None:
        if None in self._stopped or self._free() < 1:
            return None
        too_large: list[_Request] = []
        for request in sorted(self._waiting, key=lambda request: request.rank):
            if request.unit.package in self._stopped:
                continue
            if self._fits(request.estimate.memory):
                for larger in too_large:
                    larger.passed += 1
                return request
            if request.passed >= _PASSES:
                return None
            too_large.append(request)
        return None

    def _threads(self, request: _Request, now: float) -> int:
        """CPUs for a unit that is about to be granted: as many as bring the end of all work nearest."""
        free, seconds = self._free(), request.estimate.seconds
        if not request.splittable or seconds < _WORTH_SPLITTING or free < 2:
            return 1
        running = [Share(slot.seconds_left(now), slot.cpus, slot.memory) for slot in self._running]
        best, nearest = 1, math.inf
        for threads, cpus in SPLIT_CPUS.items():
            if cpus > free or not self._fits(split_memory(request.estimate.memory, threads)):
                break
            waiting = [
                share_of(one.estimate, threads)
                if one.splittable and one.estimate.seconds >= _AS_LONG * seconds
                else share_of(one.estimate)
                for one in self._waiting
            ]
            end = play(running, waiting, cpus=self.cpus, memory=self._memory)
            if end < nearest * _GAIN:
                best, nearest = threads, end
        return best

    def _work(self, now: float) -> float:
        """CPU seconds that are left: of what runs and waits."""
        running = sum(slot.seconds_left(now) * slot.cpus for slot in self._running)
        waiting = sum(request.estimate.seconds for request in self._waiting)
        return running + waiting

    def _free(self) -> float:
        return self.cpus - sum(slot.cpus for slot in self._running)

    def _fits(self, memory: int) -> bool:
        return not self._running or sum(slot.memory for slot in self._running) + memory <= self._memory


def time_left(
    running: Sequence[RunningUnit], waiting: Sequence[Estimate], *, cpus: int, memory: int
) -> float:
    """Seconds until all is done, were the estimates true: the broker's policy, played through.

    `cpus` is at least 1, and `memory` in bytes. Everything that waits is taken to run on one CPU.
    """
    shares = [Share(unit.seconds_left, SPLIT_CPUS[unit.threads], unit.memory) for unit in running]
    return play(shares, [share_of(estimate) for estimate in waiting], cpus=cpus, memory=memory)
