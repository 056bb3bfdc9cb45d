"""What this process may take of a machine that is shared, as a login node is: CPU time, CPUs, memory.

The kernel keeps it: a site's budget becomes this process's own limits (RLIMIT_CPU, CPU affinity). What it
starts inherits them, so programs such as uv start no more threads than they may. Where a limit is in force
already (`ulimit -t`, `ulimit -v`, control groups), the smaller one counts.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from envbuilder.cgroup import control_group_limits
from envbuilder.errors import StoppedError
from envbuilder.site import LoginBudget

ENOUGH = 0.9
"""Of the CPU time: who has used that much stops in good order, before the kernel or a watcher kills it."""
_WAY_OUT = 1
"""Seconds of CPU time that stopping in good order may take on a slow machine, however short the whole is."""
_LOOK_EVERY = 0.1
"""Seconds between two looks at the CPU time."""
_OWN_MEMORY = 512 << 20
"""Bytes of address space for the program itself."""
_MEMORY_PER_CPU = 2 * (72 << 20)
"""Bytes of address space for a CPU's two threads, of which one may wait: each has its stack and an arena of
glibc's, which takes 64 MiB of addresses."""
_STACK = 8 << 20
"""Bytes of a thread's stack. Without it, `ulimit -s` says, which clusters set high for Fortran's sake."""


@dataclass(frozen=True)
class Budget:
    """What a process may use."""

    cpu_seconds: int | None
    """CPU time of one process after which it is killed; None without a limit."""
    cpus: int
    """That may be kept busy."""
    memory: int | None
    """Bytes of address space; None without a limit."""

    def at_once(self, most: int) -> int:
        """How many threads may wait for disk or network at the same time: two for a CPU, at most `most`."""
        return max(1, min(most, 2 * self.cpus))


class _OutOfTime(BaseException):
    """Ends the main thread's work, as Ctrl-C would: nothing on the way takes it for a failure of its own."""


def budget() -> Budget:
    """What this process may use as it is."""
    cpu_seconds, memory = _soft(resource.RLIMIT_CPU), _soft(resource.RLIMIT_AS)
    cpus: float = min(len(os.sched_getaffinity(0)), control_group_limits().cpus or math.inf)
    return Budget(cpu_seconds, min(max(1, math.ceil(cpus)), _cpus_for(memory)), memory)


@contextmanager
def within(login: LoginBudget, *, kept: str) -> Iterator[Budget]:
    """Keeps this process and all that it starts within `login` and the limits that are in force already.

    StoppedError, saying what is `kept`, when this process has used up nearly all of its CPU time. For the
    main thread alone; the limits are as before when the block has ended.
    """
    former_affinity, former_cpu = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CPU)
    former_stack, former_arenas = threading.stack_size(), os.environ.get("MALLOC_ARENA_MAX")
    here = budget()
    allowed = Budget(
        _least(here.cpu_seconds, login.cpu_seconds),
        min(here.cpus, login.threads or here.cpus, _cpus_for(login.memory_bytes)),
        _least(here.memory, login.memory_bytes),
    )
    try:
        if allowed.cpus < len(former_affinity):
            # Any of them: were it always the first ones, all users of the machine would share those.
            os.sched_setaffinity(0, random.sample(sorted(former_affinity), allowed.cpus))
        if allowed.memory is not None:
            threading.stack_size(_STACK)
            # uv allocates with glibc, and has some ten threads: an arena for each is a gigabyte of addresses.
            os.environ.setdefault("MALLOC_ARENA_MAX", "2")
        if allowed.cpu_seconds is None:
            yield allowed
        else:
            resource.setrlimit(resource.RLIMIT_CPU, (allowed.cpu_seconds, former_cpu[1]))
            with _stopped_in_time(allowed.cpu_seconds, kept):
                yield allowed
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, former_cpu)
        os.sched_setaffinity(0, former_affinity)
        threading.stack_size(former_stack)
        if former_arenas is None:
            os.environ.pop("MALLOC_ARENA_MAX", None)


def cpu_seconds_used() -> float:
    """CPU time of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextmanager
def _stopped_in_time(cpu_seconds: int, kept: str) -> Iterator[None]:
    """StoppedError when of `cpu_seconds` only a reserve is left, or this process is told so (SIGXCPU)."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:  # the kernel repeats it each second: the way out must not be cut off
            asked = True
            raise _OutOfTime

    ended = threading.Event()
    main = threading.get_ident()

    def watch() -> None:
        while not ended.wait(_LOOK_EVERY):
            if time.process_time() >= min(ENOUGH * cpu_seconds, cpu_seconds - _WAY_OUT):
                # Not left to the kernel's own signal: it may go to another thread, and the main one sleep on.
                return signal.pthread_kill(main, signal.SIGXCPU)

    former = signal.signal(signal.SIGXCPU, stop)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except _OutOfTime as out_of_time:
        raise StoppedError(
            f"This process has used {time.process_time():.0f} of the {cpu_seconds} seconds of CPU time after "
            "which it would be killed here.",
            remedy=f"Run the same command again. {kept}",
            context={"CPU seconds, with all that it started": f"{cpu_seconds_used():.1f}"},
        ) from out_of_time
    finally:
        ended.set()
        signal.signal(signal.SIGXCPU, former)


def _soft(limit: int) -> int | None:
    soft, _ = resource.getrlimit(limit)
    return None if soft == resource.RLIM_INFINITY else soft


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def _cpus_for(memory: int | None) -> int:
    """The CPUs whose threads fit into `memory` bytes of address space."""
    if memory is None:
        return 1 << 30
    return max(1, (memory - _OWN_MEMORY) // _MEMORY_PER_CPU)
