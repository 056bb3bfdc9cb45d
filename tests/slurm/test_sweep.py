"""A sweep's array: what it is of, what is told while it is followed, and how it ended; tests/lab has the real
cluster."""

from __future__ import annotations

import json
import os
import pwd
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from envbuilder.errors import SlurmError, TrainingError
from envbuilder.paths import Root
from envbuilder.progress_file import ProgressFile, job_progress, own_job_id, progress_path
from envbuilder.site import JobSpec, Site
from envbuilder.slurm.dry_run import dry_run
from envbuilder.slurm.follow_sweep import Failure, follow_sweep
from envbuilder.slurm.overview import find_log, log_of, own_jobs
from envbuilder.slurm.pace import Pace
from envbuilder.slurm.plan import Plan, Wishes, plan_sweep
from envbuilder.slurm.preflight import check_qos_is_free, room_for_jobs
from envbuilder.slurm.requeue import lives_path, requeue_this_job
from envbuilder.slurm.submit import array_of, submit_planned, submitted_with
from envbuilder.slurm.sweep_queue import (
    Task,
    check_no_sweep_trains,
    largest_array,
    next_array,
    queued_tasks,
    tasks_of_array,
)
from envbuilder.slurm.work import TRAINING
from envbuilder.slurm_queries import account_limit, max_array_size
from envbuilder.sweep import Sweep, make_sweep
from envbuilder.sweep_record import note_sweep
from tests.slurm.test_submit import Heard, Sbatch, sbatch, site

__all__ = ["sbatch", "site"]
AGAIN = "envbuilder sweep x.yaml --recipe tiny --site mine --over seed=1,2,3,4"
NAME = "envbuilder-sweep-x"
PACE = Pace(ask_s=0.02, look_s=0.01, settle_s=0.0, tell_s=0.0)


@pytest.fixture
def swept() -> Sweep:
    return make_sweep("x", "/c/x.yaml", "tiny", (), ["seed=1,2,3,4"])


@pytest.fixture
def root(tmp_path: Path, swept: Sweep, sbatch: Sbatch) -> Root:
    """Where the sweep is noted; Slurm's queue is empty, and it says nothing of arrays."""
    root = Root(tmp_path / "root")
    note_sweep(root, swept)
    for program in ("squeue", "scontrol", "sacct"):
        sbatch.program(program, "true")
    sbatch.says("123")
    return root


def plan(swept: Sweep, site: Site, root: Root, room: int | None = None, wishes: Wishes | None = None) -> Plan:
    array = next_array("x", swept.members, room=room, largest=1001, at_once=2)
    return plan_sweep(
        swept, array, site, root, ["--recipe", "tiny", "--over", "seed=1,2,3,4"], wishes or Wishes()
    )


def submitted(swept: Sweep, site: Site, root: Root, room: int | None = None) -> tuple[Task, ...]:
    job = submit_planned(plan(swept, site, root, room), root, Heard(), AGAIN)
    return tasks_of_array(root, job.id)


def queue(sbatch: Sbatch, *lines: str) -> None:
    """What squeue shows: "123_0 RUNNING" and the like, with the reason after it where one waits."""
    shown = []
    for line in lines:
        job, state, *reason = line.split()
        shown.append(f"{job}|{state}|{(reason or ['None'])[0]}|N/A|0:00|30:00|gpu|debug|{NAME}")
    sbatch.program(
        "squeue",
        f"echo asked >> {sbatch.folder}/asked\n" + "".join(f"echo {shlex.quote(line)}\n" for line in shown),
    )


def test_an_array_is_submitted_and_each_task_known_by_its_member(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    tasks = submitted(swept, site, root)
    logs = root.logs / "slurm"
    assert [(task.id, task.member.run) for task in tasks] == [
        ("123_0", "x-seed1"), ("123_1", "x-seed2"), ("123_2", "x-seed3"), ("123_3", "x-seed4"),
    ]  # fmt: skip
    assert tasks[3].log == logs / "sweep-x-123_3.log" == log_of(root, "123_3")
    tasks[3].log.touch()
    assert find_log(root, "123_3") == tasks[3].log
    assert submitted_with(root, "123_3") == submitted_with(root, "123") == AGAIN
    assert tasks_of_array(root, "123_3") == ()
    queue(sbatch, "123_0 RUNNING", "123_3 PENDING JobArrayTaskLimit", "99_1 RUNNING")
    assert [(job.listed.id, job.run, job.work) for job in own_jobs(root)] == [
        ("123_0", "x-seed1", TRAINING), ("123_3", "x-seed4", TRAINING), ("99_1", None, TRAINING),
    ]  # fmt: skip
    assert [task.id for task in queued_tasks(swept, root)] == ["123_0", "123_3"]


def test_a_task_that_says_that_it_is_done_is_not_queued(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    submitted(swept, site, root)
    queue(sbatch, "123_0 COMPLETING", "123_1 COMPLETING")
    ProgressFile(progress_path(root, "123_0")).end(0)
    ProgressFile(progress_path(root, "123_1")).end(75)
    assert [task.id for task in queued_tasks(swept, root)] == ["123_1"]


def test_a_run_that_another_command_trains_is_refused(swept: Sweep, root: Root, sbatch: Sbatch) -> None:
    line = "7|RUNNING|None|N/A|0:00|30:00|gpu|debug|envbuilder-train-x-seed2"
    sbatch.program("squeue", f"echo '{line}'")
    with pytest.raises(SlurmError, match=r"The job 7 .* trains a run of the sweep already"):
        queued_tasks(swept, root)


def test_a_run_that_a_sweep_trains_is_known_to_train(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    submitted(swept, site, root)
    queue(sbatch, "123_1 RUNNING")
    check_no_sweep_trains("x-seed1", root, after=None)
    check_no_sweep_trains("x-seed2", root, after="123_1")
    with pytest.raises(SlurmError, match="The job 123_1 of a sweep trains this run already: running"):
        check_no_sweep_trains("x-seed2", root, after=None)
    ProgressFile(progress_path(root, "123_1")).end(0)
    check_no_sweep_trains("x-seed2", root, after=None)


def test_an_array_is_of_as_many_as_there_is_room_for_with_indices_that_stay(swept: Sweep) -> None:
    rest = [swept.members[index] for index in (0, 2, 3)]
    array = next_array("x", rest, room=2, largest=None, at_once=None)
    assert (array.option, array.later) == ("0,2", 1)
    array = next_array("x", rest, room=None, largest=1001, at_once=8)
    assert (array.option, array.later) == ("0,2-3%8", 0)


def test_members_beyond_the_largest_index_come_in_an_array_with_an_offset(
    swept: Sweep, site: Site, root: Root
) -> None:
    array = next_array("x", swept.members, room=None, largest=3, at_once=None)
    assert (array.option, array.first, array.later) == ("0-2", 0, 1)
    array = next_array("x", swept.members[3:], room=None, largest=3, at_once=None)
    assert (array.option, array.first, array.later) == ("0", 3, 0)
    script = plan_sweep(swept, array, site, root, ["--recipe", "tiny"], Wishes()).script
    assert script.endswith("sweep-member /c/x.yaml --name x --recipe tiny --first 3\n")
    (root.logs / "slurm").mkdir(parents=True)
    record = {"command": AGAIN, "log": "/l", "array": asdict(array)}
    (root.logs / "slurm" / "job-5.json").write_text(json.dumps(record))
    assert array_of(root, "5") == array
    assert [(task.id, task.member.run) for task in tasks_of_array(root, "5")] == [("5_0", "x-seed4")]


def test_the_largest_array_is_what_slurm_says(root: Root, sbatch: Sbatch) -> None:
    assert largest_array() is None
    sbatch.program("scontrol", "echo 'MaxArraySize            = 1001'")
    assert largest_array() == max_array_size() == 1001
    sbatch.program("scontrol", "echo 'MaxArraySize            = 0'")
    with pytest.raises(SlurmError, match="takes no job arrays"):
        largest_array()


def test_the_room_is_that_of_the_qos_and_of_the_account(root: Root, sbatch: Sbatch) -> None:
    spec = JobSpec(walltime="00:10:00", cpus=1, qos="debug")
    assert room_for_jobs(spec, root) is None
    user = pwd.getpwuid(os.getuid()).pw_name
    sbatch.program(
        "sacctmgr",
        'case "$*" in *"show qos"*) echo "debug||6||";; '
        f'*user={user}*) echo "one|two|3"; echo "two|two|4"; echo "three|two|";; esac',
    )
    queue(sbatch, "123_0 RUNNING", "123_1 PENDING")
    assert account_limit(None) == (4, "two")
    assert account_limit("one") == (3, "one")
    assert account_limit("three") is None
    assert room_for_jobs(spec, root) == 2
    assert room_for_jobs(spec.model_copy(update={"account": "one"}), root) == 1
    queue(sbatch, *(f"123_{index} PENDING" for index in range(4)))
    assert room_for_jobs(spec, root) == 0
    with pytest.raises(
        SlurmError, match="The account two takes no further job of yours now; in it: 123_0"
    ) as caught:
        check_qos_is_free(spec, root, AGAIN)
    assert f"{AGAIN} --wait-for-qos" in caught.value.remedy


def test_a_refused_array_is_explained(swept: Sweep, site: Site, root: Root, sbatch: Sbatch) -> None:
    sbatch.says("sbatch: error: Batch job submission failed: Invalid job array specification", 1)
    with pytest.raises(SlurmError, match="takes no such job array") as caught:
        submitted(swept, site, root)
    assert "scontrol show config" in caught.value.remedy


def test_a_dry_run_counts_all_runs(swept: Sweep, site: Site, root: Root, sbatch: Sbatch) -> None:
    sbatch.says("")
    short = dry_run(plan(swept, site, root, room=1, wishes=Wishes(estimate_s=1800.0)), Heard())
    assert (short.runs, short.jobs) == (4, 1)
    assert short.whole is not None
    assert short.all_runs.core_hours == 4 * short.whole.core_hours == 4 * 0.5 * 8
    unknown = dry_run(plan(swept, site, root), Heard())
    assert unknown.all_runs.core_hours == 4 * unknown.one_job.core_hours


def test_a_task_calls_itself_by_array_and_index(
    root: Root, monkeypatch: pytest.MonkeyPatch, sbatch: Sbatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "127")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert own_job_id() == "127"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "123")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert own_job_id() == "123_4"
    file = job_progress(root)
    assert file is not None
    file.write(done=3, total=9)
    assert progress_path(root, "123_4").exists()
    sbatch.program("scontrol", f'echo "$@" > {sbatch.folder}/arguments')
    requeue_this_job(root, Heard(), TRAINING)
    assert (sbatch.folder / "arguments").read_text() == "requeue 123_4\n"
    assert json.loads(lives_path(root, "123_4").read_text()) == {"done": [3]}


def followed(tasks: tuple[Task, ...], root: Root, heard: Heard) -> tuple[Failure, ...]:
    return follow_sweep(
        "x", tasks, finished=0, total=4, root=root, reporter=heard, again=AGAIN, pace=PACE
    )  # fmt: skip


def test_a_sweep_whose_tasks_all_say_that_they_are_done_asks_slurm_nothing(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    tasks, heard = submitted(swept, site, root), Heard()
    for task in tasks:
        ProgressFile(progress_path(root, task.id)).end(0)
    queue(sbatch)
    assert followed(tasks, root, heard) == ()
    assert heard.said == ["sweep x: 4 of 4 runs finished"]
    assert not (sbatch.folder / "asked").exists()


def test_what_failed_is_told_with_its_own_error_and_leaves_the_others(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    tasks, heard = submitted(swept, site, root), Heard()
    ProgressFile(progress_path(root, "123_0")).end(0)
    tasks[1].log.write_text("error: the loss is not a number\nremedy: look at line 3\n")
    ProgressFile(progress_path(root, "123_1")).end(10)
    queue(sbatch, "123_1 FAILED", "123_2 CANCELLED", "123_3 COMPLETED")
    user = os.getuid()
    sbatch.program("sacct", f"echo '123_2|CANCELLED by {user}|0:0|Unknown|gpu|debug|None|30:00'")
    first, second = followed(tasks, root, heard)
    assert (first.task.id, second.task.id) == ("123_1", "123_2")
    assert isinstance(first.error, TrainingError)
    assert (first.error.message, first.error.remedy) == ("the loss is not a number", "look at line 3")
    assert isinstance(second.error, SlurmError)
    assert second.error.message == "The job 123_2 was cancelled by you."
    assert AGAIN in second.error.remedy
    assert heard.said[-1] == "sweep x: 2 of 4 runs finished, 2 failed"
    assert f"x-seed2 ended as FAILED; its log: {tasks[1].log}" in heard.said


def test_one_question_is_for_all_tasks_and_says_what_waits(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    tasks, heard = submitted(swept, site, root), Heard()
    asked = sbatch.folder / "asked"
    lines = {
        0: ["123_0 PENDING Resources"],
        1: ["123_0 RUNNING", "123_1 RUNNING", "123_2 PENDING JobArrayTaskLimit"],
        2: [f"123_{index} COMPLETED" for index in range(4)],
    }
    steps = "".join(
        f"{number}) printf '%s\\n' "
        + " ".join(
            shlex.quote("|".join([*line.split(), "None"][:3]) + f"|N/A|0:00|30:00|gpu|debug|{NAME}")
            for line in shown
        )
        + ";;\n"
        for number, shown in lines.items()
    )
    sbatch.program(
        "squeue",
        f"echo asked >> {asked}\nn=$(($(wc -l < {asked}) - 1)); [ $n -gt 2 ] && n=2\ncase $n in\n{steps}esac",
    )
    assert followed(tasks, root, heard) == ()
    assert heard.said == [
        "sweep x: 0 of 4 runs finished, 4 waiting (it is next, and waits for free nodes)",
        "sweep x: 0 of 4 runs finished, 2 running, 2 waiting",
        "sweep x: 4 of 4 runs finished",
    ]
    assert len(asked.read_text().splitlines()) == 3


def test_a_node_s_failure_is_not_taken_for_the_end_and_the_next_life_is_told(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    task, heard = submitted(swept, site, root)[0], Heard()
    path = progress_path(root, task.id)
    ProgressFile(path).begin()
    ProgressFile(sbatch.folder / "second", life=2).begin()
    ProgressFile(sbatch.folder / "done", life=2).end(0)
    sbatch.program(
        "squeue",
        f"n=$(cat {sbatch.folder}/n 2>/dev/null || echo 0); echo $((n + 1)) > {sbatch.folder}/n\n"
        f"state=RUNNING; [ $n = 0 ] && state=NODE_FAIL\n"
        f"[ $n = 1 ] && cp {sbatch.folder}/second {path}.new && mv {path}.new {path}\n"
        f"[ $n = 3 ] && cp {sbatch.folder}/done {path}.new && mv {path}.new {path}\n"
        f'echo "123_0|$state|None|N/A|0:00|30:00|gpu|debug|{NAME}"',
    )
    assert followed((task,), root, heard) == ()
    assert "x-seed1 starts again: life 2" in heard.said


def test_tasks_that_the_queue_has_forgotten_are_looked_up_in_the_accounting(
    swept: Sweep, site: Site, root: Root, sbatch: Sbatch
) -> None:
    tasks, heard = submitted(swept, site, root)[:2], Heard()
    sbatch.program(
        "sacct",
        "echo '123_0|COMPLETED|0:0|Unknown|gpu|debug|n1|30:00'; "
        "echo '123_1|TIMEOUT|0:0|Unknown|gpu|debug|n1|00:30:00'",
    )
    (failure,) = followed(tasks, root, heard)
    assert failure.error.message == "The job 123_1 reached its time limit (00:30:00) and was ended by Slurm."
    sbatch.program("sacct", "true")
    with pytest.raises(SlurmError, match="Slurm does not know the job 123_0"):
        followed(tasks, root, heard)


def test_a_silent_controller_ends_nothing(swept: Sweep, site: Site, root: Root, sbatch: Sbatch) -> None:
    task, heard = submitted(swept, site, root)[0], Heard()
    sbatch.program(
        "squeue",
        f"[ -e {sbatch.folder}/n ] || {{ touch {sbatch.folder}/n; echo 'Socket timed out' >&2; exit 1; }}\n"
        f"echo '123_0|COMPLETED|None|N/A|0:00|30:00|gpu|debug|{NAME}'",
    )
    assert followed((task,), root, heard) == ()
    assert "Slurm does not answer (Socket timed out); asking on, no job is touched by it" in heard.said
    assert "Slurm answers again" in heard.said


def test_what_will_never_start_is_said(swept: Sweep, site: Site, root: Root, sbatch: Sbatch) -> None:
    tasks, heard = submitted(swept, site, root), Heard()
    queue(sbatch, *(f"123_{index} PENDING PartitionTimeLimit" for index in range(4)))
    with pytest.raises(SlurmError, match="The job 123 will not start as it is"):
        followed(tasks, root, heard)


def test_ctrl_c_leaves_the_jobs_and_says_how_to_go_on(
    swept: Sweep, site: Site, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, heard = submitted(swept, site, root), Heard()

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("envbuilder.slurm.follow_sweep.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        followed(tasks, root, heard)
    assert heard.said[-1] == "follow them again: envbuilder status --follow 123; cancel them: scancel 123"
