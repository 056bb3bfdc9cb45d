from __future__ import annotations

import time
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.process import run


def test_output_is_kept_in_the_order_it_came_and_goes_to_the_log_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ended = run(["sh", "-c", "echo one; echo two >&2; exit 3"], log=log)
    assert (ended.returncode, ended.output, ended.timed_out) == (3, "one\ntwo\n", False)
    assert log.read_text(encoding="utf-8") == ended.output


def test_a_program_that_takes_too_long_is_killed_with_all_it_started() -> None:
    for timeout_s in (0.2, 2, 20):
        ended = run(["sh", "-c", "sleep 600 & echo $!; wait"], timeout_s=timeout_s)
        assert ended.timed_out
        if ended.output:  # else this machine is too busy to start it so soon
            break
    # Killed, it is gone, or empty until whoever it was left to has waited for it.
    command_line = Path("/proc", ended.output.strip(), "cmdline")
    while command_line.exists() and command_line.read_bytes():
        time.sleep(0.01)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MismatchError) as caught:
        run(["no-such-program", "--version"])
    assert caught.value.context["command"] == "no-such-program --version"
