"""What Slurm says of jobs and limits. One function, one question."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from envbuilder.errors import MismatchError
from envbuilder.process import run
from envbuilder.slurm_time import seconds_of

_TIMEOUT_S = 60.0
"""A controller that is busy answers late; one that is down makes the commands give up by themselves."""
_SHORT_S = 10.0
"""For what is nice to know: limits that sbatch would tell as well, and the queue in an overview."""
PREFIX = "envbuilder-"
"""Of the names of all jobs that the tool submits."""


class NoAnswerError(Exception):
    """Slurm did not answer; a moment later it may."""


@dataclass(frozen=True)
class JobView:
    """A job as Slurm sees it."""

    id: str
    state: str
    """E.g. "PENDING", "OUT_OF_MEMORY"."""
    exit_code: int = 0
    signal: int = 0
    """That ended it; 0 for none."""
    reason: str = ""
    """Why it waits; for one that ended, seldom more than its state says."""
    restarts: int = 0
    start: str | None = None
    """When it began, or is expected to; local time, ISO 8601."""
    partition: str = ""
    qos: str = ""
    node: str = ""
    limit: str = ""
    """Of its time."""
    priority: int = 0
    cancelled_by: str | None = None
    """The user's name."""


@dataclass(frozen=True)
class Listed:
    """One of the user's jobs that squeue shows."""

    id: str
    """Of a task of an array: the array's id, "_" and the task's index."""
    state: str
    reason: str
    start: str
    """When it began, or is expected to; local time, ISO 8601; "N/A" where Slurm can't say."""
    used: str
    """Time that it has run, as Slurm writes it."""
    left: str
    """Time until its limit."""
    partition: str
    qos: str
    name: str


def ask(*argv: str, timeout_s: float = _TIMEOUT_S) -> str:
    """What a Slurm command prints; NoAnswerError where it failed, with what it said."""
    # Its time limit also gives it a process group of its own: Ctrl-C ends the waiting, not the question.
    completed = run(argv, timeout_s=timeout_s)
    if completed.timed_out or completed.returncode != 0:
        raise NoAnswerError(completed.output.strip() or f"{argv[0]} gave no answer")
    return completed.output


def job_view(job_id: str) -> JobView | None:
    """The job as the controller knows it; None where it does not (any more, or yet): see `job_lives`."""
    try:
        job = parse_job(ask("scontrol", "--oneliner", "show", "job", job_id))
        # A task of an array is shown by a number of its own, too.
        return job and replace(job, id=job_id)
    except NoAnswerError as error:
        if "Invalid job id" not in str(error):
            raise
    return None


def job_lives(job_id: str) -> list[JobView]:
    """All lives of a job from the accounting, oldest first; empty where it has none, or no accounting."""
    return lives_of([job_id]).get(job_id, [])


def lives_of(job_ids: Sequence[str]) -> dict[str, list[JobView]]:
    """The same of several jobs, in one question; those that the accounting doesn't know are left out."""
    columns = "JobID,State,ExitCode,Start,Partition,QOS,NodeList,Timelimit"
    try:
        listed = ask("sacct", "-X", "-D", "-P", "-n", "-j", ",".join(job_ids), "-o", columns)
    except (NoAnswerError, MismatchError):
        return {}
    lives: dict[str, list[JobView]] = {}
    for line in listed.splitlines():
        if line.count("|") == columns.count(","):
            job_id, *row = line.split("|")
            before = lives.setdefault(job_id, [])
            before.append(_life(job_id, len(before), row))
    return lives


def cancelled_by(job_id: str) -> str | None:
    """Who cancelled the job's last life: a user's name, or a number; None where nobody knows."""
    lives = job_lives(job_id)
    return lives[-1].cancelled_by if lives else None


def parse_job(shown: str) -> JobView | None:
    """The job in a line of `scontrol --oneliner show job`."""
    values: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", shown):
        values.setdefault(key, value)  # Paths come last, and may hold anything.
    if "JobId" not in values or "JobState" not in values:
        return None
    code, signal = _exit_of(values.get("ExitCode", ""))
    start = values.get("StartTime", "Unknown")
    return JobView(
        id=values["JobId"],
        state=values["JobState"],
        exit_code=code,
        signal=signal,
        reason=values.get("Reason", ""),
        restarts=_number(values.get("Restarts", "")),
        start=None if start in ("Unknown", "N/A", "None") else start,
        partition=values.get("Partition", ""),
        qos=values.get("QOS", ""),
        node=values.get("BatchHost", ""),
        limit=values.get("TimeLimit", ""),
        priority=_number(values.get("Priority", "")),
    )


def _life(job_id: str, number: int, row: list[str]) -> JobView:
    state, exit_code, start, partition, qos, node, limit = row
    word, _, by = state.partition(" by ")
    code, signal = _exit_of(exit_code)
    return JobView(
        id=job_id,
        state=word.strip(),
        exit_code=code,
        signal=signal,
        restarts=number,
        start=None if start in ("Unknown", "None") else start,
        partition=partition,
        qos=qos,
        node=node,
        limit=limit,
        cancelled_by=_user(by) if by else None,
    )


def _exit_of(text: str) -> tuple[int, int]:
    code, _, signal = text.partition(":")
    return _number(code), _number(signal)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _user(uid: str) -> str:
    if uid == str(os.getuid()):
        return "you"
    with suppress(KeyError, ValueError):
        return pwd.getpwuid(int(uid)).pw_name
    return f"user {uid}"


def jobs_ahead(job: JobView) -> int | None:
    """Jobs of the partition that wait with a higher priority, of those that the user may see."""
    try:
        listed = ask("squeue", "-h", "-t", "PENDING", "-p", job.partition, "-o", "%i %Q", timeout_s=_SHORT_S)
    except NoAnswerError:
        return None
    waiting = [line.split() for line in listed.splitlines()]
    return sum(1 for words in waiting if len(words) == 2 and _number(words[1]) > job.priority)


def my_jobs(qos: str | None = None, account: str | None = None) -> list[Listed]:
    """The user's jobs that wait or run, of one QoS and account or of all, each task of an array by itself.

    The tool's own have names with PREFIX.
    """
    only = [f"--qos={qos}"] if qos else []
    return _listed(*only, *([f"--account={account}"] if account else []))


def jobs_called(name: str) -> list[Listed]:
    """The user's jobs of that name, those that ended a while ago too, as long as Slurm remembers them."""
    return _listed(f"--name={name}", "--states=all")


def _listed(*only: str) -> list[Listed]:
    shown = ("-o", "%i|%T|%r|%S|%M|%L|%P|%q|%j")
    listed = ask("squeue", "--me", "-h", "-r", *only, *shown, timeout_s=_SHORT_S)
    rows = (line.split("|", 8) for line in listed.splitlines())
    return [Listed(*row) for row in rows if len(row) == 9]


@dataclass(frozen=True)
class QosLimits:
    """What a QoS allows; None: no limit, or nobody says."""

    wall_s: int | None = None
    jobs: int | None = None
    """Of one user, queued and running together (MaxSubmitJobsPerUser)."""


def qos_limits(qos: str) -> QosLimits:
    """The limits of a QoS, as far as the accounting tells them."""
    try:
        maxima = qos_maxima(qos)
    except (NoAnswerError, MismatchError):
        return QosLimits()
    return QosLimits(maxima.wall_s, maxima.submitted) if maxima else QosLimits()


def account_limit(account: str | None) -> tuple[int, str] | None:
    """How many jobs of the user, queued and running together, an account takes, and its name.

    None where there is no limit, or nobody says. Without `account` it is that of jobs that name none.
    """
    columns = "account,defaultaccount,maxsubmitjobs"
    only = ("where", f"user={pwd.getpwuid(os.getuid()).pw_name}", f"format={columns}")
    try:
        shown = ask("sacctmgr", "-nP", "show", "user", "withassoc", *only, timeout_s=_SHORT_S)
    except (NoAnswerError, MismatchError):
        return None
    rows = [line.split("|") for line in shown.splitlines() if line.count("|") == columns.count(",")]
    limits = [
        (int(most), name) for name, usual, most in rows if name == (account or usual) and most.isdigit()
    ]
    return min(limits, default=None)


def max_array_size() -> int | None:
    """One more than the highest index of an array's task, 0 where there are no arrays; None: nobody says."""
    try:
        shown = ask("scontrol", "show", "config", timeout_s=_SHORT_S)
    except (NoAnswerError, MismatchError):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else None


def partition_wall_s(partition: str) -> int | None:
    """The longest time that a partition allows a job; None for no limit, or where nobody says."""
    try:
        facts = partition_facts(partition)
    except (NoAnswerError, MismatchError):
        return None
    return seconds_of(facts.get("MaxTime", "")) if facts else None


def controllers_up() -> tuple[str, ...]:
    """The controllers that answer, as Slurm names them; NoAnswerError where none does, with what it says."""
    told = ask("scontrol", "ping", timeout_s=_SHORT_S)
    up = re.findall(r"^\S+ at (\S+) is UP$", told, re.MULTILINE)
    if not up:
        raise NoAnswerError(told.strip())
    return tuple(up)


def partition_facts(partition: str) -> dict[str, str] | None:
    """What `scontrol show partition` tells, by Slurm's names; None where there is no such partition."""
    try:
        shown = ask("scontrol", "--all", "--oneliner", "show", "partition", partition, timeout_s=_SHORT_S)
    except NoAnswerError as error:
        if "not found" in str(error):
            return None
        raise
    return dict(re.findall(r"(\w+)=(\S*)", shown))


@dataclass(frozen=True)
class Association:
    """An account that a user may charge, and how."""

    account: str
    partition: str
    """Empty for any."""
    qos: tuple[str, ...]
    is_default: bool
    """Whether the account is the one of jobs that name none."""


def associations(user: str) -> list[Association]:
    """What the accounting lets `user` submit with; NoAnswerError where there is no accounting."""
    columns = "account,partition,qos,defaultaccount"
    only = ("where", f"user={user}", f"format={columns}")
    shown = ask("sacctmgr", "-nP", "show", "user", "withassoc", *only, timeout_s=_SHORT_S)
    rows = [line.split("|") for line in shown.splitlines() if line.count("|") == columns.count(",")]
    return [
        Association(account, partition, tuple(filter(None, qos.split(","))), account == default)
        for account, partition, qos, default in rows
    ]


def enforced() -> frozenset[str]:
    """What of the accounting the controller holds jobs to (AccountingStorageEnforce), e.g. "limits"."""
    shown = ask("scontrol", "show", "config", timeout_s=_SHORT_S)
    found = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", shown, re.MULTILINE)
    return frozenset(found[1].split(",")) - {"none"} if found else frozenset()


@dataclass(frozen=True)
class QosMaxima:
    """How much a QoS gives; what it sets no limit to is not in the tables."""

    wall_s: int | None
    submitted: int | None
    """Jobs of one user, queued and running together."""
    per_job: dict[str, str]
    """By Slurm's names of resources, e.g. "gres/gpu": "2", "mem": "100G"."""
    per_user: dict[str, str]


def qos_maxima(qos: str) -> QosMaxima | None:
    """The limits of a QoS; None where there is no such QoS. NoAnswerError where there is no accounting."""
    columns = "name,maxwall,maxsubmitpu,maxtres,maxtrespu"
    shown = ask("sacctmgr", "-nP", "show", "qos", qos, f"format={columns}", timeout_s=_SHORT_S)
    for line in shown.splitlines():
        row = dict(zip(columns.split(","), line.split("|")))
        if row["name"] == qos:
            submitted = row.get("maxsubmitpu", "")
            return QosMaxima(
                wall_s=seconds_of(row.get("maxwall", "")),
                submitted=int(submitted) if submitted.isdigit() else None,
                per_job=_resources(row.get("maxtres", "")),
                per_user=_resources(row.get("maxtrespu", "")),
            )
    return None


def _resources(text: str) -> dict[str, str]:
    return dict(re.findall(r"([\w/:]+)=([^,]+)", text))


@dataclass(frozen=True)
class PartitionNode:
    """A node, as a partition has it."""

    name: str
    cpus: int
    memory_mb: int
    """As Slurm counts: 1024² bytes."""
    gpus: dict[str, int]
    """Type → count; the type is empty where Slurm names none."""
    state: str


def partition_nodes(partition: str) -> list[PartitionNode]:
    """The nodes of a partition; empty where there is none of that name."""
    listed = ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G|%T", timeout_s=_SHORT_S)
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == 4]
    return [
        PartitionNode(name, _number(cpus.rstrip("+")), _number(memory.rstrip("+")), _gpus(gres), state)
        for name, cpus, memory, gres, state in rows
    ]


def _gpus(gres: str) -> dict[str, int]:
    """GPUs of a list of generic resources: "gpu:a100:4(S:0-1),shard:8" gives {"a100": 4}."""
    counts: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres):
        counts[kind] = counts.get(kind, 0) + int(count)
    return counts


def is_slurm_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None
