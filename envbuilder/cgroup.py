"""What the batch system lets this process use: CPU and memory limits of its control groups (cgroups(7)).

A limit anywhere up the hierarchy holds, so the smallest is the one that counts. Version 1, version 2 and a
mixture of both are read, each where /proc/self/mountinfo says that it is mounted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

_NO_LIMIT = 1 << 62
"""Bytes. Version 1 writes "no limit" as the largest number of pages, some 2^63 bytes."""


@dataclass(frozen=True)
class Limits:
    """What control groups allow; None where they set no limit."""

    version: Literal[1, 2] | None
    """Of the control groups that limit CPU and memory here; None without any."""
    cpus: float | None
    """CPU time per wall time."""
    memory: int | None
    """Bytes."""


@dataclass(frozen=True)
class _Mount:
    root: PurePosixPath
    """The group that is mounted: "/", or a container's own."""
    folder: Path
    kind: str
    controllers: frozenset[str]


def control_group_limits(system: Path = Path("/")) -> Limits:
    """The limits of this process; `system` is the folder that holds `proc` and `sys`."""
    version: Literal[1, 2] | None = None
    cpus: list[float] = []
    memory: list[int] = []
    mounts = list(_mounts(system))
    for line in _read(system / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount = next((mount for mount in mounts if mount.kind == "cgroup2"), None)
            version = version or (2 if mount else None)
        elif wanted := {"cpu", "memory"} & set(controllers.split(",")):
            mount = next((m for m in mounts if m.kind == "cgroup" and wanted <= m.controllers), None)
            version = 1 if mount else version
        else:
            continue
        for group in _upwards(mount, path) if mount else ():
            cpus += _cpu_limit(group)
            memory += _memory_limit(group)
    return Limits(version, min(cpus, default=None), min(memory, default=None))


def _mounts(system: Path) -> Iterator[_Mount]:
    """Mounted hierarchies, as proc_pid_mountinfo(5) lists them."""
    for line in _read(system / "proc/self/mountinfo").splitlines():
        place, _, kind = line.partition(" - ")
        root, folder = (_unescaped(word) for word in place.split()[3:5])
        if kind.startswith("cgroup"):
            name, _, options = kind.split()[:3]
            controllers = frozenset(options.split(","))
            yield _Mount(PurePosixPath(root), system / folder.lstrip("/"), name, controllers)


def _upwards(mount: _Mount, path: str) -> Iterator[Path]:
    """The folder of group `path`, then those above it, as far as they are mounted."""
    here = PurePosixPath(path)
    inside = here.relative_to(mount.root) if here.is_relative_to(mount.root) else PurePosixPath()
    # A group above the process's own cgroup namespace shows as "..": only the mount's top can be read.
    group = mount.folder if ".." in inside.parts else mount.folder / inside
    yield group
    yield from (parent for parent in group.parents if parent.is_relative_to(mount.folder))


def _cpu_limit(group: Path) -> list[float]:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    # "max" in version 2 and -1 in version 1 mean none.
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() else []


def _memory_limit(group: Path) -> list[int]:
    texts = (_read(group / name) for name in ("memory.max", "memory.limit_in_bytes"))
    return [int(text) for text in texts if text.isdigit() and int(text) < _NO_LIMIT]


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
