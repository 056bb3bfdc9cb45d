"""Running the trainer's processes to their end: progress, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from envbuilder.errors import TrainingError, UsageError
from envbuilder.progress_file import ProgressFile
from envbuilder.report import Reporter
from envbuilder.train.metrics import RunMetrics

RUN_VARIABLE = "ENVBUILDER_RUN"
"""Every process of a run carries the run's folder in this variable, and is found by it whoever started it."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LINGER_S = 60.0
"""How long processes may go on after the outcome was written (a communicator can hang in its teardown)."""

_POLL_S = 0.2
_KILL_S = 10.0


@dataclass(frozen=True)
class Ended:
    """The launcher has ended, and so have all processes of the run."""

    returncode: int
    """As `subprocess` gives it: -N where signal N ended it."""
    log: Path
    log_start: int
    """Where in `log` this part of the run begins, in bytes: a run that goes on appends to it."""
    stopped_by_hand: bool = False
    """Somebody wanted it to end: SIGINT or SIGTERM came, or RUN/stop was made, and no SIGUSR1 before."""


def supervise(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    run: Path,
    reporter: Reporter,
    progress: ProgressFile | None = None,
    on_first_step: Callable[[], None] = lambda: None,
) -> Ended:
    """Runs `argv` as the run in the folder `run`, until it ends or has been told to stop and ends.

    `progress` is told of each step too. `on_first_step` is called once, after the first step of this part.

    SIGINT, SIGTERM and SIGUSR1 become the file RUN/stop; a second SIGINT ends everything at once.
    Must be called in the main thread, where Python handles signals.

    Raises UsageError where the run is already going on here, TrainingError at a second SIGINT.
    """
    if pids := processes_of(run):
        raise UsageError(
            f"The run {run.name} is already going on here (process {pids[0]}).",
            remedy=f"Wait for its end, or stop it with: touch {run / 'stop'}",
            context={"run": run},
        )
    for name in ("stop", "outcome.json"):  # An earlier part of the run left them.
        (run / name).unlink(missing_ok=True)
    log = run / "log.txt"
    metrics = RunMetrics(run / "metrics.jsonl", run.name, reporter, progress, on_first_step)
    with _stop_file_at_signals(run) as received, log.open("ab") as sink:
        log_start = sink.tell()
        process = subprocess.Popen(
            argv,
            env={**env, RUN_VARIABLE: str(run)},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            # In a session of its own, Ctrl-C at the terminal reaches this program alone.
            start_new_session=True,
        )
        try:
            asked = _follow(process, run, metrics, received, reporter)
        finally:
            _end_processes(run)
            process.wait()
    by_hand = received[0] is not signal.SIGUSR1 if received else asked or _stopped_by_file(run)
    return Ended(process.returncode, log, log_start, by_hand)


def _follow(
    process: subprocess.Popen[bytes],
    run: Path,
    metrics: RunMetrics,
    received: list[signal.Signals],
    reporter: Reporter,
) -> bool:
    """Returns once it has ended: whether RUN/stop was seen, whoever made it."""
    told = asked = False
    outcome_seen: float | None = None
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL_S)
        metrics.look()
        asked = asked or (run / "stop").exists()
        if process.returncode is not None:
            return asked
        if received and not told:
            told = True
            reporter.note(f"{received[0].name}: stopping at the next step, with a checkpoint")
        if received.count(signal.SIGINT) > 1:
            raise TrainingError(
                f"The run {run.name} was ended at once, without a checkpoint.",
                remedy="Run the same command again: it goes on from the last checkpoint.",
                context={"run": run},
            )
        if outcome_seen is None and (run / "outcome.json").exists():
            outcome_seen = time.monotonic()
        if outcome_seen is not None and time.monotonic() - outcome_seen > LINGER_S:
            reporter.warn(f"the processes of {run.name} did not end by themselves, and were killed")
            return asked


def _stopped_by_file(run: Path) -> bool:
    """Whether the trainer found RUN/stop, which it removes: perhaps before anybody else has seen it."""
    try:
        return bool(json.loads((run / "outcome.json").read_bytes()).get("stopped_by_file"))
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _stop_file_at_signals(run: Path) -> Iterator[list[signal.Signals]]:
    """Turns the stop signals into RUN/stop; yields the list of those that came."""
    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        (run / "stop").touch()

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes_of(run: Path) -> list[int]:
    """Processes on this machine that belong to the run in the folder `run`; zombies are not among them."""
    mark = f"{RUN_VARIABLE}={run}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # Another user's, or it has ended meanwhile.
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return sorted(set(found) - {os.getpid()})


def _end_processes(run: Path) -> None:
    """Kills what is left of the run: torchrun's workers are in sessions of their own, so no group has all."""
    deadline = time.monotonic() + _KILL_S
    while (pids := processes_of(run)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
