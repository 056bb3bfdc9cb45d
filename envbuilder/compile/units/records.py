"""What translation units took, and what one is going to take: the broker starts the longest first.

Each process appends to a file of its own, one JSON line for each compiled unit; all files are read together.
A line that is damaged, or that can't be true, is passed over: records make builds faster, never different,
and no build fails for want of them.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from statistics import median

from envbuilder.atomic import FILE_MODE, make_folder, writing
from envbuilder.errors import MismatchError
from envbuilder.toml import tomllib

SPLIT_WORK = 1.5
"""CPU time of a unit that nvcc compiles on several CPUs (--split-compile), by that on one: 1.2 to 1.6."""
SPLIT_MEMORY = 1.8
"""The same for its peak memory: 1.5 to 1.8."""

_LAST = 5
"""Compilations of one unit that are looked at."""
_FILES = 200
"""Files of records that are kept, the newest."""
_LONGEST = 7 * 86400.0
"""Seconds. What is said to have taken longer is damaged."""
_MOST = 1 << 42
"""Bytes, likewise."""
_SHARD_WORK = 1.2
"""The CPU time of all shards of a unit, by that of the whole."""
_SHARD_BASE = 400_000_000
"""Bytes that a shard takes however small it is: all headers are in it."""
_SLACK = 1.1
"""On measured memory: it is the peak of the unit's largest process, and smaller ones ran beside that."""
_CUDA_GUESS = 60.0
_HOST_GUESS = 40.0
_INSTANTIATION_GUESS = 15.0
"""Seconds."""
_GUESSED_MEMORY = 2 << 30
"""Bytes."""
_LARGE_SOURCE = 64 << 10
"""Bytes. A source of this size, or a larger one, is guessed to take twice as long as an empty one."""


@dataclass(frozen=True)
class UnitId:
    """One translation unit, or one shard of it, as it is compiled."""

    package: str
    """Normalised name, without a version: the next version's units take about the same."""
    source: str
    """Path in the source tree."""
    shard: str = ""
    """Which instantiations: their normalised text or a hash of it. Empty where the unit is compiled whole."""
    architectures: tuple[str, ...] = ()
    """E.g. ("sm_90",); none of a host file."""
    compiler: str = ""
    """E.g. "nvcc 13.0"."""


@dataclass(frozen=True)
class Estimate:
    """What a unit will take on one CPU."""

    seconds: float
    memory: int
    """Bytes at the peak."""
    known: bool
    """The unit was measured, here or where the tool was made; else it is guessed by its language."""


@dataclass(frozen=True)
class _Record:
    """One compilation on one CPU; what ran on several is brought back to one."""

    unit: UnitId
    seconds: float
    memory: int
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class _KnownUnit:
    """An entry of known_units.toml, which says what the fields are."""

    package: str
    source: str
    seconds: float
    memory: int
    seen: str
    heavier: Mapping[str, float] = field(default_factory=dict)


class Records:
    """The records in a folder. Safe for several threads, and for several processes on a shared disk."""

    def __init__(self, folder: Path, records: Iterable[_Record] = ()) -> None:
        self.folder = folder
        self.trouble: str | None = None
        """Why records can't be kept; None while they can."""
        self._file = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
        self._lock = threading.Lock()
        self._by_source: dict[tuple[str, str], list[_Record]] = {}
        for record in sorted(records, key=lambda record: record.at):
            self._remember(record)

    @classmethod
    def open(cls, folder: Path) -> Records:
        """The records in `folder`, which need not be there yet; the oldest files beyond a number go."""
        dated = []
        for path in folder.glob("*.jsonl"):
            with suppress(OSError):
                dated.append((path.stat().st_mtime, path))
        newest = [path for _, path in sorted(dated, reverse=True)]
        for path in newest[_FILES:]:
            with suppress(OSError):
                path.unlink()
        return cls(folder, (record for path in newest[:_FILES] for record in _read(path)))

    def add(self, unit: UnitId, seconds: float, cpu_seconds: float, memory: int, *, threads: int = 1) -> None:
        """Records that `unit` was compiled well: in `seconds` of wall time, on `threads` CPUs.

        `cpu_seconds` (0: not known) counts rather than `seconds`: the machine may have had other work.
        `memory` is in bytes (0: not known). Of a compilation that failed, or was killed, nothing is to be
        learned. Doesn't raise when the disk is full: then `trouble` says so.
        """
        work = cpu_seconds if cpu_seconds > 0 else seconds * threads
        if threads > 1:
            work, memory = work / SPLIT_WORK, int(memory / SPLIT_MEMORY)
        record = _Record(unit, work, memory, time.time())
        if not _is_plausible(record):
            return
        line = json.dumps(asdict(record), separators=(",", ":")) + "\n"
        with self._lock:
            self._remember(record)
            if self.trouble is None:
                self._append(line)

    def estimate(self, unit: UnitId, source_bytes: int, *, share: float = 1.0) -> Estimate:
        """What `unit` will take: from its own records, else from those nearest to it, else guessed.

        `source_bytes` is the size of its source; `share` says of a shard how much of the whole unit's
        work it has, more than 0 and at most 1.
        """
        with self._lock:
            records = tuple(self._by_source.get((unit.package, unit.source), ()))
        own = _from_records(unit, records)
        if own is not None:
            return own
        whole = _from_records(_whole(unit), records) if unit.shard else None
        whole = whole or _from_table(unit) or _guess(unit, source_bytes)
        return _shard_of(whole, share) if unit.shard else whole

    def total(self, units: Iterable[tuple[UnitId, int]]) -> Estimate:
        """All of `units` (each with its source's size in bytes) on one CPU, one after the other.

        Its memory is the largest unit's; it is known where all of them are.
        """
        estimates = [self.estimate(unit, size) for unit, size in units]
        return Estimate(
            seconds=sum(estimate.seconds for estimate in estimates),
            memory=max((estimate.memory for estimate in estimates), default=0),
            known=all(estimate.known for estimate in estimates),
        )

    def _remember(self, record: _Record) -> None:
        self._by_source.setdefault((record.unit.package, record.unit.source), []).append(record)

    def _append(self, line: str) -> None:
        """Writes one line at once, so that a process that is killed leaves whole lines."""
        data = line.encode()
        try:
            with writing(self._file, len(data)):
                make_folder(self.folder)
                descriptor = os.open(
                    self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE
                )
                try:
                    os.write(descriptor, data)
                finally:
                    os.close(descriptor)
        except (MismatchError, OSError) as error:
            self.trouble = f"What units take can't be recorded: {error}"


def _from_records(unit: UnitId, records: Sequence[_Record]) -> Estimate | None:
    """From the nearest records of the same source and shard: same compiler first, then architectures."""
    same = [record for record in records if record.unit.shard == unit.shard]
    for alike in (
        [r for r in same if r.unit.architectures == unit.architectures and r.unit.compiler == unit.compiler],
        [r for r in same if r.unit.compiler == unit.compiler],
        [r for r in same if r.unit.architectures == unit.architectures],
        same,
    ):
        if last := alike[-_LAST:]:
            passes = _passes(unit)
            return Estimate(
                seconds=median(record.seconds * passes / _passes(record.unit) for record in last),
                memory=int(max(record.memory for record in last) * _SLACK) or _GUESSED_MEMORY,
                known=True,
            )
    return None


def steady_seconds(unit: UnitId, source_bytes: int, instantiations: int) -> float:
    """What `unit` takes on one CPU by the table, else guessed, with so many explicit instantiations.

    Never from records: a unit is cut by this, and its shards must be the same in each build, for the cache to
    find them and for the wheel to have the same bytes.
    """
    known = _from_table(unit)
    if known is not None:
        return known.seconds
    return max(_guess(unit, source_bytes).seconds, _INSTANTIATION_GUESS * instantiations * _passes(unit))


def weight_of(unit: UnitId, instantiation: str) -> float:
    """How long `instantiation` of `unit` takes beside the unit's others, as far as known_units.toml tells.

    Not from records either.
    """
    entry = _known(unit)
    found = entry.heavier.items() if entry else ()
    return next((weight for pattern, weight in found if fnmatchcase(instantiation, pattern)), 1.0)


def _known(unit: UnitId) -> _KnownUnit | None:
    return next(
        (
            entry
            for entry in _known_units()
            if fnmatchcase(unit.package, entry.package) and fnmatchcase(unit.source, entry.source)
        ),
        None,
    )


def _from_table(unit: UnitId) -> Estimate | None:
    if (entry := _known(unit)) is None:
        return None
    return Estimate(entry.seconds * _passes(unit), int(entry.memory * 1_000_000 * _SLACK), known=True)


def _guess(unit: UnitId, source_bytes: int) -> Estimate:
    is_cuda = bool(unit.architectures) or PurePosixPath(unit.source).suffix == ".cu"
    one = _CUDA_GUESS if is_cuda else _HOST_GUESS
    # A larger source is taken for the longer one, but a small one may instantiate much from its headers.
    larger = 1 + min(1.0, source_bytes / _LARGE_SOURCE)
    return Estimate(one * larger * _passes(unit), _GUESSED_MEMORY, known=False)


def _shard_of(whole: Estimate, share: float) -> Estimate:
    memory = whole.memory
    if memory > _SHARD_BASE:
        memory = int(_SHARD_BASE + (memory - _SHARD_BASE) * min(1.0, share * _SHARD_WORK))
    return Estimate(whole.seconds * min(1.0, share * _SHARD_WORK), memory, whole.known)


def _whole(unit: UnitId) -> UnitId:
    return UnitId(unit.package, unit.source, "", unit.architectures, unit.compiler)


def _passes(unit: UnitId) -> int:
    """How often the unit is compiled: once for each architecture, and a host file once."""
    return max(1, len(unit.architectures))


def _read(path: Path) -> Iterator[_Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        # A record of another kind, of a newer tool perhaps, has other keys or types.
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = _record(json.loads(line))
            if _is_plausible(record):
                yield record


def _record(found: dict[str, object]) -> _Record:
    """ValueError, TypeError or KeyError where `found` is no record."""
    unit, numbers = found["unit"], [found[name] for name in ("seconds", "memory", "at")]
    if not isinstance(unit, dict) or not all(type(number) in (int, float) for number in numbers):
        raise TypeError("no record")
    texts = [unit[name] for name in ("package", "source", "shard", "compiler")]
    architectures = unit["architectures"]
    if not isinstance(architectures, list) or not all(isinstance(x, str) for x in (*texts, *architectures)):
        raise TypeError("no unit")
    package, source, shard, compiler = texts
    seconds, memory, at = (float(str(number)) for number in numbers)
    return _Record(
        UnitId(package, source, shard, tuple(architectures), compiler),
        seconds,
        int(min(memory, _MOST + 1)),
        at,
    )


def _is_plausible(record: _Record) -> bool:
    return 0 < record.seconds <= _LONGEST and 0 <= record.memory <= _MOST and math.isfinite(record.at)


@cache
def _known_units() -> tuple[_KnownUnit, ...]:
    """known_units.toml."""
    text = (files("envbuilder.compile.units") / "known_units.toml").read_text(encoding="utf-8")
    return tuple(_KnownUnit(**entry) for entry in tomllib.loads(text)["unit"])
