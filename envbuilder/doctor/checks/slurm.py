"""Slurm, as far as this user can ask it: account, partition, QoS, and what is queued."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from envbuilder.doctor.check import Check, Need, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.subject import Subject
from envbuilder.errors import MismatchError
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.site import JobSpec, Site
from envbuilder.slurm_queries import (
    NoAnswerError,
    PartitionNode,
    QosMaxima,
    associations,
    controllers_up,
    enforced,
    my_jobs,
    partition_facts,
    partition_nodes,
    qos_maxima,
)
from envbuilder.slurm_time import seconds_of, slurm_time

_NO_PARTITION = "The site {} names no partition: the cluster chooses it."
_NO_CLUSTER = "Could not establish a configuration source"
"""What its commands say where there is neither a slurm.conf nor a controller that hands one out."""
_SUBMIT_TIMEOUT_S = 30.0
_MIB = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}
_NO_WORK = re.compile(
    r"(down|drain|fail|error|unknown|inval|powered_down|powering_down|reboot)", re.IGNORECASE
)
"""Beginnings of the states of nodes that start no job."""
_STUCK = re.compile(
    r"DependencyNeverSatisfied|PartitionTimeLimit|PartitionNodeLimit|BadConstraints|AccountNotAllowed|"
    r"QOSNotAllowed|InvalidAccount|InvalidQOS|AccountingPolicy|PartitionDown|PartitionInactive|"
    r"\w*[Hh]eld\w*|JobHoldMaxRequeue|RequeueHold|launch_failed.*|(QOS|Assoc)\w*(PerJob|PerNode)\w*"
)
"""Reasons for which a job waits that do not pass by themselves (src/common/slurm_protocol_defs.c)."""


def _asked(check: Callable[[Site], Outcome]) -> Callable[[Subject, Reporter], Outcome]:
    """A check of the site; where Slurm doesn't answer it is skipped, for slurm.controller tells that."""

    def run_check(subject: Subject, reporter: Reporter) -> Outcome:
        assert subject.site is not None
        try:
            return check(subject.site)
        except NoAnswerError as error:
            return skipped(f"Slurm gave no answer: {_last_line(str(error))}")
        except MismatchError as error:  # not all of Slurm's commands are on this machine
            return skipped(error.message)

    return run_check


def check_controller(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether slurmctld answers."""
    try:
        up = controllers_up()
    except NoAnswerError as error:
        if subject.site is None and _NO_CLUSTER in str(error):
            return skipped("Slurm's commands are on this machine, but it belongs to no cluster.")
        return failed(
            "Slurm's controller does not answer.",
            *str(error).splitlines()[-5:],
            remedy="Try again in some minutes: scontrol ping. Where it stays like this, tell the cluster's "
            "support; on a machine outside the cluster, use a login node",
        )
    return ok("Slurm's controller answers.", *up)


def check_partition(site: Site) -> Outcome:
    """The partitions of [build] and [train]: there, up, open to this user, and long enough."""
    if not any(spec.partition for _, spec in _sections(site)):
        return skipped(_NO_PARTITION.format(site.name))
    faults, evidence = [], []
    for section, spec in _sections(site):
        if spec.partition is None:
            continue
        facts = partition_facts(spec.partition)
        if facts is None:
            faults.append(f"{section}: there is no partition {spec.partition}")
            continue
        evidence.append(_partition_words(section, spec, facts))
        faults += [f"{section}: {fault}" for fault in _partition_faults(spec, facts)]
    if faults:
        return failed(
            f"{'; '.join(faults)}.",
            *evidence,
            remedy=f"Set partition and walltime in the site file of {site.name} to what is listed by: "
            "sinfo --summarize; and: scontrol show partition",
        )
    return ok("The site's partitions are up and take this user's jobs.", *evidence)


def _partition_words(section: str, spec: JobSpec, facts: Mapping[str, str]) -> str:
    names = ("State", "MaxTime", "AllowGroups", "AllowAccounts", "AllowQos")
    told = ", ".join(f"{name}={facts[name]}" for name in names if name in facts)
    return f"{section}: partition {spec.partition}, walltime {spec.walltime}: {told}"


def _partition_faults(spec: JobSpec, facts: Mapping[str, str]) -> Iterator[str]:
    if facts.get("State") != "UP":
        yield f"the partition {spec.partition} is {facts.get('State')} and starts no jobs"
    longest, wanted = seconds_of(facts.get("MaxTime", "")), seconds_of(spec.walltime) or 0
    if longest is not None and wanted > longest:
        yield f"the walltime {spec.walltime} is longer than the {slurm_time(longest)} of {spec.partition}"
    for allowed, denied, value in (
        ("AllowAccounts", "DenyAccounts", _account(spec)),
        ("AllowQos", "DenyQos", spec.qos),
    ):
        if value and not _admits(facts, allowed, denied, value):
            yield f"the partition {spec.partition} doesn't admit {value} ({allowed}, {denied})"
    groups = facts.get("AllowGroups", "ALL")
    if groups != "ALL" and not _my_groups() & set(groups.split(",")):
        yield f"the partition {spec.partition} is for the groups {groups} alone"


def _admits(facts: Mapping[str, str], allowed: str, denied: str, value: str) -> bool:
    only = facts.get(allowed, "ALL")
    return (only == "ALL" or value in only.split(",")) and value not in facts.get(denied, "").split(",")


def _my_groups() -> set[str]:
    names = set()
    for number in {os.getgid(), *os.getgroups()}:
        with suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return names


def check_account(site: Site) -> Outcome:
    """The accounts of [build] and [train] against those that the accounting gives this user."""
    user = pwd.getpwuid(os.getuid()).pw_name
    mine = associations(user)
    accounts = sorted({one.account for one in mine})
    evidence = [f"accounts of {user}: {', '.join(accounts) or 'none'}"]
    if not mine and "associations" not in enforced():
        return skipped(f"The accounting knows no account of {user}, and the controller asks for none.")
    faults = []
    for section, spec in _sections(site):
        account = _account(spec) or next((one.account for one in mine if one.is_default), None)
        where = spec.partition or "the cluster's own partition"
        evidence.append(f"{section}: account {account or 'none'}, {where}")
        if account is None:
            faults.append(f"{section}: no account is named, and {user} has no default one")
        elif not any(one.account == account and _is_for(one.partition, spec) for one in mine):
            faults.append(f"{section}: {user} may not use the account {account} in {where}")
    if faults:
        return failed(
            f"{'; '.join(faults)}.",
            *evidence,
            remedy=f"Set account in the site file of {site.name}, or export SBATCH_ACCOUNT, to one that is "
            "listed by: sacctmgr show associations user=$USER format=account%24,partition,qos%40",
        )
    return ok("The site's accounts are this user's.", *evidence)


def _is_for(partition: str, spec: JobSpec) -> bool:
    """Whether an account that is given for `partition` ("": for all) may serve `spec`."""
    return spec.partition is None or partition in ("", spec.partition)


def check_qos(site: Site) -> Outcome:
    """The QoS of [build] and [train]: there, this user's, and large enough."""
    if not any(spec.qos for _, spec in _sections(site)):
        return skipped(f"The site {site.name} names no QoS.")
    user = pwd.getpwuid(os.getuid()).pw_name
    granted = {qos for one in associations(user) for qos in one.qos}
    faults, evidence = [], [f"QoS of {user}: {', '.join(sorted(granted)) or 'none'}"]
    for section, spec in _sections(site):
        if spec.qos is None:
            continue
        maxima = qos_maxima(spec.qos)
        if maxima is None:
            faults.append(f"{section}: there is no QoS {spec.qos}")
            continue
        evidence.append(f"{section}: {spec.qos}: {_maxima_words(maxima)}")
        if granted and spec.qos not in granted:
            faults.append(f"{section}: {user} may not use the QoS {spec.qos}")
        if maxima.wall_s is not None and (seconds_of(spec.walltime) or 0) > maxima.wall_s:
            faults.append(f"{section}: {spec.qos} allows {slurm_time(maxima.wall_s)}, not {spec.walltime}")
        for limits in (maxima.per_job, maxima.per_user):
            faults += [f"{section}: {spec.qos} allows {fault}" for fault in _too_much(spec, limits)]
    if faults:
        return failed(
            f"{'; '.join(dict.fromkeys(faults))}.",
            *evidence,
            remedy=f"Set qos, walltime, gpus, cpus and memory in the site file of {site.name} to what is "
            "listed by: sacctmgr show qos format=name%20,maxwall,maxsubmitpu,maxtres%30,maxtrespu%30",
        )
    return ok("The site's QoS are this user's, and allow what the site asks for.", *evidence)


def _maxima_words(maxima: QosMaxima) -> str:
    wall = None if maxima.wall_s is None else slurm_time(maxima.wall_s)
    tables = (("a job", maxima.per_job), ("a user", maxima.per_user))
    limits = [("wall", wall), ("jobs submitted by a user", maxima.submitted)]
    limits += [(whose, ",".join(f"{k}={v}" for k, v in table.items())) for whose, table in tables]
    return ", ".join(f"{name} {value}" for name, value in limits if value) or "no limits"


def _too_much(spec: JobSpec, limits: Mapping[str, str]) -> Iterator[str]:
    """What `spec` asks for beyond `limits`, in words."""
    wanted = {"cpu": spec.cpus, "gres/gpu": spec.gpus, f"gres/gpu:{spec.gpu_type}": spec.gpus}
    for name, amount in wanted.items():
        if limits.get(name, "").isdigit() and amount > int(limits[name]):
            yield f"{name}={limits[name]}, not {amount}"
    if "mem" in limits and spec.memory and _mebibytes(spec.memory) > _mebibytes(limits["mem"]):
        yield f"mem={limits['mem']}, not {spec.memory}"


def _mebibytes(text: str) -> float:
    """Of an amount of memory as Slurm writes it; without a unit it is in MiB."""
    found = re.match(r"([\d.]+)([KMGT]?)", text)
    return float(found[1]) * _MIB[found[2] or "M"] if found else 0.0


def check_nodes(site: Site) -> Outcome:
    """Whether a node of the partition has the CPUs, memory and GPUs, as the site asks for them."""
    if not any(spec.partition for _, spec in _sections(site)):
        return skipped(_NO_PARTITION.format(site.name))
    faults, waits, evidence = [], [], []
    for section, spec in _sections(site):
        if spec.partition is None:
            continue
        nodes = partition_nodes(spec.partition)
        if not nodes:
            faults.append(f"{section}: the partition {spec.partition} has no nodes")
            continue
        kinds = sorted({_node_words(node) for node in nodes})
        evidence += [f"{section}: {len(nodes)} nodes in {spec.partition}", *kinds[:8]]
        fitting = [node for node in nodes if _fits(spec, node)]
        if not fitting:
            faults.append(f"{section}: no node of {spec.partition} has {_wanted_words(spec)}")
        elif all(_NO_WORK.match(node.state) for node in fitting):
            waits.append(f"{section}: all nodes of {spec.partition} that would do are down or drained")
    if faults:
        partitions = ",".join(dict.fromkeys(spec.partition for _, spec in _sections(site) if spec.partition))
        return failed(
            f"{'; '.join(faults)}.",
            *evidence,
            remedy=f"Set cpus, memory, gpus, gpu-request and gpu-type in the site file of {site.name} to "
            f"what is listed by: sinfo --partition={partitions} --Node --format='%N %c %m %G %T'",
        )
    if waits:
        return warning(f"{'; '.join(waits)}.", *evidence, remedy="See until when: sinfo -R")
    return ok("The partitions have nodes with what the site asks for.", *evidence)


def _fits(spec: JobSpec, node: PartitionNode) -> bool:
    gpus = node.gpus.get(spec.gpu_type, 0) if spec.gpu_type else sum(node.gpus.values())
    memory_mb = _mebibytes(spec.memory) if spec.memory else 0
    return node.cpus >= spec.cpus and node.memory_mb >= memory_mb and gpus >= spec.gpus


def _wanted_words(spec: JobSpec) -> str:
    gpus = f" and {spec.gpus} GPUs{f' of type {spec.gpu_type}' if spec.gpu_type else ''}" if spec.gpus else ""
    memory = f", {spec.memory} of memory" if spec.memory else ""
    return f"{spec.cpus} CPUs{memory}{gpus}"


def _node_words(node: PartitionNode) -> str:
    gpus = ", ".join(f"{count} {kind or 'GPUs'}" for kind, count in node.gpus.items()) or "no GPUs"
    return f"{node.cpus} CPUs, {node.memory_mb} MiB, {gpus}: {node.state}"


def check_submission(site: Site) -> Outcome:
    """Whether sbatch takes what the site asks for: it tells without submitting (--test-only)."""
    refused: list[str] = []
    full: list[str] = []
    evidence: list[str] = []
    for section, spec in _sections(site):
        words = ["sbatch", "--test-only", *spec.sbatch_words, "--wrap=true"]
        tried = run(words, timeout_s=_SUBMIT_TIMEOUT_S)
        said = re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", tried.output.strip(), flags=re.M)
        evidence += [f"{section}: {line}" for line in said.splitlines()]
        if tried.timed_out:
            raise NoAnswerError("sbatch --test-only took too long")
        if tried.returncode != 0:
            (full if "MaxSubmit" in said else refused).append(f"{section}: {_last_line(said)}")
    if refused:
        return failed(
            f"Slurm would refuse a job of the site {site.name}: {'; '.join(refused)}.",
            *evidence,
            remedy=f"Compare the site file with what is listed by: envbuilder doctor --only slurm --site "
            f"{site.name}",
        )
    if full:
        return warning(
            "The QoS takes no further job of yours now.",
            *evidence,
            remedy="Wait for one to end, or cancel it: squeue --me; scancel JOBID",
        )
    return ok("Slurm would take the site's jobs now.", *evidence)


def check_queue(site: Site) -> Outcome:
    """This user's jobs in the site's partitions and QoS, and why they wait."""
    partitions = {spec.partition for _, spec in _sections(site)}
    wanted = {spec.qos for _, spec in _sections(site) if spec.qos}
    jobs = [job for job in my_jobs() if job.qos in wanted or partitions & set(job.partition.split(","))]
    evidence = [
        f"{job.id} {job.name}: {job.state.lower()}, {job.reason if job.state == 'PENDING' else job.used}, "
        f"partition {job.partition}, QoS {job.qos}"
        for job in jobs
    ]
    stuck = [job for job in jobs if job.state == "PENDING" and _STUCK.fullmatch(job.reason)]
    if stuck:
        held = "eld" in stuck[0].reason
        return warning(
            f"{len(stuck)} of your jobs will not start as they are: "
            f"{', '.join(f'{job.id} ({job.reason})' for job in stuck)}.",
            *evidence,
            remedy=f"scontrol release {stuck[0].id}" if held else f"scancel {stuck[0].id}, and submit again",
        )
    return ok(f"{len(jobs)} jobs of yours are in the site's queues.", *evidence)


def _sections(site: Site) -> tuple[tuple[str, JobSpec], ...]:
    return (("[build]", site.build), ("[train]", site.train))


def _account(spec: JobSpec) -> str | None:
    """The account that sbatch would be given; None for the user's default one."""
    return spec.account or os.environ.get("SBATCH_ACCOUNT") or None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1]


_NEEDS: tuple[Need, ...] = ("slurm", "site")
CHECKS: tuple[Check, ...] = (
    Check(
        "slurm.controller",
        "Slurm's controller",
        "whether slurmctld answers (scontrol ping)",
        check_controller,
        needs=("slurm",),
    ),
    Check(
        "slurm.partition",
        "the partitions",
        "whether the site's partitions exist, are up, admit this user, account and QoS, and are long enough",
        _asked(check_partition),
        needs=_NEEDS,
    ),
    Check(
        "slurm.account",
        "the accounts",
        "the site's accounts against those that the accounting gives this user",
        _asked(check_account),
        needs=_NEEDS,
    ),
    Check(
        "slurm.qos",
        "the QoS",
        "whether the site's QoS exist and are this user's; their limits against what the site asks for",
        _asked(check_qos),
        needs=_NEEDS,
    ),
    Check(
        "slurm.nodes",
        "the partitions' nodes",
        "whether a node has the CPUs, memory and GPUs (by type) that the site asks for, and takes work",
        _asked(check_nodes),
        needs=_NEEDS,
    ),
    Check(
        "slurm.submission",
        "submitting",
        "whether sbatch would take a job of the site's now; nothing is submitted (--test-only)",
        _asked(check_submission),
        needs=_NEEDS,
        limit_s=3 * _SUBMIT_TIMEOUT_S,
    ),
    Check(
        "slurm.queue",
        "your jobs",
        "this user's jobs in the site's partitions and QoS, and the reasons for which they wait",
        _asked(check_queue),
        needs=_NEEDS,
    ),
)
