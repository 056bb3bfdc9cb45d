"""A job followed while it waits and runs, on a real Slurm, whatever happens meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.followed import Cluster, cluster_up, wait_until

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_up() as cluster:
        yield cluster


def test_a_job_is_followed_to_its_end_with_its_progress(cluster: Cluster) -> None:
    followed = cluster.follow(
        "units",
        "for done in range(3):\n"
        "    ready(done, 3, running=['a', 'b', 'c', 'd'], seconds_left=90.0, stage='building tiny 1.0')\n"
        "    time.sleep(1.5)\n"
        "print('all of it', flush=True)\n"
        # With this the follower has seen the end: what a job says after it is in its log alone.
        "ready(3, 3, stage='done')",
    ).result()
    assert followed.ended == {"state": "COMPLETED", "lives": 1, "log": "all of it\n"}, followed
    # On which node, is told where the job wrote that before its log was seen.
    assert f"job {cluster.job_id('units')} is running" in followed.text
    assert [line for line in followed.heard if line == "building tiny 1.0"] == ["building tiny 1.0"]
    units = [line for line in followed.heard if line.endswith("of 3 units")]
    assert units == sorted(set(units)), "each count is told once"
    assert units[-1] == "3 of 3 units"
    assert any("about 90 s left; under way: a, b, c and 1 more" in line for line in followed.heard)


def test_a_job_waits_for_the_one_that_it_follows(cluster: Cluster) -> None:
    first = cluster.follow("first", "wait_for('go')")
    second = cluster.follow("second", "print('then')", asked={"after": cluster.job_id("first")})
    cluster.wait_until_heard("second", "is queued: the job that it is to follow has not ended")
    cluster.let("go")
    assert second.result().ended["state"] == "COMPLETED"
    assert first.result().ended["state"] == "COMPLETED"


def test_a_dependency_that_is_never_satisfied_is_told_and_not_waited_for(cluster: Cluster) -> None:
    failed = cluster.follow("failing", "sys.exit(3)")
    assert failed.result().error["exit_code"] == 3
    job = cluster.lab.as_user(
        ["sbatch", "--parsable", f"--dependency=afterok:{cluster.job_id('failing')}", "--wrap", "true"]
    ).stdout.strip()
    error = cluster.follow("never", job=job).result().error
    assert error["exit_code"] == 9
    assert error["message"].endswith("the job that it is to follow did not end as it had to.")
    assert f"scancel {job}" in error["remedy"]
    assert cluster.lab.job_state(job) == "PENDING", "it is the user's to cancel"


def test_a_controller_that_is_away_for_a_while_is_told_and_waited_for(cluster: Cluster) -> None:
    following = cluster.follow("patient", "wait_for('back')\nprint('ended')")
    cluster.running("patient")
    cluster.lab.stop_controller()
    try:
        cluster.wait_until_heard("patient", "Slurm does not answer")
    finally:
        cluster.lab.start_controller()
    cluster.wait_until_heard("patient", "Slurm answers again")
    cluster.let("back")
    followed = following.result()
    assert followed.ended["state"] == "COMPLETED", followed
    assert "warning: Slurm does not answer" in followed.text


def test_an_unknown_job_is_told(cluster: Cluster) -> None:
    error = cluster.follow("nothing", job="99999").result().error
    assert (error["exit_code"], error["error"]) == (9, "SlurmError")
    assert "does not know the job 99999" in error["message"]


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(cluster: Cluster) -> None:
    following = cluster.follow("long", "time.sleep(600)")
    job = cluster.running("long")
    code, said = cluster.interrupted("status", "--follow", job, once="is running")
    assert code == 130, said
    assert f"the job {job} goes on" in said
    assert f"envbuilder status --follow {job}; cancel it: scancel {job}" in said
    assert "Traceback" not in said
    assert cluster.lab.job_state(job) == "RUNNING"
    cluster.lab.as_user(["scancel", job])
    error = following.result().error
    assert error["message"] == f"The job {job} was cancelled by you."


def test_status_lists_jobs_with_why_they_wait_and_how_far_they_are(cluster: Cluster) -> None:
    running = cluster.follow(
        "compile-tiny", "ready(2, 5, running=['x'], seconds_left=30, stage='building')\ntime.sleep(600)"
    )
    job = cluster.running("compile-tiny")
    wait_until((cluster.root / f"logs/slurm/progress-{job}.json").exists, "there is progress")
    waiting = cluster.follow("probe", asked={"after": job})
    other = cluster.job_id("probe")
    cluster.lab.as_user(["sbatch", "--job-name=unrelated", "--wrap", "sleep 600"])

    listed = {
        entry["id"]: entry for entry in json.loads(cluster.envbuilder("--json", "status").stdout)["jobs"]
    }
    assert set(listed) == {job, other}, "and no other's"
    assert listed[job]["state"] == "RUNNING"
    assert (listed[job]["progress"]["done"], listed[job]["progress"]["total"]) == (2, 5)
    assert listed[job]["log"].endswith(f"compile-tiny-{job}.log")
    assert listed[other]["waits_for"] == "the job that it is to follow has not ended"
    said = cluster.envbuilder("status").stdout
    assert f"{job}" in said
    assert "2 of 5 units; building; about 30 s left" in said

    (cluster.lab.home / "tiny.toml").write_text('name = "tiny"\nrequirements = ["tiny==1.0"]\n')
    of_tiny = json.loads(cluster.envbuilder("--json", "status", "tiny.toml").stdout)
    assert [entry["id"] for entry in of_tiny["jobs"]] == [job]
    cluster.lab.cancel_all()
    assert {running.result().error["exit_code"], waiting.result().error["exit_code"]} == {9}


def test_status_without_an_answer_shows_what_is_on_the_disk(cluster: Cluster) -> None:
    away = cluster.lab.as_user(
        [cluster.python, "-m", "envbuilder", "--root", cluster.root, "--json", "status"],
        env={"SLURM_CONF": "/nowhere/slurm.conf"},
    )
    assert away.returncode == 0, away.stderr
    answer = json.loads(away.stdout)
    assert answer["jobs"] == []
    assert answer["slurm"].startswith("Slurm does not answer")


def test_a_job_that_is_held_is_told_with_the_way_to_let_it_go(cluster: Cluster) -> None:
    before = cluster.follow("before", "time.sleep(600)")
    held = cluster.follow("held", asked={"after": cluster.job_id("before")})
    job = cluster.job_id("held")
    cluster.lab.as_user(["scontrol", "hold", job])
    cluster.wait_until_heard("held", "it is held (JobHeldUser)")
    cluster.wait_until_heard("held", f"scontrol release {job}")
    cluster.lab.as_user(["scontrol", "release", job])
    cluster.lab.as_user(["scancel", cluster.job_id("before")])
    assert held.result().ended["state"] == "COMPLETED"
    assert before.result().error["exit_code"] == 9
