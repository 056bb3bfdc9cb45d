"""How jobs end: every state and exit code has its words, its remedy and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import EnvbuilderError
from envbuilder.slurm.joblog import LogEnd, parse_log_end
from envbuilder.slurm.verdict import ENDED, VERDICTS, verdict
from envbuilder.slurm_queries import JobView

LOG = Path("/logs/compile-x-5.log")
AGAIN = "envbuilder compile r.toml --sbatch --site mine"
TEXT = """\
▸ building tiny 1.0
error: The build of tiny 1.0 failed.
  log: /root/logs/tiny.log
  error: a.cu(3): error: expected a ";"
remedy: envbuilder doctor --log /root/logs/tiny.log
"""


def ended(
    state: str,
    *,
    code: int = 0,
    signal: int = 0,
    text: str = "",
    did_all: bool = False,
    by: str | None = None,
) -> EnvbuilderError | None:
    job = JobView("5", state, code, signal, node="node7", limit="00:30:00", cancelled_by=by)
    return verdict(job, LOG, parse_log_end(text), again=AGAIN, did_all=did_all)


@pytest.mark.parametrize(
    ("state", "message", "remedy"),
    [
        ("TIMEOUT", "its time limit (00:30:00)", f"{AGAIN} --requeue"),
        ("OUT_OF_MEMORY", "more memory than it had asked for", "Set more memory"),
        ("NODE_FAIL", "The node node7 failed", AGAIN),
        ("BOOT_FAIL", "node7 did not start up", AGAIN),
        ("LAUNCH_FAILED", "could not start the job 5 on node7", AGAIN),
        ("PREEMPTED", "higher priority", f"{AGAIN} --requeue"),
        ("DEADLINE", "deadline", AGAIN),
        ("CANCELLED", "cancelled by ada", AGAIN),
        ("REVOKED", "another cluster", "squeue --federation --me"),
    ],
)
def test_a_state_has_words_and_a_remedy(state: str, message: str, remedy: str) -> None:
    error = ended(state, text="the end\n", by="ada")
    assert error is not None
    assert message in error.message
    assert remedy in error.remedy
    assert error.exit_code == 9
    assert error.context == {"job": "5", "state": state, "log": str(LOG), "the log's end": "\nthe end"}


def test_every_state_that_ends_is_tried_above() -> None:
    tried = {mark.args[1][i][0] for mark in _marks() for i in range(len(mark.args[1]))}
    assert set(VERDICTS) == tried
    assert {*VERDICTS, "COMPLETED", "FAILED"} == ENDED


def _marks() -> list[pytest.Mark]:
    return list(test_a_state_has_words_and_a_remedy.pytestmark)  # type: ignore[attr-defined]


def test_a_job_that_completed_did_all() -> None:
    assert ended("COMPLETED") is None


def test_only_the_job_s_own_word_makes_an_oom_a_success() -> None:
    assert ended("OUT_OF_MEMORY", signal=125, did_all=True) is None
    assert ended("OUT_OF_MEMORY", signal=125) is not None
    assert ended("TIMEOUT", did_all=True) is not None


def test_a_command_that_has_requeue_is_not_told_to_have_it_twice() -> None:
    job = JobView("5", "TIMEOUT")
    error = verdict(job, LOG, LogEnd(), again=f"{AGAIN} --requeue", did_all=False)
    assert error is not None
    assert error.remedy.count("--requeue") == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [(3, "InputError"), (5, "IntegrityError"), (6, "BuildError"), (7, "MismatchError"), (9, "SlurmError")],
)
def test_an_error_of_the_tool_is_the_same_error(code: int, kind: str) -> None:
    error = ended("FAILED", code=code, text=TEXT)
    assert error is not None
    assert (type(error).__name__, error.exit_code) == (kind, code)
    assert error.message == "The build of tiny 1.0 failed."
    assert error.remedy == "envbuilder doctor --log /root/logs/tiny.log"
    assert error.context["details"].splitlines()[-1] == '  error: a.cu(3): error: expected a ";"'
    assert error.context["state"] == f"FAILED, exit code {code}"


def test_stopped_in_good_order_says_how_to_go_on() -> None:
    error = ended("FAILED", code=75, text=TEXT)
    assert error is not None
    assert (error.exit_code, error.remedy) == (75, f"Go on with: {AGAIN}")


def test_a_tool_that_left_no_error_still_has_its_exit_code() -> None:
    error = ended("FAILED", code=6)
    assert error is not None
    assert (error.exit_code, error.message) == (6, "The job 5 ended with envbuilder's exit code 6.")
    assert error.context["the log"] == "nothing was written"


@pytest.mark.parametrize(
    ("code", "signal", "text", "message"),
    [
        (1, 0, "Traceback …\nKeyError: 'x'\n", "The job 5 ended with FAILED, exit code 1."),
        (2, 0, "bash: syntax error\n", "The job 5 ended with FAILED, exit code 2."),
        (42, 0, TEXT, "The job 5 ended with FAILED, exit code 42."),
        (127, 0, "", "did not find its command on node7"),
        (126, 0, "", "could not run its command"),
        (130, 0, "", "was told to end"),
        (0, 9, "", "was killed (SIGKILL)"),
        (137, 0, "", "was killed (SIGKILL)"),
        (0, 10, "", "SIGUSR1"),
        (0, 11, "", "The job 5 ended with FAILED, signal 11."),
        (0, 60, "", "The job 5 ended with FAILED, signal 60."),
        (255, 0, "", "The job 5 ended with FAILED, exit code 255."),
        (6, 9, "", "was killed (SIGKILL)"),
    ],
)
def test_what_is_no_error_of_the_tool_is_slurm_s(code: int, signal: int, text: str, message: str) -> None:
    error = ended("FAILED", code=code, signal=signal, text=text)
    assert error is not None
    assert error.exit_code == 9
    assert message in error.message
    assert "{" not in error.remedy


def test_a_shell_s_exit_code_with_the_tool_s_error_is_the_tool_s() -> None:
    error = ended("FAILED", code=2, text="error: --a and --b exclude one another.\nremedy: leave one out\n")
    assert error is not None
    assert (error.exit_code, error.remedy) == (2, "leave one out")


@pytest.mark.parametrize(
    ("job", "remedy"),
    [
        (
            JobView("5", "TIMEOUT"),
            f"The run's checkpoints are kept; go on, over as many lives as it takes, with: {AGAIN}",
        ),
        (JobView("5", "CANCELLED"), f"The run's checkpoints are kept; go on with: {AGAIN}"),
        (JobView("5", "FAILED", 75), f"Go on with: {AGAIN}"),
    ],
)
def test_a_training_job_keeps_its_checkpoints(job: JobView, remedy: str) -> None:
    end = parse_log_end("error: Stopped after step 7.\n  step: 7\nremedy: again\n")
    error = verdict(job, Path("/logs/train-x-5.log"), end, again=AGAIN, did_all=False)
    assert error is not None
    assert error.remedy == remedy
    if job.exit_code == 75:
        assert error.message.endswith("The run's checkpoints are kept. Stopped after step 7.")
