"""Following, with a `scontrol` that shows one state after another; tests/lab has the real cluster."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from envbuilder.errors import BuildError, SlurmError
from envbuilder.paths import Root
from envbuilder.progress_file import DONE, ProgressFile, progress_path
from envbuilder.report import Quiet, Unit
from envbuilder.slurm.follow import Ended, Pace, follow

PACE = Pace(look_s=0.01, longest_s=0.02, tell_s=0.0, unknown_s=0.1)
UNKNOWN = "slurm_load_jobs error: Invalid job id specified"


class Heard(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")

    def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
        self.said.append(f"{label}: {done}/{total} {unit}")


class Slurm:
    """Stand-ins on the PATH: scontrol says one answer after another, the last one for ever."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.root = folder / "bin", Root(folder / "root")
        self.log = folder / "x-5.log"
        self.heard = Heard()
        self.folder.mkdir()
        monkeypatch.setenv("PATH", f"{self.folder}:/usr/bin:/bin")
        self.program("sacct", "true")
        self.program("squeue", "printf '6 10\\n7 99\\n8 98\\n'")

    def program(self, name: str, does: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (self.folder / name).chmod(0o755)

    def shows(self, *answers: str) -> None:
        """Fields beside JobId for each answer; one that begins with `slurm` is an error."""
        lines = [a if a.startswith("slurm") else f"JobId=5 Partition=lab QOS=normal {a}" for a in answers]
        cases = "".join(f"{i}) echo {shlex.quote(line)};;\n" for i, line in enumerate(lines[:-1]))
        failing = " ".join(str(i) for i, line in enumerate(lines) if line.startswith("slurm"))
        self.program(
            "scontrol",
            f"n=$(cat {self.folder}/n 2>/dev/null || echo 0)\n"
            f"[ $n -lt {len(lines) - 1} ] && next=$((n + 1))\n"
            f"echo ${{next:-$n}} > {self.folder}/n\n"
            f"case $n in\n{cases}*) echo {shlex.quote(lines[-1])};;\nesac\n"
            f"for bad in {failing}; do [ $n = $bad ] && exit 1; done\nexit 0",
        )

    def follow(self) -> Ended:
        return follow("5", self.log, root=self.root, reporter=self.heard, again="again", pace=PACE)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path, monkeypatch)


def test_what_changes_is_told_once_and_the_end_is_returned(slurm: Slurm) -> None:
    ProgressFile(progress_path(slurm.root, "5")).write(
        done=1, total=2, running=["a.cu"], seconds_left=30, stage="building x"
    )
    slurm.shows(
        "JobState=PENDING Reason=Priority Priority=50 StartTime=2026-01-01T10:00:00",
        "JobState=CONFIGURING Reason=None",
        "JobState=RUNNING Reason=None BatchHost=n1 TimeLimit=00:30:00",
        "JobState=RUNNING Reason=None BatchHost=n1 TimeLimit=00:30:00",
        "JobState=COMPLETING Reason=None BatchHost=n1",
        "JobState=COMPLETED Reason=None BatchHost=n1 ExitCode=0:0 Restarts=1",
    )
    ended = slurm.follow()
    assert (ended.id, ended.state, ended.lives, ended.log) == ("5", "COMPLETED", 2, slurm.log)
    said = slurm.heard.said
    assert said[0] == (
        "job 5 is queued: jobs of higher priority are before it; 2 jobs of the partition are before it; "
        "expected to start at 2026-01-01T10:00:00"
    )
    assert "job 5 is configuring" in said
    assert said.count("job 5 is running on n1, for at most 00:30:00") == 1
    assert said.count("building x") == 1
    assert said.count("job 5: 1/2 units") == 1
    assert "1 of 2 units are ready; about 30 s left; under way: a.cu" in said


def test_a_job_that_slurm_runs_again_is_not_taken_for_ended(slurm: Slurm) -> None:
    slurm.program(
        "sacct",
        "echo 'NODE_FAIL|0:0|Unknown|lab|normal|n1|1:00'; echo 'RUNNING|0:0|Unknown|lab|normal|n2|1:00'",
    )
    slurm.shows(
        "JobState=RUNNING Reason=None",
        "JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0",
        "JobState=PENDING Reason=BeginTime Restarts=1",
        "JobState=COMPLETED Reason=None Restarts=1",
    )
    assert slurm.follow().lives == 2
    assert "warning: job 5 starts again after NODE_FAIL: life 2" in slurm.heard.said


def test_a_node_s_failure_that_stays_is_the_end(slurm: Slurm) -> None:
    slurm.shows(
        "JobState=RUNNING Reason=None", "JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0 BatchHost=n1"
    )
    with pytest.raises(SlurmError, match="The node n1 failed"):
        slurm.follow()


def test_the_tool_s_own_error_is_raised_with_the_log_s_end(slurm: Slurm) -> None:
    slurm.log.write_text("building\nerror: The build of x failed.\n  file: a.cu\nremedy: mend a.cu\n")
    slurm.shows("JobState=FAILED Reason=NonZeroExitCode ExitCode=6:0")
    with pytest.raises(BuildError, match="The build of x failed") as caught:
        slurm.follow()
    assert caught.value.remedy == "mend a.cu"


def test_slurm_that_does_not_answer_is_told_once_and_asked_again(slurm: Slurm) -> None:
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    slurm.shows("JobState=RUNNING Reason=None", away, away, away, "JobState=COMPLETED Reason=None")
    assert slurm.follow().state == "COMPLETED"
    assert [line for line in slurm.heard.said if "does not answer" in line] == [
        f"warning: Slurm does not answer ({away}); asking on, the job is not touched by it"
    ]
    assert slurm.heard.said[-1] == "Slurm answers again"


def test_a_job_that_is_unknown_for_a_moment_is_waited_for(slurm: Slurm) -> None:
    slurm.shows(UNKNOWN, UNKNOWN, "JobState=COMPLETED Reason=None")
    assert slurm.follow().state == "COMPLETED"


def test_a_job_that_is_forgotten_has_ended_as_it_wrote_itself(slurm: Slurm) -> None:
    slurm.shows("JobState=RUNNING Reason=None", UNKNOWN)
    with pytest.raises(SlurmError, match="does not know the job 5"):
        slurm.follow()
    ProgressFile(progress_path(slurm.root, "5")).write(done=2, total=2, stage=DONE)
    assert slurm.follow().state == "COMPLETED"


def test_a_job_that_will_never_start_is_not_waited_for(slurm: Slurm) -> None:
    slurm.shows("JobState=PENDING Reason=QOSMaxWallDurationPerJobLimit")
    with pytest.raises(SlurmError, match="will not start as it is: it asks for more time") as caught:
        slurm.follow()
    assert "scancel 5" in caught.value.remedy


def test_a_reason_that_was_there_for_a_moment_only_ends_nothing(slurm: Slurm) -> None:
    slurm.shows(
        "JobState=PENDING Reason=PartitionTimeLimit",
        "JobState=PENDING Reason=JobHeldAdmin",
        "JobState=PENDING Reason=PartitionTimeLimit",
        "JobState=COMPLETED Reason=None",
    )
    assert slurm.follow().state == "COMPLETED"
    assert any("scontrol release 5" in line for line in slurm.heard.said)


def test_an_interruption_says_that_the_job_goes_on(slurm: Slurm) -> None:
    slurm.shows("JobState=RUNNING Reason=None")
    # Where the tests themselves run in the background, a shell has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not slurm.heard.said:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            slurm.follow()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert f"the job 5 goes on, and its log is {slurm.log}" in slurm.heard.said[-2]
    assert "envbuilder status --follow 5; cancel it: scancel 5" in slurm.heard.said[-1]
