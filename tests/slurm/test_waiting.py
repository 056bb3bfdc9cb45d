"""Why jobs wait, in words, and which of them wait in vain."""

from __future__ import annotations

import pytest

from envbuilder.slurm.waiting import waiting_for


@pytest.mark.parametrize(
    ("reason", "words", "remedy", "forever"),
    [
        ("Resources", "waits for free nodes", None, False),
        ("Priority", "higher priority", None, False),
        ("None", "not looked at it yet", None, False),
        ("BeginTime", "runs again", None, False),
        ("Dependency", "has not ended", None, False),
        ("DependencyNeverSatisfied", "did not end as it had to", "scancel 12", True),
        ("QOSMaxWallDurationPerJobLimit", "more time than its QoS", "sacctmgr show qos dbg", True),
        ("AssocMaxWallDurationPerJobLimit", "more time than its QoS", "shorter walltime", True),
        ("PartitionTimeLimit", "more time than the partition gpu", "scontrol show partition gpu", True),
        ("PartitionNodeLimit", "lacks or forbids (PartitionNodeLimit)", "site file", True),
        ("BadConstraints", "lacks or forbids", "site file", True),
        ("QOSMaxCpuPerJobLimit", "allows one job", "sacctmgr show qos dbg", True),
        ("QOSMinGRES", "allows one job", "sacctmgr show qos dbg", True),
        ("AssocGrpCPUMinutesLimit", "budget of time is used up", "Ask whoever manages", False),
        ("AssocGrpGRESRunMinutes", "budget of time", "Ask whoever manages", False),
        ("AssocGrpCpuLimit", "others of its account", None, False),
        ("QOSGrpNodeLimit", "others of its account", None, False),
        ("QOSMaxJobsPerUserLimit", "your own jobs", "squeue --me", False),
        ("QOSMaxGRESPerUser", "your own jobs", "squeue --me", False),
        ("AssocMaxJobsLimit", "your own jobs", "squeue --me", False),
        ("ReqNodeNotAvail,_UnavailableNodes:node[1-4]", "down, drained or reserved", "sinfo -R", False),
        ("ReqNodeNotAvail,_Reserved_for_maintenance", "maintenance", "scontrol show reservation", False),
        (
            "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
            "down, drained or reserved",
            "sinfo -R",
            False,
        ),
        ("PartitionDown", "starts no jobs now", "sinfo --summarize", False),
        ("JobHeldUser", "is held", "scontrol release 12", False),
        ("JobHeldAdmin", "is held", "support", False),
        ("launch_failed_requeued_held", "is held", "scontrol release 12", False),
        ("job_requeued_in_held_state", "is held", "scontrol release 12", False),
        ("Licenses", "a licence", None, False),
        ("SomethingNew", "Slurm says: SomethingNew", None, False),
    ],
)
def test_a_reason_becomes_words(reason: str, words: str, remedy: str | None, forever: bool) -> None:
    waiting = waiting_for(reason, job_id="12", partition="gpu", qos="dbg")
    assert words in waiting.words
    assert waiting.forever == forever
    assert (waiting.remedy is None) == (remedy is None)
    assert (remedy or "") in (waiting.remedy or "")
    assert "{" not in waiting.words + (waiting.remedy or "")


def test_whoever_waits_in_vain_is_told_what_to_do() -> None:
    from envbuilder.slurm.waiting import REASONS

    assert all(entry.remedy for entry in REASONS if entry.forever)
