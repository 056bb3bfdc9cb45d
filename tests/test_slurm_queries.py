"""What Slurm prints, read."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from envbuilder.slurm_queries import (
    Association,
    JobView,
    NoAnswerError,
    QosLimits,
    QosMaxima,
    associations,
    cancelled_by,
    controllers_up,
    enforced,
    job_lives,
    job_view,
    parse_job,
    partition_facts,
    partition_nodes,
    partition_wall_s,
    qos_limits,
    qos_maxima,
)

SHOWN = (
    "JobId=5 JobName=envbuilder-x UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A Priority=4294901757 "
    "Nice=0 Account=project QOS=normal JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={exit} RunTime=00:00:05 TimeLimit=00:02:00 "
    "TimeMin=N/A SubmitTime=2026-11-22T17:29:13 StartTime={start} EndTime=2026-11-22T17:29:19 Partition=lab "
    "NodeList=node1 BatchHost=node1 NumNodes=1 TRES=cpu=1,mem=1000M ReqB:S:C:T=0:0:*:* Command=(null) "
    "WorkDir=/a JobState=FAILED/Restarts=9 Power=\n"
)


def program(folder: Path, name: str, does: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{does}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's programs."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_job_is_read_of_scontrol_and_no_path_is_taken_for_it() -> None:
    job = parse_job(
        SHOWN.format(
            state="FAILED", reason="NonZeroExitCode", restarts=2, exit="6:0", start="2026-11-22T17:29:14"
        )
    )
    assert job == JobView(
        id="5",
        state="FAILED",
        exit_code=6,
        signal=0,
        reason="NonZeroExitCode",
        restarts=2,
        start="2026-11-22T17:29:14",
        partition="lab",
        qos="normal",
        node="node1",
        limit="00:02:00",
        priority=4294901757,
    )


def test_a_start_that_nobody_knows_is_none() -> None:
    job = parse_job(SHOWN.format(state="PENDING", reason="Priority", restarts=0, exit="0:0", start="Unknown"))
    assert job is not None
    assert job.start is None


@pytest.mark.parametrize("text", ["", "\n", "No jobs in the system\n"])
def test_what_shows_no_job_is_none(text: str) -> None:
    assert parse_job(text) is None


def test_a_job_that_the_controller_has_forgotten_is_looked_up(programs: Path) -> None:
    other = pwd.getpwnam("daemon")
    program(programs, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(
        programs,
        "sacct",
        "echo '5|NODE_FAIL|0:0|2026-01-01T00:00:00|lab|normal|node1|00:05:00'\n"
        f"echo '5|CANCELLED by {other.pw_uid}|0:15|Unknown|lab|normal|None assigned|00:05:00'",
    )
    first, last = job_lives("5")
    assert (first.state, first.restarts, first.node, first.cancelled_by) == ("NODE_FAIL", 0, "node1", None)
    assert (last.state, last.restarts, last.signal, last.start) == ("CANCELLED", 1, 15, None)
    assert job_view("5") is None
    assert cancelled_by("5") == other.pw_name
    program(programs, "sacct", f"echo '5|CANCELLED by {os.getuid()}|0:0|Unknown|lab|normal|None|1:00'")
    assert cancelled_by("5") == "you"
    program(programs, "sacct", "echo '5|CANCELLED by 3999999999|0:0|Unknown|lab|normal|None|1:00'")
    assert cancelled_by("5") == "user 3999999999"


def test_a_job_that_nobody_knows_is_none(programs: Path) -> None:
    program(programs, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert job_view("5") is None
    program(programs, "sacct", "true")
    assert job_lives("5") == []
    program(programs, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert job_lives("5") == []
    (programs / "sacct").unlink()
    assert job_lives("5") == []


def test_a_controller_that_answers_is_named_and_none_is_an_error(programs: Path) -> None:
    program(
        programs,
        "scontrol",
        "echo 'Slurmctld(primary) at login1 is DOWN'; echo 'Slurmctld(backup) at login2 is UP'",
    )
    assert controllers_up() == ("login2",)
    program(programs, "scontrol", "echo 'Slurmctld(primary) at login1 is DOWN'")
    with pytest.raises(NoAnswerError, match="DOWN"):
        controllers_up()


def test_a_partition_s_facts_are_read(programs: Path) -> None:
    program(
        programs,
        "scontrol",
        "echo 'PartitionName=gpu AllowGroups=ALL AllowAccounts=a,b State=UP MaxTime=1-00:00:00'",
    )
    facts = partition_facts("gpu")
    assert facts is not None
    assert (facts["AllowAccounts"], facts["State"]) == ("a,b", "UP")
    assert partition_wall_s("gpu") == 24 * 3600
    program(programs, "scontrol", "echo 'Partition gpu not found' >&2; exit 1")
    assert partition_facts("gpu") is None
    program(programs, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(NoAnswerError):
        partition_facts("gpu")


def test_associations_are_read(programs: Path) -> None:
    program(
        programs,
        "sacctmgr",
        "echo 'project||normal,debug|project'; echo 'other|gpu||project'; echo 'warning'",
    )
    assert associations("ada") == [
        Association("project", "", ("normal", "debug"), is_default=True),
        Association("other", "gpu", (), is_default=False),
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("AccountingStorageEnforce = associations,limits,qos", {"associations", "limits", "qos"}),
        ("AccountingStorageEnforce = none", set()),
        ("", set()),
    ],
)
def test_what_is_enforced_is_read(programs: Path, line: str, found: set[str]) -> None:
    program(programs, "scontrol", f"echo 'ClusterName = x'; echo '{line}'")
    assert enforced() == found


def test_what_a_qos_gives_is_read(programs: Path) -> None:
    program(programs, "sacctmgr", "echo 'debug|00:30:00|1|cpu=64,mem=100G|gres/gpu=2,gres/gpu:a100=1'")
    assert qos_maxima("debug") == QosMaxima(
        1800, 1, {"cpu": "64", "mem": "100G"}, {"gres/gpu": "2", "gres/gpu:a100": "1"}
    )
    assert qos_limits("debug") == QosLimits(1800, 1)
    assert qos_maxima("other") is None
    assert qos_limits("other") == QosLimits()


def test_nodes_are_read_with_their_gpus_by_type(programs: Path) -> None:
    program(
        programs,
        "sinfo",
        "echo 'n1|64|512000+|gpu:a100:4(S:0-1),shard:8|idle'; echo 'n2|8|64000|gpu:2|drained*';"
        "echo 'n3|8|64000|(null)|mixed'",
    )
    assert [(node.memory_mb, node.gpus, node.state) for node in partition_nodes("gpu")] == [
        (512000, {"a100": 4}, "idle"),
        (64000, {"": 2}, "drained*"),
        (64000, {}, "mixed"),
    ]
