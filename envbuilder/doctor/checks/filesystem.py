"""How the disks behave that ROOT, HOME and TMPDIR lie on: programs, locks, speed, clock; TMPDIR."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep, time

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.limits import MEMORY_TO_COMPILE, gib, memory_here
from envbuilder.doctor.checks.storage import COMPILER_TEMPORARIES
from envbuilder.doctor.disks import Mount, Place, places
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.subject import Subject
from envbuilder.errors import MismatchError
from envbuilder.process import run
from envbuilder.report import Reporter

MIB = 2**20
LOCK_TIMEOUT_S = 8
"""A server whose lock daemon is away keeps even those waiting who asked not to wait."""
RUN_TIMEOUT_S = 6
_BUSY_TRIES = 5
"""A program that another check starts in this moment may hold the script open for writing."""
LOCAL_LOCKS = frozenset(("localflock", "nolock", "local_lock=all", "local_lock=flock"))
"""Mount options (Lustre's and NFS's) with which a lock holds on one node only."""
WRITES_MIB = (1, 1, 2, 4, 8)
"""Each takes as long as all before it: 16 MiB on a fast disk, 2 on a slow one."""
WRITE_FOR_S = 0.4
"""No further write is begun after that: a disk takes about twice as long at most."""
FILES_FOR_S = 0.4
MOST_FILES = 64
CLOCK_SKEW_S = 2.0
"""Some file systems count whole seconds, two at most. Beyond that make takes new files for old ones."""
SLOW_MIB_PER_S = 20
"""An env of 5 GB takes over four minutes to write, and 60 GiB of weights most of an hour."""
SLOW_MS_PER_FILE = 20
"""An env of 60,000 files takes over 20 minutes to install."""


def check_noexec(subject: Subject, reporter: Reporter) -> Outcome:
    """Runs a script from ROOT, HOME and TMPDIR: a disk that forbids it forbids to load libraries, too."""
    evidence: list[str] = []
    bad: list[Place] = []
    good: list[Place] = []
    for place in places(subject):
        said = "noexec" if "noexec" in place.mount.options else "no noexec"
        told = f"{place}: {place.mount.kind} at {place.mount.point}, {said} among its options"
        try:
            refused = why_nothing_runs(place.folder)
        except OSError as error:
            evidence.append(f"{told}; not tried: {error.strerror}")
            continue
        evidence.append(f"{told}; a script there {f'does not run: {refused}' if refused else 'runs'}")
        (bad if refused else good).append(place)
    if bad:
        return failed(
            f"No program runs, and no library loads, from {' and '.join(place.name for place in bad)}.",
            *evidence,
            remedy=_moved(bad, good),
        )
    if not good:
        return skipped(f"None of the folders can be written to: {'; '.join(evidence)}")
    return ok("Programs run from the folders that they are built and installed in.", *evidence)


def why_nothing_runs(folder: Path) -> str | None:
    """The error with which a script in `folder` doesn't run; None where it does.

    OSError where the script can't be written.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".envbuilder-exec-") as own:
        script = Path(own) / "script"
        script.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
        script.chmod(0o700)
        for _ in range(_BUSY_TRIES):
            try:
                ended = run([script], timeout_s=RUN_TIMEOUT_S)
            except OSError as error:
                if error.errno != errno.ETXTBSY:
                    return error.strerror
                sleep(0.05)
            else:
                return f"it ended with {ended.returncode}" if ended.returncode else None
    return os.strerror(errno.ETXTBSY)


def _moved(bad: list[Place], good: list[Place]) -> str:
    """The command that puts what lies at `bad` elsewhere: at one of `good`, if there is one."""
    elsewhere = f"{good[0].folder}/envbuilder" if good else "FOLDER"
    variables = {"ROOT": ("ENVBUILDER_ROOT",), "TMPDIR": ("TMPDIR",)}
    caches = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
    names = [name for place in bad for name in variables.get(place.name, caches)]
    words = [f"{name}={elsewhere}-{name.lower()}" for name in names]
    return f"mkdir -p {' '.join(w.partition('=')[2] for w in words)} && export {' '.join(words)}"


def check_locks(subject: Subject, reporter: Reporter) -> Outcome:
    """Two processes and one lock at ROOT and HOME."""
    evidence, without, on_one_node = [], [], []
    for place in places(subject)[:2]:
        try:
            found = run_script(
                Path(sys.executable),
                "locks.py",
                str(place.folder),
                timeout_s=LOCK_TIMEOUT_S,
                remedy="",
            )
        except MismatchError as error:
            found = {"flock": "gave no answer", "lockf": "gave no answer"}
            if not os.access(place.folder, os.W_OK):
                evidence.append(f"{place}: can't be written to")
                continue
            evidence += str(error.context.get("output", "")).splitlines()[-1:]
        states = ", ".join(f"{kind} {state}" for kind, state in found.items())
        evidence.append(f"{place}: {place.mount.kind} at {place.mount.point}: {states}")
        if set(found.values()) != {"works"}:
            without.append(place)
        elif local := LOCAL_LOCKS & place.mount.options:
            evidence.append(f"{place}: mounted with {', '.join(sorted(local))}")
            on_one_node.append(place)
    if without:
        return warning(
            f"File locks don't work at {_names(without)}. envbuilder does without them; SQLite, the hub's "
            "downloads and extensions compiled at run time rely on them.",
            *evidence,
            remedy=_unlocked(without),
        )
    if on_one_node:
        return warning(
            f"File locks at {_names(on_one_node)} hold on this node alone. envbuilder does without them; "
            "SQLite, the hub's downloads and extensions compiled at run time are not safe on several nodes.",
            *evidence,
            remedy=_unlocked(on_one_node),
        )
    if not evidence or all("can't be written" in line for line in evidence):
        return skipped(f"There is nowhere to try a lock: {'; '.join(evidence)}")
    return ok("File locks keep processes apart.", *evidence)


def _names(there: list[Place]) -> str:
    return " and ".join(place.name for place in there)


def _unlocked(there: list[Place]) -> str:
    if any(place.name == "HOME" for place in there):
        return 'export TORCH_EXTENSIONS_DIR="$(mktemp -d -p /tmp)" TRITON_CACHE_DIR="$(mktemp -d -p /tmp)"'
    return (
        "Keep databases and caches of other programs elsewhere; for what envbuilder does, nothing is needed."
    )


@dataclass(frozen=True)
class Speed:
    """How fast a folder takes what is written to it."""

    mib_per_s: float
    ms_per_file: float
    """To make a file of 1 KiB."""

    @property
    def is_slow(self) -> bool:
        """Whether work there takes unbearably long."""
        return self.mib_per_s < SLOW_MIB_PER_S or self.ms_per_file > SLOW_MS_PER_FILE


def measure_speed(folder: Path) -> Speed:
    """What `folder` takes: a large file, with fsync, then small ones. OSError where it takes nothing."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".envbuilder-speed-") as own:
        block = os.urandom(MIB)  # some disks compress, and store zeros for nothing
        written, start = 0, perf_counter()
        with (Path(own) / "large").open("wb", buffering=0) as file:
            for count in WRITES_MIB:
                for _ in range(count):
                    file.write(block)
                os.fsync(file.fileno())
                written += count
                if perf_counter() - start > WRITE_FOR_S:
                    break
        mib_per_s = written / (perf_counter() - start)
        made, start = 0, perf_counter()
        while made < MOST_FILES and perf_counter() - start < FILES_FOR_S:
            (Path(own) / f"small-{made}").write_bytes(block[:1024])
            made += 1
        return Speed(mib_per_s, 1000 * (perf_counter() - start) / made)


def check_speed(subject: Subject, reporter: Reporter) -> Outcome:
    """The speed of ROOT and of TMPDIR; measured once where they share a disk."""
    root, _, scratch = places(subject)
    evidence, slow, measured = [], [], 0
    one_disk = root.folder.stat().st_dev == scratch.folder.stat().st_dev
    for place in (root,) if one_disk else (root, scratch):
        try:
            speed = measure_speed(place.folder)
        except OSError as error:
            evidence.append(f"{place}: {error.strerror}")
            continue
        measured += 1
        evidence.append(
            f"{place}, {place.mount.kind}: {speed.mib_per_s:,.0f} MiB/s with fsync, "
            f"{speed.ms_per_file:.2f} ms a small file"
        )
        if speed.is_slow:
            slow.append(place)
    if slow:
        return warning(
            f"{_names(slow)}: data is taken slowly, at under {SLOW_MIB_PER_S} MiB/s or over "
            f"{SLOW_MS_PER_FILE} ms a file.",
            *evidence,
            remedy="Try again when the disk is less busy: envbuilder doctor --only storage.speed; if it "
            f"stays slow, choose a faster one: {_faster(slow)}",
        )
    if not measured:
        return skipped(f"Nothing can be written: {'; '.join(evidence)}")
    return ok("The disks take data fast enough.", *evidence)


def _faster(slow: list[Place]) -> str:
    names = {"ROOT": "ENVBUILDER_ROOT"}
    return "export " + " ".join(f"{names.get(place.name, place.name)}=FOLDER" for place in slow)


def check_clock(subject: Subject, reporter: Reporter) -> Outcome:
    """This machine's clock against that of the disks of ROOT and TMPDIR: the time that a new file gets."""
    evidence, apart = [], []
    root, _, scratch = places(subject)
    for place in (root, scratch):
        try:
            skew = clock_skew(place.folder)
        except OSError as error:
            evidence.append(f"{place}: not tried: {error.strerror}")
            continue
        evidence.append(
            f"{place}: a new file is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the clock"
        )
        if abs(skew) > CLOCK_SKEW_S:
            apart.append(place.name)
    if apart:
        return warning(
            f"This machine's clock and that of the disk of {' and '.join(apart)} differ: make and ninja "
            "build what is new once more, or leave what is old.",
            *evidence,
            remedy="Report it to the administrators (`chronyc tracking` or `timedatectl` shows whose clock "
            "is wrong); until then, build on the node's own disk: export ENVBUILDER_ROOT=FOLDER TMPDIR=/tmp",
        )
    if all("not tried" in line for line in evidence):
        return skipped(f"No file can be made: {'; '.join(evidence)}")
    return ok("A new file gets the time of this machine's clock.", *evidence)


def clock_skew(folder: Path) -> float:
    """Seconds by which a new file in `folder` is newer (below 0: older) than this machine's clock says."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".envbuilder-clock-") as file:
        before = time()
        file.write(b"x")
        file.flush()
        # On a network disk only what has reached the server has the server's time.
        os.fsync(file.fileno())
        after = time()
        modified = os.fstat(file.fileno()).st_mtime
    return modified - min(max(modified, before), after)


def check_scratch(subject: Subject, reporter: Reporter) -> Outcome:
    """TMPDIR: that it is there, and what it takes memory for."""
    given = os.environ.get("TMPDIR")
    if given and not Path(given).is_dir():
        return failed(
            "TMPDIR names a folder that is not there, and compilers don't look for another.",
            f"TMPDIR={given}",
            remedy=f"mkdir -p {given}, or: unset TMPDIR",
        )
    scratch = places(subject)[2]
    if not scratch.mount.is_memory:
        return ok("Temporary files lie on a disk.", f"{scratch}: {_on(scratch.mount)}")
    memory = memory_here()
    size = shutil.disk_usage(scratch.folder).total
    evidence = (f"{scratch}: {_on(scratch.mount)}, {gib(size)}", str(memory))
    if memory.usable < MEMORY_TO_COMPILE + COMPILER_TEMPORARIES:
        return warning(
            "Temporary files lie in memory, and count against what this process may use.",
            *evidence,
            remedy='mkdir -p "$HOME/tmp" && export TMPDIR="$HOME/tmp"; or in a job, ask for more memory: '
            "#SBATCH --mem=32G",
        )
    return ok("Temporary files lie in memory, of which there is enough.", *evidence)


def _on(mount: Mount) -> str:
    return f"{mount.kind} at {mount.point}"


CHECKS: tuple[Check, ...] = (
    Check(
        "storage.noexec",
        "whether programs run from the disks",
        "mount options of ROOT, HOME and TMPDIR, and a script that is run there",
        check_noexec,
    ),
    Check(
        "storage.locks",
        "file locks",
        "flock and lockf between two processes at ROOT and HOME",
        check_locks,
    ),
    Check(
        "storage.speed",
        "the disks' speed",
        "what ROOT and TMPDIR take a second: 16 MiB with fsync, and small files",
        check_speed,
    ),
    Check(
        "storage.scratch",
        "TMPDIR",
        "that TMPDIR is there, and whether it lies in memory",
        check_scratch,
    ),
    Check(
        "storage.clock",
        "the disks' clock",
        "the time of new files at ROOT and TMPDIR against this machine's clock",
        check_clock,
    ),
)
