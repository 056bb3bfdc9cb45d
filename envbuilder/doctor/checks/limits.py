"""What this user and this job may use: memory, CPUs, processes, open files; and the clock and the locale."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from envbuilder.cgroup import control_group_limits
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.subject import Subject
from envbuilder.process import run
from envbuilder.report import Reporter

GIB = 2**30
MEMORY_LEAST = 2 * GIB
"""`import torch` with its CUDA libraries, or pip with a wheel of 900 MB, takes about one."""
MEMORY_TO_COMPILE = 8 * GIB
"""One unit of an attention kernel takes up to 6.1 GB in the compiler."""
OPEN_FILES_LEAST = 1024
"""What Linux gives where nobody chose otherwise; nothing is tried with less."""
OPEN_FILES_TO_TRAIN = 4096
"""Each tensor that a DataLoader's worker passes on holds a file open, each peer of NCCL several sockets."""
PROCESSES_LEAST, PROCESSES_ENOUGH = 256, 1024
"""Threads count: each of a job's processes starts as many as there are CPUs, several times over."""
RDMA_DEVICES = Path("/sys/class/infiniband")
_LOCKS_ANY_AMOUNT, _STARTS_ANY_NUMBER = 14, 24
"""CAP_IPC_LOCK and CAP_SYS_RESOURCE (capabilities(7)): for who has them the limits don't count."""
_LOCALE = """
import locale, sys
try:
    locale.setlocale(locale.LC_ALL, "")
    known = "known"
except locale.Error:
    known = "unknown"
print(known, locale.getpreferredencoding(False), sys.getfilesystemencoding())
"""
_IN_A_JOB = "where a job has the login shell's limits: #SBATCH --propagate=NONE"


@dataclass(frozen=True)
class _Ceiling:
    """A limit of setrlimit(2) below which something breaks."""

    id: str
    title: str
    resource: int
    option: str
    """Of the shell's ulimit."""
    unit: int
    """What ulimit counts in."""
    least: int
    """Below: failed."""
    enough: int
    """Below: a warning."""
    breaks: str
    """What the limit does."""
    of_login_nodes: bool = False
    """Login nodes set it against those who compile and train on them; what else runs there keeps to it."""


TORCH_ADDRESSES = 16 * GIB
"""A CUDA torch with its libraries maps some 8 GiB, and each thread of its own takes more."""
_NEVER = 1 << 62
"""No limit at all is enough."""
CEILINGS = (
    _Ceiling(
        "platform.address-space",
        "the limit of virtual memory",
        resource.RLIMIT_AS,
        "v",
        1024,
        least=64 * GIB,
        enough=_NEVER,
        breaks="CUDA reserves as many addresses as the machine and its GPUs have memory, and torch's "
        "libraries some more",
        of_login_nodes=True,
    ),
    _Ceiling(
        "platform.file-size",
        "the limit of a file's size",
        resource.RLIMIT_FSIZE,
        "f",
        1024,
        least=8 * GIB,
        enough=128 * GIB,
        breaks="one file of a model takes 5 GB and more, a packed bundle all that is in it; what is longer "
        "is cut off with `File too large`",
    ),
    _Ceiling(
        "platform.cpu-seconds",
        "the limit of CPU time",
        resource.RLIMIT_CPU,
        "t",
        1,
        least=1800,
        enough=_NEVER,
        breaks="a process is killed after that many seconds of CPU time: one unit of a CUDA extension takes "
        "the compiler up to 800, and training takes hours",
        of_login_nodes=True,
    ),
)


def torch_fits() -> bool:
    """Whether a process may have the addresses that torch's libraries take."""
    return _holds(resource.getrlimit(resource.RLIMIT_AS)[0], TORCH_ADDRESSES)


def check_ceiling(ceiling: _Ceiling, subject: Subject, reporter: Reporter) -> Outcome:
    """One limit against what compilers and training need."""
    soft, hard = resource.getrlimit(ceiling.resource)
    evidence = _shown(ceiling.option, soft, hard, ceiling.unit)
    if _holds(soft, ceiling.enough):
        return ok(f"There is no {ceiling.title.removeprefix('the ')} that matters.", evidence)
    if ceiling.of_login_nodes and subject.site is not None and not subject.is_in_job:
        return ok(
            f"There is a {ceiling.title.removeprefix('the ')} here, as login nodes have it; jobs that "
            "envbuilder submits don't inherit it.",
            evidence,
        )
    verdict = failed if soft < ceiling.least else warning
    return verdict(
        f"There is a {ceiling.title.removeprefix('the ')}: {ceiling.breaks}.",
        evidence,
        remedy=_raised(ceiling.option, hard, ceiling.enough, ceiling.unit),
    )


def check_open_files(subject: Subject, reporter: Reporter) -> Outcome:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    evidence = _shown("n", soft, hard)
    remedy = _raised("n", hard, OPEN_FILES_TO_TRAIN)
    if not _holds(soft, OPEN_FILES_LEAST):
        return failed(
            f"A process may have {soft} files open, fewer than programs take for granted.",
            evidence,
            remedy=remedy,
        )
    if not _holds(soft, OPEN_FILES_TO_TRAIN) and subject.gpus.devices:
        return warning(
            f"A process may have {soft} files open: training ends with `Too many open files` where many "
            "workers load data.",
            evidence,
            remedy=remedy,
        )
    return ok("Enough files can be open at once.", evidence)


def check_processes(subject: Subject, reporter: Reporter) -> Outcome:
    """How many more processes and threads this user may start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    evidence = [_shown("u", soft, hard)]
    if soft == resource.RLIM_INFINITY or _has_capability(_STARTS_ANY_NUMBER):
        return ok("The number of processes has no limit for this user.", *evidence)
    used = _threads_of_this_user()
    evidence.append(f"{used} processes and threads of this user run, {max(0, soft - used)} more may")
    if soft - used >= PROCESSES_ENOUGH:
        return ok("Enough processes can be started.", *evidence)
    verdict = failed if soft - used < PROCESSES_LEAST else warning
    return verdict(
        "Few more processes and threads may be started: compilers, NCCL and data loaders start hundreds, and "
        "end with `Resource temporarily unavailable`.",
        *evidence,
        remedy=_raised("u", hard, used + PROCESSES_ENOUGH) + "; or end what is not needed: ps -L -u $USER",
    )


def _threads_of_this_user() -> int:
    # A process has one entry in task/ for each thread.
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if folder.stat().st_uid == os.getuid():
                    count += (folder / "task").stat().st_nlink - 2
            except OSError:  # it has ended
                continue
    return count


def check_locked_memory(subject: Subject, reporter: Reporter) -> Outcome:
    """How much memory may be locked, which RDMA needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in RDMA_DEVICES.glob("*"))
    if not adapters:
        return ok(
            "There is no RDMA adapter here, so no memory need be locked.", _shown("l", soft, hard, 1024)
        )
    evidence = (_shown("l", soft, hard, 1024), f"RDMA adapters: {', '.join(adapters)}")
    if soft == resource.RLIM_INFINITY or _has_capability(_LOCKS_ANY_AMOUNT):
        return ok("Memory can be locked, as RDMA needs.", *evidence)
    return warning(
        "Only so much memory may be locked: NCCL over several nodes fails to register its buffers "
        "(`ibv_reg_mr … Cannot allocate memory`).",
        *evidence,
        remedy=_raised("l", hard, _NEVER, 1024),
    )


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(capabilities, 16) >> number & 1)


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    machine: int
    usable: int
    """The control groups' limit, or all that the machine has."""

    def __str__(self) -> str:
        allowed = gib(self.usable) if self.usable < self.machine else "all of it"
        return f"the machine has {gib(self.machine)}, and control groups allow this process {allowed}"


def memory_here() -> Memory:
    """What this process may use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(machine, min(machine, control_group_limits().memory or machine))


def check_memory(subject: Subject, reporter: Reporter) -> Outcome:
    """The memory of this process's control groups, or of the machine where that is less."""
    memory = memory_here()
    remedy = (
        f"Compile in a job: envbuilder compile {subject.recipe_file} --sbatch --site NAME, with "
        'memory = "16G" or more in the site\'s [build]; in a job of your own: #SBATCH --mem=16G'
    )
    if memory.usable < MEMORY_LEAST:
        return failed("There is too little memory here even to import torch.", str(memory), remedy=remedy)
    compiles = subject.recipe is not None and bool(subject.recipe.build)
    if memory.usable < MEMORY_TO_COMPILE and (memory.usable < memory.machine or compiles):
        return warning(
            "A compiler of CUDA code may be killed here for want of memory, and so may a large download.",
            str(memory),
            remedy=remedy,
        )
    return ok("There is memory to compile and to install.", str(memory))


def check_cpus(subject: Subject, reporter: Reporter) -> Outcome:
    """The CPUs that this process sees, and the CPU time that it gets."""
    visible = sorted(os.sched_getaffinity(0))
    allowed = control_group_limits().cpus
    evidence = (
        f"{len(visible)} of {os.cpu_count()} CPUs may be used",
        f"control groups allow {f'the time of {allowed:g} CPUs' if allowed else 'all of their time'}",
    )
    usable = min(float(len(visible)), allowed or float("inf"))
    if usable < 2 and (os.cpu_count() or 1) > 1:
        return warning(
            "One CPU is all that there is: one compiler runs at a time, and loading data holds training up.",
            *evidence,
            remedy="Ask for more: #SBATCH --cpus-per-task=8 (and with srun, --cpus-per-task again)",
        )
    if allowed and 2 * allowed <= len(visible):
        count = max(1, int(allowed))
        chosen = ",".join(map(str, visible[:count]))
        return warning(
            f"{len(visible)} CPUs are seen and the time of {allowed:g} is given: programs start a thread for "
            "each CPU that they see, and are held up again and again.",
            *evidence,
            remedy=f"Show as many as there are: taskset --cpu-list {chosen} COMMAND",
        )
    return ok(f"There are {usable:g} CPUs to work with.", *evidence)


def check_locale(subject: Subject, reporter: Reporter) -> Outcome:
    """The encoding that the env's Python takes from the locale, and whether that locale is installed."""
    variables = [
        f"{name}={value}" for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))
    ]
    ended = run([subject.python, "-S", "-c", _LOCALE], timeout_s=10)
    if ended.returncode:
        return skipped(f"{subject.python} doesn't run; platform.interpreter tells more.")
    known, preferred, for_names = ended.output.split()[-3:]
    evidence = (" ".join(variables) or "no locale is set", f"text: {preferred}, file names: {for_names}")
    remedy = "export LC_ALL=C.UTF-8 (`locale -a` shows which there are)"
    if {_plain(preferred), _plain(for_names)} != {"utf8"}:
        return failed(
            "Python doesn't read text as UTF-8 here: a README or a file name beyond ASCII ends a build with "
            "UnicodeDecodeError.",
            *evidence,
            remedy=remedy,
        )
    if known == "unknown":
        return warning(
            "The locale that the variables name is not installed: tools complain at each start, some stop.",
            *evidence,
            remedy=remedy,
        )
    return ok("Text is read as UTF-8.", *evidence)


def _plain(encoding: str) -> str:
    return encoding.lower().replace("-", "").replace("_", "")


def _holds(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed


def _shown(option: str, soft: int, hard: int, unit: int = 1) -> str:
    return f"ulimit -S{option}: {_counted(soft, unit)}; ulimit -H{option}: {_counted(hard, unit)}"


def _counted(limit: int, unit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit // unit)


def _raised(option: str, hard: int, needed: int, unit: int = 1) -> str:
    """The command that raises a limit, as far as the hard one lets a user."""
    if not _holds(hard, needed):
        return f"The administrators raise the hard limit (/etc/security/limits.conf); {_IN_A_JOB}"
    wanted = "unlimited" if needed == _NEVER else str(-(-needed // unit))
    return f"ulimit -S{option} {wanted}, in ~/.bashrc as well; {_IN_A_JOB}"


def gib(count: int) -> str:
    """`count` bytes, for a reader."""
    return f"{count / GIB:,.1f} GiB"


def _ceiling_check(ceiling: _Ceiling) -> Check:
    run_it: Callable[[Subject, Reporter], Outcome] = partial(check_ceiling, ceiling)
    return Check(ceiling.id, ceiling.title, f"ulimit -{ceiling.option}", run_it)


CHECKS: tuple[Check, ...] = (
    Check(
        "platform.memory",
        "memory",
        "the control groups' memory limit and the machine's memory against what a compiler takes",
        check_memory,
    ),
    Check("platform.cpus", "CPUs", "the CPUs that this process sees, and the time that it gets", check_cpus),
    *map(_ceiling_check, CEILINGS),
    Check("platform.open-files", "the limit of open files", "ulimit -n", check_open_files),
    Check(
        "platform.processes",
        "the limit of processes",
        "ulimit -u against what this user runs already",
        check_processes,
    ),
    Check(
        "platform.locked-memory",
        "the limit of locked memory",
        "ulimit -l, where there is a GPU and an RDMA adapter",
        check_locked_memory,
        needs=("gpu",),
    ),
    Check("platform.locale", "the locale", "the encoding that Python takes from the locale", check_locale),
)
