"""What Slurm prints, read."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from envbuilder.slurm_queries import JobView, cancelled_by, job_lives, job_view, parse_job

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
        "echo 'NODE_FAIL|0:0|2026-01-01T00:00:00|lab|normal|node1|00:05:00'\n"
        f"echo 'CANCELLED by {other.pw_uid}|0:15|Unknown|lab|normal|None assigned|00:05:00'",
    )
    first, last = job_lives("5")
    assert (first.state, first.restarts, first.node, first.cancelled_by) == ("NODE_FAIL", 0, "node1", None)
    assert (last.state, last.restarts, last.signal, last.start) == ("CANCELLED", 1, 15, None)
    assert job_view("5") == last
    assert cancelled_by("5") == other.pw_name
    program(programs, "sacct", f"echo 'CANCELLED by {os.getuid()}|0:0|Unknown|lab|normal|None|1:00'")
    assert cancelled_by("5") == "you"
    program(programs, "sacct", "echo 'CANCELLED by 3999999999|0:0|Unknown|lab|normal|None|1:00'")
    assert cancelled_by("5") == "user 3999999999"


def test_a_job_that_nobody_knows_is_none(programs: Path) -> None:
    program(programs, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(programs, "sacct", "true")
    assert job_view("5") is None
    program(programs, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert job_view("5") is None
    (programs / "sacct").unlink()
    assert job_lives("5") == []
