"""The end of a job's log: its last lines, and the tool's own error among them."""

from __future__ import annotations

from pathlib import Path

from envbuilder.slurm.joblog import LogEnd, parse_log_end, read_log_end


def test_there_is_no_log(tmp_path: Path) -> None:
    assert read_log_end(tmp_path / "none.log") == LogEnd()
    assert read_log_end(tmp_path) == LogEnd()
    (tmp_path / "empty.log").touch()
    assert read_log_end(tmp_path / "empty.log") == LogEnd()


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"\xff\n" * 300_000 + b"one\n" * 20 + b"last\n\n")
    end = read_log_end(log)
    assert end.last.splitlines() == ["one"] * 14 + ["last"]
    assert end.message is None


def test_the_last_error_is_the_one_that_counts() -> None:
    block = "error: {0}\n  file: {0}.toml\nremedy: mend {0}\n"
    end = parse_log_end(
        block.format("first") + "building\n" + block.format("second") + "slurmstepd: error: x\n"
    )
    assert (end.message, end.details, end.remedy) == ("second", "  file: second.toml", "mend second")
    assert end.last.endswith("slurmstepd: error: x")


def test_an_error_without_a_remedy_is_one() -> None:
    end = parse_log_end("envbuilder: module gcc does not load; see: module avail\n")
    assert (end.message, end.remedy) == ("module gcc does not load; see: module avail", None)


def test_another_program_s_errors_are_not_the_tool_s() -> None:
    assert parse_log_end("slurmstepd: error: Detected 1 oom-kill event(s)\na.cu: error: x\n").message is None
