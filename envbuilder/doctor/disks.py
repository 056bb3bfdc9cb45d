"""Which disks ROOT, HOME and TMPDIR lie on, as /proc/self/mountinfo (proc_pid_mountinfo(5)) tells."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from envbuilder.doctor.subject import Subject

SHARED_KINDS = frozenset(
    (
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs"),
        *("glusterfs", "panfs", "pvfs2", "wekafs"),
    )
)
"""File systems that several machines mount; of those behind FUSE, the word after "fuse."."""
MEMORY_KINDS = frozenset(("tmpfs", "ramfs"))
"""File systems whose files lie in memory."""
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    point: str
    kind: str
    """Of the file system, e.g. "ext4"."""
    source: str
    """A device, a server's export, a file system's name."""
    options: frozenset[str]
    """Those of the mount and those of the file system."""

    @property
    def is_shared(self) -> bool:
        """Whether other machines write there too."""
        return self.kind.removeprefix("fuse.") in SHARED_KINDS

    @property
    def is_memory(self) -> bool:
        """Whether what is written there takes memory."""
        return self.kind in MEMORY_KINDS


UNKNOWN = Mount("?", "unknown", "?", frozenset())


@dataclass(frozen=True)
class Place:
    """A folder that is written to."""

    name: str
    folder: Path
    """The nearest one that exists."""
    mount: Mount

    def __str__(self) -> str:
        return f"{self.name} ({self.folder})"


def places(subject: Subject) -> tuple[Place, Place, Place]:
    """ROOT, HOME and TMPDIR, in this order."""
    scratch = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    return (
        make_place("ROOT", subject.root.path),
        make_place("HOME", Path.home()),
        make_place("TMPDIR", scratch),
    )


def make_place(name: str, wanted: Path) -> Place:
    """The nearest folder above `wanted` that exists, and its disk."""
    folder = next(place for place in (wanted, *wanted.absolute().parents) if os.access(place, os.F_OK))
    # resolve() first: it may mount what is mounted on demand.
    real = folder.resolve()
    return Place(name, folder, mount_of(real, read_mounts(_MOUNTS.read_text(errors="surrogateescape"))))


def read_mounts(text: str) -> tuple[Mount, ...]:
    """What is mounted, in the order of mounting."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        place, (kind, source, *rest) = left.split(" "), right.split(" ")
        options = frozenset(",".join([place[5], *rest]).split(","))
        mounts.append(Mount(_unescaped(place[4]), kind, _unescaped(source), options))
    return tuple(mounts)


def mount_of(folder: Path, mounts: tuple[Mount, ...]) -> Mount:
    """The mount that `folder` (absolute, without links) lies on: of two at one point, the later."""
    above = [mount for mount in mounts if folder.is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point), default=UNKNOWN)


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
