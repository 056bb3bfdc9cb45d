"""Where doctor was run and what it looked at: the head of its report, and of its JSON."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from envbuilder import __version__
from envbuilder.cgroup import control_group_limits
from envbuilder.doctor.subject import Subject
from envbuilder.errors import EnvbuilderError

_LIMIT_S = 5.0
"""For what a disk or a driver has to answer: the facts must not hold up the findings."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU."""

    name: str
    memory_mib: str
    driver: str


@dataclass(frozen=True)
class MachineFacts:
    """The machine, as this process may use it."""

    hostname: str
    os: str
    """E.g. "Debian GNU/Linux 12 (bookworm)"."""
    kernel: str
    architecture: str
    """E.g. "x86_64"."""
    python: str
    """Of envbuilder itself."""
    cpus: int
    """Those that this process may run on."""
    cpu_limit: float | None
    """CPU time per wall time that its control groups allow; None without a limit."""
    memory_bytes: int
    memory_limit_bytes: int | None
    """That its control groups allow; None without a limit."""
    gpus: tuple[GpuFacts, ...]
    slurm_job: str | None
    """The job's id; None outside a job."""


@dataclass(frozen=True)
class EnvFacts:
    """What the env's receipt says."""

    path: str
    python: str
    packages: int
    extensions: tuple[str, ...]
    """The compiled modules' import names."""
    compute_capabilities: tuple[str, ...]
    lock_sha256: str
    created_at: str
    """ISO 8601, UTC."""


@dataclass(frozen=True)
class SubjectFacts:
    """What was looked at."""

    recipe: str | None
    """Its name."""
    root: str
    lock_sha256: str | None
    env: EnvFacts | None
    """None where there is none, or its receipt can't be read."""


@dataclass(frozen=True)
class Facts:
    """All of it."""

    envbuilder: str
    """Its version."""
    machine: MachineFacts
    subject: SubjectFacts


def find_facts(subject: Subject) -> Facts:
    """The facts, within seconds: a GPU or an env that gives no answer meanwhile is left out."""
    limits = control_group_limits()
    machine = MachineFacts(
        hostname=socket.gethostname(),
        os=_operating_system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        cpu_limit=limits.cpus,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_limit_bytes=limits.memory,
        gpus=_soon(lambda: _gpus(subject)) or (),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
    )
    looked_at = SubjectFacts(
        recipe=subject.recipe.name if subject.recipe else None,
        root=str(subject.root.path),
        lock_sha256=subject.lock.digest if subject.lock else None,
        env=_soon(lambda: _env(subject)),
    )
    return Facts(__version__, machine, looked_at)


def _soon(find: Callable[[], Value]) -> Value | None:
    """What `find` gives; None where it fails or takes too long. It goes on in a daemon thread then."""
    found: list[Value] = []

    def keep() -> None:
        try:
            found.append(find())
        except EnvbuilderError:
            return  # A check says why.

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
    return found[0] if found else None


def _operating_system() -> str:
    with suppress(OSError, ValueError):
        # Its lines are a shell's assignments.
        settings = shlex.split(Path("/etc/os-release").read_text(encoding="utf-8"), comments=True)
        return dict(setting.split("=", 1) for setting in settings).get("PRETTY_NAME", platform.system())
    return platform.system()


def _gpus(subject: Subject) -> tuple[GpuFacts, ...]:
    return tuple(GpuFacts(gpu.name, gpu.memory_mib, gpu.driver) for gpu in subject.gpus.devices)


def _env(subject: Subject) -> EnvFacts | None:
    if subject.env is None:
        return None
    receipt = subject.receipt
    return EnvFacts(
        path=str(subject.env),
        python=receipt.python,
        packages=len(receipt.packages),
        extensions=tuple(extension.module for extension in receipt.extensions),
        compute_capabilities=receipt.compute_capabilities,
        lock_sha256=receipt.lock_sha256,
        created_at=receipt.created_at,
    )
