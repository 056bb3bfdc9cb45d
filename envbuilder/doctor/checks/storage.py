"""Room on the disks that the stages write to: free space, files, quotas; and the caches' disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from itertools import groupby
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.limits import GIB, gib
from envbuilder.doctor.disks import Place, make_place, places
from envbuilder.doctor.quotas import Quota, Usage, is_installed, program_for, read_quotas
from envbuilder.doctor.subject import Subject
from envbuilder.lock import GROUPS
from envbuilder.report import Reporter
from envbuilder.target import target_for

ENV_PER_LOCKED_BYTE = 1.6
"""An env of torch and its CUDA libraries: 4.7 GB installed from 2.94 GB of wheels."""
TYPICAL_LOCK = int(3e9)
"""Bytes of a lock with torch, where no lock is at hand."""
COMPILER_TEMPORARIES = 4 * GIB
"""nvcc's intermediate files, and the unpacked sources."""
HOME_CACHES = GIB
"""What Triton and torch compile and keep under ~ in the first run."""
ENV_FILES = 60_000
"""An env of torch with CUDA, transformers and what they need."""
CACHE_FILES = 2_000
"""What a first run's compilers leave, or one build's temporaries."""
CACHES = (
    ("TRITON_CACHE_DIR", ".triton/cache"),
    ("TORCH_EXTENSIONS_DIR", ".cache/torch_extensions"),
    ("TORCHINDUCTOR_CACHE_DIR", None),
    ("CUDA_CACHE_PATH", ".nv/ComputeCache"),
    ("HF_HOME", ".cache/huggingface"),
)
"""Variable → the folder under ~ that is used without it; None: one under TMPDIR."""
LOADED_CACHES = frozenset(("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"))
"""Caches that a run can't do without, and whose files are loaded while other processes replace them: on a
shared disk a stale handle or half a file ends the run (pytorch#173679). CUDA does without its cache; the
hub's may well be one that can only be read."""
CACHE_LEAST = GIB // 4
"""A Triton cache of one model with its tuned kernels; below this the first run ends with a full disk."""


def check_free_space(subject: Subject, reporter: Reporter) -> Outcome:
    """Free space at ROOT, HOME and TMPDIR; what lies on one file system is added up."""
    needs = _bytes_needed(subject)
    there = places(subject)
    evidence, short = [], []
    for _, on_one_disk in groupby(sorted(there, key=_device), key=_device):
        shared = list(on_one_disk)
        names = " and ".join(place.name for place in shared)
        needed = sum(needs[place.name] for place in shared)
        free = shutil.disk_usage(shared[0].folder).free
        folders = ", ".join(str(place.folder) for place in shared)
        evidence.append(f"{names} ({folders}): {gib(free)} free, {gib(needed)} needed")
        if free < needed:
            short.append(names)
    for place in there:
        try:
            tempfile.TemporaryFile(dir=place.folder).close()
        except OSError as error:
            evidence.append(f"{place}: {error.strerror}")
            short.append(place.name)
    if short:
        return failed(
            f"There is too little room, or no right to write, at {', '.join(dict.fromkeys(short))}.",
            *evidence,
            remedy="Free space there, or choose other disks: export ENVBUILDER_ROOT=FOLDER TMPDIR=FOLDER",
        )
    return ok("There is room for what is still to be fetched, compiled and installed.", *evidence)


def check_inodes(subject: Subject, reporter: Reporter) -> Outcome:
    """How many files can still be made at ROOT, HOME and TMPDIR."""
    needs = _files_needed(subject)
    evidence, short = [], []
    for _, on_one_disk in groupby(sorted(places(subject), key=_device), key=_device):
        shared = list(on_one_disk)
        disk = os.statvfs(shared[0].folder)
        names = " and ".join(map(str, shared))
        if disk.f_files == 0:  # btrfs and some network file systems make inodes as they go
            evidence.append(f"{names}: {shared[0].mount.kind} sets no number of files")
            continue
        needed = sum(needs[place.name] for place in shared)
        evidence.append(f"{names}: {disk.f_favail:,} more files, {needed:,} needed")
        if disk.f_favail < needed:
            short.append(names)
    if short:
        return failed(
            f"Too few files can still be made at {', '.join(short)}.",
            *evidence,
            remedy="Delete files there (du --inodes -d 2 FOLDER shows where they are), or choose another "
            "disk: export ENVBUILDER_ROOT=FOLDER TMPDIR=FOLDER",
        )
    return ok("As many files can be made as are still needed.", *evidence)


def check_quota(subject: Subject, reporter: Reporter) -> Outcome:
    """The user's and the group's quotas at ROOT and HOME, as the disk's own program tells them."""
    space, files = _bytes_needed(subject), _files_needed(subject)
    evidence, unasked, short, late = [], [], [], []
    for place in places(subject)[:2]:
        program = program_for(place.mount)
        if program is None or not is_installed(program):
            why = f"{program.name} is not on this machine" if program else "has no program for quotas"
            unasked.append(f"{place}: {place.mount.kind}, {why}")
            continue
        quotas = read_quotas(program, place)
        if not quotas:
            told = "gave no answer" if quotas is None else "tells of no quota"
            evidence.append(f"{place}: {program.name} {told}")
        for quota in quotas or ():
            evidence.append(f"{place}: {_described(quota)}")
            if _is_short(quota.space, space[place.name]) or _is_short(quota.files, files[place.name]):
                short.append(place.name)
            elif quota.space.in_grace or quota.files.in_grace:
                late.append(place.name)
    if short:
        return failed(
            f"The quota leaves too little at {' and '.join(dict.fromkeys(short))}.",
            *evidence,
            f"still needed: {', '.join(f'{gib(space[n])} and {files[n]:,} files at {n}' for n in short)}",
            remedy="Delete what is not needed (du -xh -d 2 FOLDER, du --inodes -d 2 FOLDER), or choose a "
            "disk with room: export ENVBUILDER_ROOT=FOLDER",
        )
    if late:
        return warning(
            f"At {' and '.join(dict.fromkeys(late))} more lies than the quota allows for longer than its "
            "grace.",
            *evidence,
            remedy="Delete what is not needed before the grace ends: du -xh -d 2 FOLDER",
        )
    if not evidence:
        return skipped(f"No quota can be asked for here: {'; '.join(unasked)}")
    return ok("The quotas leave room for what is still to be written.", *evidence, *unasked)


def check_caches(subject: Subject, reporter: Reporter) -> Outcome:
    """Where Triton, torch and CUDA keep what they compile, and the hub's library what it downloads."""
    evidence, unusable, shared = [], [], []
    for variable, under_home in CACHES:
        wanted = _cache_folder(variable, under_home)
        place = make_place(variable, wanted)
        free = shutil.disk_usage(place.folder).free
        can_write = place.folder.is_dir() and os.access(place.folder, os.W_OK | os.X_OK)
        state = f"{gib(free)} free" if can_write else "can't be written to"
        evidence.append(f"{variable}: {wanted}, on {place.mount.kind}, {state}")
        if variable in LOADED_CACHES and (not can_write or free < CACHE_LEAST):
            unusable.append(variable)
        elif variable in LOADED_CACHES and place.mount.is_shared:
            shared.append(variable)
    # A new folder of this user's own, on the node's own disk.
    elsewhere = " ".join(f'{name}="$(mktemp -d -p /tmp)"' for name in unusable or shared)
    if unusable:
        return failed(
            f"What kernels are compiled into can't be kept where {' and '.join(unusable)} would have it.",
            *evidence,
            remedy=f"Free space there, or: export {elsewhere}",
        )
    if shared and (subject.gpus.devices or subject.is_in_job):
        return warning(
            "What kernels are compiled into lies on a disk that other nodes write to as well.",
            *evidence,
            remedy=f"Keep it on the node's own disk: export {elsewhere}",
        )
    return ok("The caches of compiled kernels can be written.", *evidence)


def _cache_folder(variable: str, under_home: str | None) -> Path:
    if given := os.environ.get(variable):
        return Path(given).expanduser()
    if under_home is None:
        return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    above = os.environ.get("XDG_CACHE_HOME")
    if above and under_home.startswith(".cache/"):
        return Path(above) / under_home.removeprefix(".cache/")
    return Path.home() / under_home


def _is_short(usage: Usage, needed: int) -> bool:
    return usage.left is not None and usage.left < needed


def _described(quota: Quota) -> str:
    space, files = quota.space, quota.files
    allowed = gib(space.hard) if space.hard else "no limit"
    return (
        f"{quota.owner} has {gib(space.used)} of {allowed}, "
        f"{files.used:,} files of {f'{files.hard:,}' if files.hard else 'no limit'}"
    )


def _bytes_needed(subject: Subject) -> dict[str, int]:
    """Place → bytes still to be written there."""
    return {
        "ROOT": _root_needs(subject),
        "HOME": HOME_CACHES,
        "TMPDIR": GIB if subject.env else COMPILER_TEMPORARIES,
    }


def _files_needed(subject: Subject) -> dict[str, int]:
    """Place → files still to be made there. An env is made beside the one that it replaces."""
    env = CACHE_FILES if subject.env else 2 * ENV_FILES
    return {"ROOT": env, "HOME": CACHE_FILES, "TMPDIR": CACHE_FILES}


def _root_needs(subject: Subject) -> int:
    """Bytes still to come under ROOT: the bundle, then the env and its copy while it is made."""
    if subject.env:
        return GIB
    locked = _locked_bytes(subject)
    return (0 if subject.has_bundle else locked) + int(2 * ENV_PER_LOCKED_BYTE * locked)


def _locked_bytes(subject: Subject) -> int:
    if subject.lock is None:
        return TYPICAL_LOCK
    target = target_for(subject.lock.target, subject.interpreter.minor)
    return sum(file.size for file in subject.lock.select(target, GROUPS))


def _device(place: Place) -> int:
    return place.folder.stat().st_dev


CHECKS = (
    Check(
        "storage.free-space",
        "free space",
        "free space at ROOT, HOME and TMPDIR against what fetch, compile and install will still write there",
        check_free_space,
    ),
    Check(
        "storage.inodes",
        "the number of files",
        "files that can still be made at ROOT, HOME and TMPDIR against those of an env",
        check_inodes,
    ),
    Check(
        "storage.quota",
        "quotas",
        "the user's and the group's quotas at ROOT and HOME, by lfs, mmlsquota, beegfs-ctl or quota",
        check_quota,
    ),
    Check(
        "storage.caches",
        "the caches' disks",
        "where Triton, torch's extensions and inductor, CUDA and the hub's library keep their files",
        check_caches,
    ),
)
