"""Quotas on a disk, as the file system's own program tells them."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from envbuilder.doctor.disks import Mount, Place
from envbuilder.process import run

TIMEOUT_S = 2
"""For one program: an NFS server without rpc.rquotad keeps `quota` waiting for ever."""
KIB = 1024
_BY_SERVER = frozenset(("nfs", "nfs4", "ext2", "ext3", "ext4", "xfs", "f2fs", "jfs"))
"""File systems whose quotas quota(1) knows."""


@dataclass(frozen=True)
class Usage:
    """Of bytes or of files; a limit that is None is not set."""

    used: int
    soft: int | None
    """May be passed for the time of grace."""
    hard: int | None

    @property
    def left(self) -> int | None:
        """Until nothing more can be written; None without a limit."""
        return None if self.hard is None else max(0, self.hard - self.used)

    @property
    def in_grace(self) -> bool:
        """Whether the soft limit is passed."""
        return self.soft is not None and self.used > self.soft


@dataclass(frozen=True)
class Quota:
    """What one user or group has and may have on one disk."""

    owner: str
    space: Usage
    """In bytes."""
    files: Usage


@dataclass(frozen=True)
class Program:
    """One that tells quotas."""

    name: str
    commands: Callable[[Place], tuple[tuple[str, ...], ...]]
    """Those to ask for a place: the user's quota, then that of the group whose files are made there."""
    parse: Callable[[str], Iterator[tuple[Usage, Usage]]]
    """Its answer → space and files; nothing where no quota is set."""


def program_for(mount: Mount) -> Program | None:
    """The program that knows the quotas of such a file system; None where none is known."""
    if mount.kind == "lustre":
        return Program("lfs", _lfs_commands, parse_table)
    if mount.kind == "gpfs":
        return Program("mmlsquota", _mmlsquota_commands, parse_mmlsquota)
    if mount.kind == "beegfs":
        return Program("beegfs-ctl", _beegfs_commands, parse_beegfs)
    return Program("quota", _quota_commands, parse_table) if mount.kind in _BY_SERVER else None


def read_quotas(program: Program, place: Place) -> tuple[Quota, ...] | None:
    """The quotas that hold at `place`; None where `program` gave no answer in time.

    MismatchError where it is not on this machine.
    """
    found: list[Quota] = []
    for owner, command in zip(("user", "group"), program.commands(place)):
        ended = run(command, timeout_s=TIMEOUT_S)
        if ended.timed_out:
            return None
        found += [Quota(owner, space, files) for space, files in program.parse(ended.output)]
    return tuple(found)


def is_installed(program: Program) -> bool:
    """Whether it is on the PATH."""
    return shutil.which(program.name) is not None


def parse_table(text: str) -> Iterator[tuple[Usage, Usage]]:
    """The answer of `lfs quota` and of `quota -p`, in KiB.

    A line wraps after a long name; `*` marks what is over its limit, and `[…]` what some servers didn't tell.
    """
    number, limits = r"\[?(\d+)\]?\*?", r"\[?(\d+)\]?\s+\[?(\d+)\]?\s+\S+"
    for row in re.finditer(rf"^\s*\S+\s+{number}\s+{limits}\s+{number}\s+{limits}", text, re.MULTILINE):
        space, files = [int(word) for word in row.groups()[:3]], [int(word) for word in row.groups()[3:]]
        yield _usage(*space, unit=KIB), _usage(*files)


def parse_mmlsquota(text: str) -> Iterator[tuple[Usage, Usage]]:
    """The answer of `mmlsquota -Y`, in KiB: fields between colons, named by a header line."""
    names: list[str] = []
    for words in (line.split(":") for line in text.splitlines() if line.startswith("mmlsquota::")):
        if words[2] == "HEADER":
            names = words
            continue
        row = dict(zip(names, words))
        space, files = (
            [int(row.get(f"{kind}{what}") or 0) for what in ("Usage", "Quota", "Limit")]
            for kind in ("block", "files")
        )
        yield _usage(*space, unit=KIB), _usage(*files)


def parse_beegfs(text: str) -> Iterator[tuple[Usage, Usage]]:
    """The answer of `beegfs-ctl --getquota --csv`, in bytes: there are no soft limits."""
    for line in text.splitlines():
        if row := re.fullmatch(r"[^,]*,\d+,(\d+),(\w+),(\d+),(\w+)", line.strip()):
            used, hard, files, most = (int(word) if word.isdigit() else 0 for word in row.groups())
            yield _usage(used, 0, hard), _usage(files, 0, most)


def _usage(used: int, soft: int, hard: int, *, unit: int = 1) -> Usage:
    """All programs write 0 for a limit that is not set."""
    return Usage(used * unit, soft * unit or None, hard * unit or None)


def _owners(folder: Path) -> tuple[str, str]:
    there = folder.stat()
    group = there.st_gid if there.st_mode & stat.S_ISGID else os.getgid()
    return str(os.getuid()), str(group)


def _lfs_commands(place: Place) -> tuple[tuple[str, ...], ...]:
    user, group = _owners(place.folder)
    path = str(place.folder)
    return ("lfs", "quota", "-q", "-u", user, path), ("lfs", "quota", "-q", "-g", group, path)


def _quota_commands(place: Place) -> tuple[tuple[str, ...], ...]:
    # -p: the grace as a number, so that no column is empty.
    return (("quota", "-w", "-p", "-u", "-f", place.mount.point),)


def _mmlsquota_commands(place: Place) -> tuple[tuple[str, ...], ...]:
    user, group = _owners(place.folder)
    device = place.mount.source.removeprefix("/dev/")
    return ("mmlsquota", "-Y", "-u", user, device), ("mmlsquota", "-Y", "-g", group, device)


def _beegfs_commands(place: Place) -> tuple[tuple[str, ...], ...]:
    user, group = _owners(place.folder)
    ask = ("beegfs-ctl", "--getquota", "--csv", f"--mount={place.mount.point}")
    return (*ask, "--uid", user), (*ask, "--gid", group)
