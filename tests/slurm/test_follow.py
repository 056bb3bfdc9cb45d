"""Following, with a `scontrol` that shows one state after another; tests/lab has the real cluster."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from envbuilder.errors import BuildError, SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.progress_file import DONE, ProgressFile, progress_path
from envbuilder.report import Quiet, Unit
from envbuilder.slurm.follow import Ended, follow
from envbuilder.slurm.pace import PACE_VARIABLE, Pace, usual_pace

PACE = Pace(ask_s=0.02, look_s=0.01, settle_s=0.0, tell_s=0.0)
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
        self.heard, self.hooks = Heard(), ""
        self.folder.mkdir()
        monkeypatch.setenv("PATH", f"{self.folder}:/usr/bin:/bin")
        self.program("sacct", "true")
        self.program("squeue", "printf '6 10\\n7 99\\n8 98\\n'")

    def program(self, name: str, does: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\ndate +%s.%N >> {self.folder}/asked\n{does}\n")
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
            f"{self.hooks}"
            f"case $n in\n{cases}*) echo {shlex.quote(lines[-1])};;\nesac\n"
            f"for bad in {failing}; do [ $n = $bad ] && exit 1; done\nexit 0",
        )

    def job_writes(self, at: int, life: int = 1, **progress: Any) -> None:
        """The job replaces its progress file while scontrol gives answer number `at` (the first is 0)."""
        staged, path = self.folder / f"progress-{at}.json", progress_path(self.root, "5")
        path.parent.mkdir(parents=True, exist_ok=True)
        ProgressFile(staged, life=life, node="n1").write(**{"done": 0, "total": 0, **progress})
        self.hooks += f"[ $n = {at} ] && mv {staged} {path}\n"

    def questions(self) -> list[float]:
        """When Slurm was asked, by whichever program, in seconds."""
        return [float(line) for line in (self.folder / "asked").read_text().splitlines()]

    def follow(self, pace: Pace = PACE) -> Ended:
        return follow("5", self.log, root=self.root, reporter=self.heard, again="again", pace=pace)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path, monkeypatch)


def test_what_changes_is_told_once_and_the_end_is_returned(slurm: Slurm) -> None:
    slurm.job_writes(2, done=1, total=2, running=["a.cu"], seconds_left=30, stage="building x")
    slurm.shows(
        "JobState=PENDING Reason=Priority Priority=50 StartTime=2026-01-01T10:00:00",
        "JobState=CONFIGURING Reason=None",
        "JobState=RUNNING Reason=None BatchHost=n1 TimeLimit=00:30:00",
        "JobState=RUNNING Reason=None BatchHost=n1 TimeLimit=00:30:00",
        "JobState=COMPLETING Reason=None BatchHost=n1",
        "JobState=COMPLETED Reason=None BatchHost=n1 ExitCode=0:0",
    )
    ended = slurm.follow()
    assert (ended.id, ended.state, ended.lives, ended.log) == ("5", "COMPLETED", 1, slurm.log)
    said = slurm.heard.said
    assert said[:3] == [
        "job 5 is queued: jobs of higher priority are before it; expected to start at 2026-01-01T10:00:00",
        "2 jobs of the partition are before job 5",
        "job 5 is configuring",
    ]
    assert said.count("job 5 is running on n1, for at most 00:30:00") == 1
    assert said.count("building x") == 1
    assert said.count("job 5: 1/2 units") == 1
    assert "1 of 2 units are ready; about 30 s left; under way: a.cu" in said


def test_slurm_is_asked_no_oftener_than_the_pace_allows_whatever_there_is_to_ask(slurm: Slurm) -> None:
    waiting = "JobState=PENDING Reason=Priority Priority=50"
    slurm.job_writes(3, done=1, total=9, stage="building x", life=2)
    slurm.job_writes(4, done=9, total=9, stage=DONE, life=2, ended=0)
    # Where it stands in the queue and why it was started again are questions, too.
    slurm.shows(waiting, waiting, UNKNOWN, "JobState=RUNNING Reason=None Restarts=1", "JobState=RUNNING")
    assert slurm.follow(Pace(ask_s=0.1, look_s=0.01, settle_s=0.0, tell_s=0.0)).lives == 2
    asked = slurm.questions()
    assert len(asked) == 9, "5 of scontrol, 2 of squeue, 2 of sacct"
    assert min(later - sooner for sooner, later in pairwise(asked)) >= 0.09


def test_a_job_that_says_itself_that_it_began_and_did_all_is_not_asked_for(slurm: Slurm) -> None:
    slurm.shows("JobState=PENDING Reason=None")
    file = ProgressFile(progress_path(slurm.root, "5"), life=3, node="n7")
    file.begin()
    file.write(done=2, total=2, stage="linking")
    file.end(0)
    ended = slurm.follow(Pace(look_s=0.01))
    assert (ended.state, ended.lives) == ("COMPLETED", 3)
    assert not (slurm.folder / "asked").exists()


def test_what_a_job_says_is_told_before_slurm_does(slurm: Slurm) -> None:
    slurm.job_writes(0, done=1, total=4, stage="building x")
    slurm.shows("JobState=PENDING Reason=None")
    (slurm.log).write_text("")

    def goes_on() -> None:
        while "job 5: 1/4 units" not in slurm.heard.said:
            time.sleep(0.01)
        file = ProgressFile(progress_path(slurm.root, "5"), node="n1")
        file.write(done=4, total=4, stage=DONE)
        file.end(0)

    thread = threading.Thread(target=goes_on)
    thread.start()
    try:
        assert slurm.follow(Pace(look_s=0.01, settle_s=0.0)).state == "COMPLETED"
    finally:
        thread.join()
    assert slurm.heard.said == [
        "job 5 is queued: Slurm has not looked at it yet",
        "job 5 is running on n1",
        "building x",
        "job 5: 1/4 units",
        "job 5: 4/4 units",
    ]
    assert len(slurm.questions()) == 1


def test_a_failure_that_the_job_wrote_is_told_at_once_and_slurm_is_asked_once_for_the_verdict(
    slurm: Slurm,
) -> None:
    slurm.log.write_text("error: The build of x failed.\nremedy: mend a.cu\n")
    file = ProgressFile(progress_path(slurm.root, "5"))
    file.begin()
    file.end(6)
    slurm.shows("JobState=FAILED Reason=NonZeroExitCode ExitCode=6:0")
    with pytest.raises(BuildError, match="The build of x failed"):
        slurm.follow(Pace(look_s=0.01, settle_s=0.02))
    assert slurm.heard.said == ["job 5: it ended with exit code 6; asking Slurm what comes of it"]
    assert len(slurm.questions()) == 1


def test_a_job_that_stopped_and_queued_itself_again_is_followed_into_its_next_life(slurm: Slurm) -> None:
    slurm.job_writes(0, ended=75)
    slurm.job_writes(1, life=2, ended=None)
    slurm.job_writes(2, life=2, stage=DONE, ended=0)
    slurm.shows("JobState=RUNNING", "JobState=PENDING Reason=BeginTime Restarts=1", "JobState=RUNNING")
    assert slurm.follow().lives == 2
    said = slurm.heard.said
    assert "job 5: it stopped in good order; asking Slurm what comes of it" in said
    assert "warning: job 5 starts again after it stopped in good order: life 2" in said


def test_a_job_that_slurm_runs_again_is_not_taken_for_ended(slurm: Slurm) -> None:
    slurm.program(
        "sacct",
        "echo '5|NODE_FAIL|0:0|Unknown|lab|normal|n1|1:00'; echo '5|RUNNING|0:0|Unknown|lab|normal|n2|1:00'",
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


def test_the_usual_pace_is_once_a_minute_and_a_variable_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PACE_VARIABLE, raising=False)
    assert usual_pace().ask_s == 60
    monkeypatch.setenv(PACE_VARIABLE, "300")
    assert (usual_pace().ask_s, usual_pace().look_s) == (300, 2)
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(PACE_VARIABLE, wrong)
        with pytest.raises(UsageError, match="no number of seconds"):
            usual_pace()
