"""How a job ended, in words, each with what to do about it. A table by Slurm's state. Pure.

The states are those of sacct's manual page. An exit code alone is not enough: NODE_FAIL and TIMEOUT have 0.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import (
    BuildError,
    DoctorError,
    EnvbuilderError,
    InputError,
    IntegrityError,
    MismatchError,
    NetworkError,
    SlurmError,
    StoppedError,
    TrainingError,
    UsageError,
)
from envbuilder.slurm.joblog import LogEnd
from envbuilder.slurm.work import TRAINING, Work, work_of
from envbuilder.slurm_queries import JobView

OWN_ERRORS: dict[int, type[EnvbuilderError]] = {
    kind.exit_code: kind
    for kind in (
        EnvbuilderError,
        UsageError,
        InputError,
        NetworkError,
        IntegrityError,
        BuildError,
        MismatchError,
        DoctorError,
        SlurmError,
        TrainingError,
        StoppedError,
    )
}
TOLD_TO_END = 130
"""The exit code after SIGTERM or SIGINT."""
_ANYBODYS_CODES = frozenset({EnvbuilderError.exit_code, UsageError.exit_code})
"""A shell and many programs end with these too."""


@dataclass(frozen=True)
class Verdict:
    """One way to end. `{…}`: id, limit, node, by, again (the command that goes on),
    requeued (the same with --requeue), kept (what is not lost), log and state."""

    message: str
    remedy: str


_GO_ON = "{kept}; go on with: {again}"

VERDICTS = {
    "TIMEOUT": Verdict(
        "The job {id} reached its time limit ({limit}) and was ended by Slurm.",
        "{kept}; go on, over as many lives as it takes, with: {requeued}",
    ),
    "OUT_OF_MEMORY": Verdict(
        "The job {id} used more memory than it had asked for, and was ended by the kernel.",
        "Set more memory in the site file's section. " + _GO_ON,
    ),
    "NODE_FAIL": Verdict("The node {node} failed under the job {id}.", _GO_ON),
    "BOOT_FAIL": Verdict("The node {node} did not start up for the job {id}.", _GO_ON),
    "LAUNCH_FAILED": Verdict("Slurm could not start the job {id} on {node}.", _GO_ON),
    "PREEMPTED": Verdict(
        "The job {id} had to give way to one of higher priority.",
        "{kept}; go on, and start again by itself next time, with: {requeued}",
    ),
    "DEADLINE": Verdict("The job {id} could not end before its deadline, and was removed.", _GO_ON),
    "CANCELLED": Verdict("The job {id} was cancelled by {by}.", _GO_ON),
    "REVOKED": Verdict(
        "The job {id} was taken over by another cluster of the federation.",
        "Look for it there: squeue --federation --me",
    ),
}
ENDED = frozenset({*VERDICTS, "COMPLETED", "FAILED"})
"""All states that a job never leaves, but for one that Slurm runs again."""
PERHAPS_AGAIN = frozenset({"NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "PREEMPTED"})
"""Those after which Slurm may run the job again a moment later."""

_BY_CODE = {
    126: Verdict(
        "The job {id} could not run its command: it is not executable on {node}.",
        "Put ROOT and envbuilder's interpreter on a disk that compute nodes see. " + _GO_ON,
    ),
    127: Verdict(
        "The job {id} did not find its command on {node}.",
        "Put envbuilder's interpreter on a disk that compute nodes see. " + _GO_ON,
    ),
    TOLD_TO_END: Verdict("The job {id} was told to end (SIGTERM or SIGINT), and did.", _GO_ON),
}
_BY_SIGNAL = {
    signal.SIGKILL: Verdict(
        "The job {id} was killed (SIGKILL), most often for its memory.",
        "Set more memory in the site file's section. " + _GO_ON,
    ),
    signal.SIGUSR1: Verdict(
        "The job {id} was told that its time ends (SIGUSR1) before it could listen.",
        "Set a longer walltime in the site file's section. " + _GO_ON,
    ),
}
_FAILED = Verdict("The job {id} ended with {state}.", "Read its log: {log}")


def verdict(job: JobView, log: Path, end: LogEnd, *, again: str, did_all: bool) -> EnvbuilderError | None:
    """What `job`, which has ended, comes to: None where it did what it was to do, else the error.

    An error that envbuilder ended with in the job is the same error here. `again` is the command that was
    typed. `did_all` says that the job itself wrote so: where the kernel killed one of its compilers for its
    memory, Slurm calls the job OUT_OF_MEMORY, whatever came of it.
    """
    if job.state == "COMPLETED" or (job.state == "OUT_OF_MEMORY" and did_all):
        return None
    work = work_of(log.name)
    context = {"job": job.id, "state": _state_in_words(job), "log": log}
    if end.last:
        context["the log's end"] = "\n" + end.last
    else:
        context["the log"] = "nothing was written"
    if job.state == "FAILED" and (own := _own_error(job, end, context, again, work)):
        return own
    chosen = _chosen(job)
    fields = {
        "id": job.id,
        "limit": job.limit or "that of the site file",
        "node": job.node or "its node",
        "by": job.cancelled_by or "somebody",
        "again": again,
        "requeued": again if "--requeue" in again.split() else f"{again}{work.goes_on}",
        "kept": work.kept,
        "log": log,
        "state": _state_in_words(job),
    }
    return SlurmError(
        chosen.message.format_map(fields), remedy=chosen.remedy.format_map(fields), context=context
    )


def _chosen(job: JobView) -> Verdict:
    if job.state != "FAILED":
        return VERDICTS.get(job.state, _FAILED)
    by_signal = job.signal or (job.exit_code - 128 if job.exit_code > 128 else 0)
    if job.exit_code in _BY_CODE:
        return _BY_CODE[job.exit_code]
    if by_signal in _BY_SIGNAL:
        return _BY_SIGNAL[signal.Signals(by_signal)]
    return _FAILED


def _own_error(
    job: JobView, end: LogEnd, context: dict[str, object], again: str, work: Work
) -> EnvbuilderError | None:
    kind = OWN_ERRORS.get(job.exit_code)
    if kind is None or job.signal or (end.message is None and job.exit_code in _ANYBODYS_CODES):
        return None
    if end.details:
        context["details"] = "\n" + end.details
        del context["the log's end"]  # which is the same
    if kind is StoppedError:
        said = f" {end.message}" if work is TRAINING and end.message else ""
        message = f"The job {job.id} stopped in good order. {work.kept}.{said}"
        return kind(message, remedy=f"Go on with: {again}", context=context)
    message = end.message or f"The job {job.id} ended with envbuilder's exit code {job.exit_code}."
    return kind(message, remedy=end.remedy or f"Read its log: {context['log']}", context=context)


def _state_in_words(job: JobView) -> str:
    if (
        job.state != "FAILED"
    ):  # What the others have for exit codes says nothing: TIMEOUT 0, OUT_OF_MEMORY 125.
        return job.state
    if job.signal:
        return f"{job.state}, signal {job.signal}"
    return f"{job.state}, exit code {job.exit_code}" if job.exit_code else job.state
