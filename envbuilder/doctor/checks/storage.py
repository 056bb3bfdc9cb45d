"""Room on the disks that the stages write to."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok
from envbuilder.doctor.subject import Subject
from envbuilder.lock import GROUPS
from envbuilder.report import Reporter
from envbuilder.target import target_for

GIB = 2**30
ENV_PER_LOCKED_BYTE = 1.6
"""An env of torch and its CUDA libraries: 4.7 GB installed from 2.94 GB of wheels."""
TYPICAL_LOCK = int(3e9)
"""Bytes of a lock with torch, where no lock is at hand."""
COMPILER_TEMPORARIES = 4 * GIB
"""nvcc's intermediate files, and the unpacked sources."""
HOME_CACHES = GIB
"""What Triton and torch compile and keep under ~ in the first run."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder that is written to."""

    name: str
    folder: Path
    """The nearest one that exists."""
    bytes_needed: int


def check_free_space(subject: Subject, reporter: Reporter) -> Outcome:
    """Free space at ROOT, HOME and TMPDIR; what lies on one file system is added up."""
    scratch = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    places = [
        _Place("ROOT", _existing(subject.root.path), _root_needs(subject)),
        _Place("HOME", _existing(Path.home()), HOME_CACHES),
        _Place("TMPDIR", _existing(scratch), GIB if subject.env else COMPILER_TEMPORARIES),
    ]
    evidence, short = [], []
    for _, on_one_disk in groupby(sorted(places, key=_device), key=_device):
        shared = list(on_one_disk)
        names = " and ".join(place.name for place in shared)
        needed = sum(place.bytes_needed for place in shared)
        free = shutil.disk_usage(shared[0].folder).free
        folders = ", ".join(str(place.folder) for place in shared)
        evidence.append(f"{names} ({folders}): {_gib(free)} free, {_gib(needed)} needed")
        if free < needed:
            short.append(names)
    for place in places:
        try:
            tempfile.TemporaryFile(dir=place.folder).close()
        except OSError as error:
            evidence.append(f"{place.name} ({place.folder}): {error.strerror}")
            short.append(place.name)
    if short:
        return failed(
            f"There is too little room, or no right to write, at {', '.join(dict.fromkeys(short))}.",
            *evidence,
            remedy="Free space there, or choose other disks: export ENVBUILDER_ROOT=FOLDER TMPDIR=FOLDER",
        )
    return ok("There is room for what is still to be fetched, compiled and installed.", *evidence)


def _root_needs(subject: Subject) -> int:
    """Bytes still to come under ROOT: the bundle, then the env and its copy while it is made."""
    if subject.env:
        return GIB
    locked = _locked_bytes(subject)
    fetched = subject.recipe is not None and subject.root.bundle(subject.recipe.name).is_dir()
    return (0 if fetched else locked) + int(2 * ENV_PER_LOCKED_BYTE * locked)


def _locked_bytes(subject: Subject) -> int:
    if subject.lock is None:
        return TYPICAL_LOCK
    target = target_for(subject.lock.target, subject.interpreter.minor)
    return sum(file.size for file in subject.lock.select(target, GROUPS))


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _device(place: _Place) -> int:
    return place.folder.stat().st_dev


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"


CHECKS = (
    Check(
        "storage.free-space",
        "free space",
        "free space at ROOT, HOME and TMPDIR against what fetch, compile and install will still write there",
        check_free_space,
    ),
)
