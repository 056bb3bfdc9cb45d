"""How jobs end on a real Slurm, and what is made of it: each job of `JOBS` is followed to its end.

They all start at once, and wait side by side: Slurm looks at time limits twice a minute only.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.lab.followed import Cluster, Followed, cluster_up, wait_until

pytestmark = pytest.mark.lab

# A job that stops as compile does: it runs itself again, or says why it does not.
STOP = """
from rich.console import Console
from envbuilder.display import print_error
from envbuilder.errors import BuildError, EnvbuilderError
from envbuilder.report import Quiet
from envbuilder.slurm.requeue import requeue_this_job
def fail(error):
    print_error(Console(soft_wrap=True), error, verbose=False)
    sys.exit(error.exit_code)
def again():
    try:
        requeue_this_job(root, Quiet())
    except EnvbuilderError as error:
        fail(error)
    sys.exit(75)
"""
BIG = "b'1' * 400_000_000"
JOBS: dict[str, tuple[str, dict[str, object]]] = {
    "timeout": ("time.sleep(6000)", {"walltime": "00:01:00"}),
    "lives": (
        "def stop(*_):\n"
        "    print(f'life {life} stops', flush=True)\n"
        "    again()\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "before = read_progress(path)\n"
        "begin = before.done if before else 0\n"
        "ready(begin + 1, 2, stage=f'life {life}')\n"
        "time.sleep(6000 if life == 1 else 0)\n"
        "ready(2, 2, stage='done')\n"
        "print(f'life {life} did all')",
        # Slurm may warn a minute too early: a job of one minute would perhaps not listen yet.
        {"walltime": "00:02:00", "asked": {"warned": True, "requeue": True}},
    ),
    "standstill": ("ready(1, 5)\nagain()", {"asked": {"requeue": True}}),
    "stopped": ("sys.exit(75)", {}),
    "memory": (f"print('begun', flush=True)\nprint(len({BIG}))", {}),
    "memory-of-a-part": (
        f'import subprocess\nprint(subprocess.run([sys.executable, "-c", "{BIG}"]).returncode)\n'
        "ready(1, 1, stage='done')",
        {},
    ),
    "cancelled": ("time.sleep(6000)", {}),
    "failed": (
        "fail(BuildError('The build of tiny failed.', remedy='envbuilder doctor --log x', "
        "context={'unit': 'a.cu', 'error': 'no such file'}))",
        {},
    ),
    "crashed": ("raise ValueError('a bug')", {}),
    "too-early": ("os.kill(os.getpid(), signal.SIGUSR1)\ntime.sleep(600)", {}),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_up(memory_limits=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, Future[Followed]]:
    return {name: cluster.follow(name, STOP + does, **more) for name, (does, more) in JOBS.items()}  # type: ignore[arg-type]


def test_a_job_that_another_user_cancels(cluster: Cluster, jobs: dict[str, Future[Followed]]) -> None:
    job = cluster.running("cancelled")
    cluster.lab.cancel_as_operator(job)
    error = jobs["cancelled"].result().error
    assert (error["exit_code"], error["message"]) == (9, f"The job {job} was cancelled by root.")
    assert error["remedy"] == "What was built is kept; go on with: envbuilder compile RECIPE"


def test_an_error_of_envbuilder_s_own_is_the_same_error_here(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["failed"].result().error
    assert (error["error"], error["exit_code"]) == ("BuildError", 6)
    assert error["message"] == "The build of tiny failed."
    assert error["remedy"] == "envbuilder doctor --log x"
    assert "unit: a.cu" in error["context"]["details"]
    assert error["context"]["log"].endswith(".log")


def test_a_crash_shows_the_end_of_the_log(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["crashed"].result().error
    assert (error["error"], error["exit_code"]) == ("SlurmError", 9)
    assert error["message"].endswith("ended with FAILED, exit code 1.")
    assert error["context"]["the log's end"].endswith("ValueError: a bug")


def test_a_job_that_stopped_in_good_order(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["stopped"].result().error
    assert (error["error"], error["exit_code"]) == ("StoppedError", 75)
    assert error["remedy"] == "Go on with: envbuilder compile RECIPE"


def test_a_warning_that_nobody_listened_to(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["too-early"].result().error
    assert error["exit_code"] == 9
    assert "SIGUSR1" in error["message"]
    assert "signal 10" in error["context"]["state"]


def test_a_job_that_needed_more_memory_than_it_asked_for(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["memory"].result().error
    assert error["exit_code"] == 9
    assert "used more memory than it had asked for" in error["message"]
    assert "Set more memory in the site file" in error["remedy"]
    assert error["context"]["the log's end"].startswith("\nbegun\n")
    assert "oom-kill" in error["context"]["the log's end"]


def test_a_job_that_did_all_though_a_part_was_killed_for_its_memory(
    jobs: dict[str, Future[Followed]],
) -> None:
    followed = jobs["memory-of-a-part"].result()
    assert followed.ended["state"] == "OUT_OF_MEMORY", followed
    assert followed.ended["log"].startswith("-9\n")
    assert "warning: the job did all, yet ended as OUT_OF_MEMORY" in followed.text


def test_a_job_that_makes_nothing_ready_is_not_run_for_ever(jobs: dict[str, Future[Followed]]) -> None:
    followed = jobs["standstill"].result()
    assert followed.error["exit_code"] == 9
    assert "this life, number 2, brought none of its units" in followed.error["message"]
    assert "starts again after REQUEUED: life 2" in followed.text


def test_a_job_whose_time_ends_is_warned_and_goes_on_in_its_next_life(
    jobs: dict[str, Future[Followed]],
) -> None:
    followed = jobs["lives"].result()
    assert followed.ended["lives"] == 2, followed
    log = followed.ended["log"]
    assert log.index("life 1 stops") < log.index("life 2 did all")
    assert "life 2" in followed.text
    assert followed.heard[-1] == "2 of 2 units"


def test_a_time_limit_that_nobody_heeded(jobs: dict[str, Future[Followed]]) -> None:
    error = jobs["timeout"].result().error
    assert error["exit_code"] == 9
    assert "reached its time limit (00:01:00)" in error["message"]
    assert error["remedy"].endswith("envbuilder compile RECIPE --requeue")
    assert "DUE TO TIME LIMIT" in error["context"]["the log's end"]


def test_a_node_that_fails_ends_a_job_or_lets_it_run_again(
    cluster: Cluster, jobs: dict[str, Future[Followed]]
) -> None:
    for job in jobs.values():
        job.result()  # None of them is to be hit.
    one, other = cluster.lab.nodes
    cluster.lab.drain(other)
    try:
        again = cluster.follow(
            "again", "print(life, flush=True)\ntime.sleep(600 if life == 1 else 0)", asked={"requeue": True}
        )
        gone = cluster.follow("gone", "time.sleep(600)")
        log = cluster.root / f"logs/slurm/again-{cluster.running('again')}.log"
        wait_until(lambda: log.exists() and log.read_text() == "1\n", "the first life has begun")
        no_more = cluster.lab.as_user(["scontrol", "update", f"jobid={cluster.running('gone')}", "requeue=0"])
        assert no_more.returncode == 0, no_more.stderr
    finally:
        cluster.lab.resume(other)
    cluster.lab.kill_node(one)
    error = gone.result().error
    assert (error["exit_code"], error["message"].split(" under ")[0]) == (9, f"The node {one} failed")
    followed = again.result()
    assert followed.ended == {"state": "COMPLETED", "lives": 2, "log": "1\n2\n"}, followed
    assert "starts again after NODE_FAIL: life 2" in followed.text
    cluster.lab.start_node(one)
