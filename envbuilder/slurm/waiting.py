"""Why a job waits, in words: Slurm's reasons for a pending job. A table, first match wins.

The names are those of Slurm 22.05 (src/common/slurm_protocol_defs.c, `job_reason_string`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """One reason. `{…}` in the remedy: id, partition and qos of the job."""

    pattern: str
    """Regular expression, for the whole reason."""
    words: str
    remedy: str | None = None
    """None where there is nothing to do but wait."""
    forever: bool = False
    """The job will not start as it is."""


_CANCEL = "Cancel it (scancel {id}), "
_QOS_LIMITS = "sacctmgr show qos {qos} format=name,maxwall,maxsubmitpu,maxjobspu,maxtrespu%40"

REASONS = (
    Waiting(r"None|", "Slurm has not looked at it yet"),
    Waiting(r"Resources", "it is next, and waits for free nodes"),
    Waiting(r"Priority", "jobs of higher priority are before it"),
    Waiting(r"BeginTime", "its time has not come yet; a job that Slurm runs again waits a moment"),
    Waiting(r"JobArrayTaskLimit", "as many of its array's jobs run as may at once (--at-once)"),
    Waiting(r"Cleaning", "its last life is being cleared away"),
    Waiting(r"Dependency", "the job that it is to follow has not ended"),
    Waiting(
        r"DependencyNeverSatisfied",
        "the job that it is to follow did not end as it had to",
        _CANCEL + "and submit again without --after.",
        forever=True,
    ),
    Waiting(
        r"(QOS|Assoc|Association)\w*Wall\w*PerJob\w*|QOSTimeLimit|AssociationTimeLimit|AssocMaxWall\w*",
        "it asks for more time than its QoS or account allows",
        _CANCEL + f"set a shorter walltime in the site file, and submit again; see: {_QOS_LIMITS}",
        forever=True,
    ),
    Waiting(
        r"PartitionTimeLimit",
        "it asks for more time than the partition {partition} allows",
        _CANCEL + "set a shorter walltime in the site file, and submit again; "
        "see: scontrol show partition {partition}",
        forever=True,
    ),
    Waiting(
        r"PartitionNodeLimit|BadConstraints|AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS|"
        r"AccountingPolicy",
        "it asks for what the partition {partition}, its account or QoS lacks or forbids ({reason})",
        _CANCEL + "mend the site file, and submit again; see: scontrol show partition {partition}",
        forever=True,
    ),
    Waiting(
        r"(QOS|Assoc)\w*(PerJob|PerNode|MinCpu|MinGRES|MinMem|MinBilling)\w*",
        "it asks for more, or less, than its QoS or account allows one job ({reason})",
        _CANCEL + f"mend the site file, and submit again; see: {_QOS_LIMITS}",
        forever=True,
    ),
    Waiting(
        r"(QOS|Assoc)Grp\w*(Minutes|RunMins|Wall)\w*",
        "the account's or QoS's budget of time is used up ({reason})",
        "Ask whoever manages the account for hours, or set another account; yours: "
        "sacctmgr show associations user=$USER format=account%24,partition,qos%40",
    ),
    Waiting(
        r"(QOS|Assoc)Grp\w*",
        "others of its account or QoS use all that these may use at once ({reason})",
    ),
    Waiting(
        r"(QOS|Assoc)Max\w*|(QOS|Association)(Resource|Job)Limit",
        "your own jobs use all that you may use at once ({reason})",
        "It starts once one of them ends; they are in: squeue --me",
    ),
    Waiting(
        r"Reservation\w*|ReqNodeNotAvail.*|Nodes_required_for_job_are_.*|NodeDown",
        "nodes that it could run on are down, drained or reserved, perhaps for a maintenance",
        "A shorter walltime may fit in before it; see: scontrol show reservation, and: sinfo -R",
    ),
    Waiting(
        r"PartitionDown|PartitionInactive",
        "the partition {partition} starts no jobs now",
        "Wait, or submit to another partition; their states are listed by: sinfo --summarize",
    ),
    Waiting(
        r"JobHeldUser|JobHoldMaxRequeue|\w*[Hh]eld\w*|RequeueHold|SpecialExit|launch_failed.*",
        "it is held ({reason})",
        "Let it go with: scontrol release {id}; where that is refused, ask the cluster's support.",
    ),
    Waiting(r"Licenses", "a licence that it asks for is in use"),
    Waiting(r"Prolog|FrontEndDown|SystemFailure|BurstBuffer\w*|Stage\w*", "the cluster prepares ({reason})"),
    Waiting(r".*", "Slurm says: {reason}"),
)


def waiting_for(reason: str, *, job_id: str, partition: str, qos: str | None) -> Waiting:
    """`reason`, as scontrol shows it for a pending job, in words."""
    found = next(entry for entry in REASONS if re.fullmatch(entry.pattern, reason))
    fields = {"id": job_id, "partition": partition, "qos": qos or "QOS", "reason": reason}
    remedy = None if found.remedy is None else found.remedy.format_map(fields)
    return Waiting(found.pattern, found.words.format_map(fields), remedy, found.forever)
