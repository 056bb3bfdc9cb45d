"""What is read of a log, and which failure in it is named first."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from envbuilder.doctor import explain_log, log_lines
from envbuilder.doctor.log_explained import explain_scan
from envbuilder.doctor.log_lines import read_blocks
from envbuilder.doctor.log_scan import SPEAKERS_AT_MOST, scan_log
from envbuilder.errors import InputError
from envbuilder.model import Finding
from tests.conftest import Quickstart

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.30 GiB."
TIMEOUT = (
    "[rank0]:[E626 06:24:44.903 ProcessGroupNCCL.cpp:616] [Rank 0] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=808, OpType=ALLREDUCE) ran for 600020 milliseconds before timing out."
)
CHILD_FAILED = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "
ROOT_CAUSE = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_21:07:25
  host      : node7
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 29144)
  error_file: <N/A>
  traceback : To enable traceback see: the documentation
============================================================
"""


def explained(log: str | bytes) -> tuple[Finding, ...]:
    raw = log if isinstance(log, bytes) else log.encode()
    return explain_scan(scan_log(read_blocks(io.BytesIO(raw))))


def named(log: str | bytes) -> list[str]:
    return [finding.check.removeprefix("log.") for finding in explained(log)]


# --- the first cause


@pytest.mark.parametrize(
    "order", [[OOM, TIMEOUT, CHILD_FAILED], [TIMEOUT, CHILD_FAILED, OOM], [TIMEOUT, OOM]]
)
def test_a_cause_is_named_before_what_it_led_to_wherever_it_is_printed(order: list[str]) -> None:
    (finding,) = explained("\n".join(f"[rank3]: {line}" if line == OOM else line for line in order))
    assert finding.check == "log.gpu-out-of-memory"
    assert any("rank 3 | torch.OutOfMemoryError" in line for line in finding.evidence)
    assert any("waited in vain for the others" in line for line in finding.evidence)


def test_a_timeout_is_named_where_the_log_has_no_cause() -> None:
    (finding,) = explained(f"{CHILD_FAILED}\n{TIMEOUT}\n  exitcode  : -6 (pid: 4711)\n")
    assert (finding.check, finding.verdict) == ("log.nccl-timeout", "failed")
    assert any("torchrun ended the run" in line for line in finding.evidence)


def test_what_a_run_survives_comes_last() -> None:
    lines = [
        "UserWarning: Attempted to use ninja as the BuildExtension backend but we could not find ninja..",
        "/usr/bin/ld: cannot find -lcudart",
        "compiling on",
        "c++: fatal error: Killed signal terminated program cc1plus",
        "error: command failed with exit code 1",
    ]
    findings = explained("\n".join(lines))
    assert [(finding.check, finding.verdict) for finding in findings] == [
        ("log.libcudart-link", "failed"),
        ("log.compiler-out-of-memory", "failed"),
        ("log.ninja-missing", "warning"),
    ]


def test_the_rank_that_torchrun_saw_fail_first_is_believed_before_the_order_of_the_lines() -> None:
    lines = "[rank0]: RuntimeError: CUDA error: device-side assert triggered\n" + f"[rank2]: {OOM}\n"
    assert named(lines)[0] == "device-assert"
    assert named(lines + ROOT_CAUSE.format(rank=2, code=1))[0] == "gpu-out-of-memory"


def test_what_torchrun_says_of_the_first_failure_is_shown() -> None:
    (finding,) = explained(ROOT_CAUSE.format(rank=5, code=18))
    assert finding.check == "log.torchrun-exit-18"
    assert finding.evidence[-1] == (
        "the first failure that torchrun saw (line 1): rank 5 (local_rank: 5), on node7, "
        "exit code 18 (pid: 29144), at 2026-11-22_21:07:25"
    )


# --- ranks


def test_interleaved_tracebacks_are_put_together_for_each_rank() -> None:
    traces = {
        rank: [
            "Traceback (most recent call last):",
            f'  File "/work/train.py", line {10 + rank}, in step',
            "    loss.backward()",
            '  File "/env/lib/python3.11/site-packages/torch/_tensor.py", line 648, in backward',
            "    torch.autograd.backward(",
            f"ValueError: rank {rank} is unhappy",
        ]
        for rank in range(2)
    }
    mixed = [
        f"[rank{rank}]: {line}"
        for lines in zip(*traces.values(), strict=True)
        for rank, line in enumerate(lines)
    ]
    (finding,) = explained("\n".join([*mixed, CHILD_FAILED]))
    assert (finding.check, finding.verdict) == ("log.unknown", "failed")
    assert finding.evidence[:2] == (
        "> 11 rank 0 | ValueError: rank 0 is unhappy  [/work/train.py:10, in step]",
        "> 12 rank 1 | ValueError: rank 1 is unhappy  [/work/train.py:11, in step]",
    )


@pytest.mark.parametrize(
    ("label", "speaker"),
    [
        ("[rank3]: ", "rank 3"),
        ("[default3]:", "local rank 3"),
        ("[trainer3]:", "local rank 3"),
        ("[default3]:[rank11]: ", "rank 11"),
        ("node-7: [rank3]: ", "rank 3"),
        ("[1,3]<stderr>:", "rank 3"),
    ],
)
def test_the_labels_of_torch_torchrun_and_mpirun_are_told_apart(label: str, speaker: str) -> None:
    (finding,) = explained(f"{label}before\n[rank0]: between\n{label}{OOM}\n[rank0]: between\n{label}after\n")
    shown = [line for line in finding.evidence if " | " in line]
    assert [line.split(" | ")[0].strip("> ") for line in shown] == [f"{n} {speaker}" for n in (1, 3, 5)]


def test_the_labels_of_srun_count_where_most_lines_have_them() -> None:
    log = "".join(f"{task}: step {step}\n" for step in range(9) for task in range(4)) + f"2: {OOM}\n"
    (finding,) = explained(log)
    assert any(line.startswith("> 37 task 2 | torch.OutOfMemoryError") for line in finding.evidence)
    (finding,) = explained(f"one\ntwo\n2: {OOM}\n")
    assert any(line.startswith("> 3 | 2: torch.OutOfMemoryError") for line in finding.evidence)


def test_every_rank_with_the_same_failure_is_named_once() -> None:
    (finding,) = explained("".join(f"[rank{rank}]: {OOM}\n" * 3 for rank in range(12)))
    (also,) = [line for line in finding.evidence if line.startswith("also: ")]
    assert also.startswith("also: line 4, rank 1; line 7, rank 2")
    assert also.endswith("and 3 more")


def test_nonsense_with_ever_new_ranks_stays_bounded() -> None:
    scan = scan_log(read_blocks(io.BytesIO(b"".join(b"[rank%d]: error: x\n" % n for n in range(9000)))))
    assert len(scan.hits) <= SPEAKERS_AT_MOST + 1


# --- unknown failures


def test_an_unknown_failure_is_said_to_be_unknown_with_the_lines_that_tell_most() -> None:
    log = "\n".join(
        [
            "Traceback (most recent call last):",
            '  File "train.py", line 3, in read',
            "    return rows[key]",
            "KeyError: 'messages'",
            "",
            "The above exception was the direct cause of the following exception:",
            "",
            "Traceback (most recent call last):",
            '  File "train.py", line 9, in <module>',
            "    main()",
            "DataError: no messages",
            *[f"cleaning up {n}" for n in range(50)],
        ]
    )
    (finding,) = explained(log)
    assert (finding.check, finding.verdict) == ("log.unknown", "warning")
    assert finding.evidence == (
        "> 11 | DataError: no messages  [train.py:9, in <module>] (from 4 | KeyError: 'messages')",
    )


def test_a_compilers_first_error_tells_more_than_its_last_lines() -> None:
    error = "a.cpp:7:3: error: 'x' was not declared in this scope"
    (finding,) = explained(f"{error}\n    7 |   x\nninja: build stopped: subcommand failed.\n")
    assert (finding.check, finding.verdict) == ("log.unknown", "failed")
    assert finding.evidence[0] == f"> 1 | {error}"


def test_exceptions_beside_a_known_cause_are_shown_with_it() -> None:
    log = f"[rank3]: {OOM}\n[rank0]: Traceback (most recent call last):\n[rank0]: ValueError: no answer\n"
    (finding,) = explained(log)
    assert finding.check == "log.gpu-out-of-memory"
    assert "also raised: > 3 rank 0 | ValueError: no answer  [no frame]" in finding.evidence


def test_a_log_without_a_failure_is_ok_and_an_empty_one_is_not_explained() -> None:
    (clean,) = explained("step 1: loss 5.12\nOverkilled and killed nothing\n  exitcode  : 180\nsaved\n")
    assert (clean.check, clean.verdict) == ("log.clean", "ok")
    (empty,) = explained("")
    assert (empty.check, empty.verdict) == ("log.empty", "skipped")


# --- what logs are made of


def test_progress_bars_escapes_nuls_and_bytes_that_are_no_text_are_read_through() -> None:
    bar = b"".join(b"\r%3d%%|\xe2\x96\x88   | 1/3" % n for n in range(100))
    junk = bytes(range(256)) * 40
    log = b"one\r\n" + bar + b"\r\x1b[1;31m" + OOM.encode() + b"\x1b[0m\n" + junk + b"\n\0\0last\xff\xfe"
    (finding,) = explained(log)
    assert f"> 2 | {OOM}" in finding.evidence
    assert all(char.isprintable() for line in finding.evidence for char in line)


def test_of_a_long_line_the_part_that_tells_is_shown() -> None:
    (finding,) = explained("x" * 3000 + OOM + "y" * 3000)
    (line,) = [line for line in finding.evidence if line.startswith("> ")]
    assert "CUDA out of memory" in line
    assert len(line) < 300


def test_a_pattern_may_reach_into_the_next_lines_of_the_same_rank() -> None:
    lines = [
        "The detected CUDA version (11.8) mismatches the version",
        "The detected CUDA version (11.8)",
        "mismatches",
    ]
    assert named(f"[rank1]: {lines[0]}\n") == ["cuda-mismatch"]
    assert named(f"[rank1]: {lines[1]}\n[rank0]: x\n[rank1]: {lines[2]}\n") == ["cuda-mismatch"]
    assert named(f"[rank1]: {lines[1]}\n[rank0]: {lines[2]}\n") == ["clean"]


def test_a_failure_is_found_wherever_the_blocks_of_the_reading_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log = f"fine\nbefore\n[rank1]: The detected CUDA version (11.8)\n[rank1]: mismatches\nafter\n{OOM}\n"
    whole = explained(log)
    for size in range(8, 200, 7):
        monkeypatch.setattr(log_lines, "BLOCK_BYTES", size)
        # A line longer than a block is cut: these blocks hold at least the longest.
        if size > 80:
            assert explained(log) == whole


class Endless(io.RawIOBase):
    """A log made while it is read, of which nothing is kept."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.most_asked = 0

    def read(self, size: int = -1) -> bytes:
        self.most_asked = max(self.most_asked, size)
        assert size > 0, "the whole log was asked for at once"
        return next(self._pieces, b"")


def test_a_large_log_is_read_in_pieces_and_little_of_it_is_kept() -> None:
    piece = b"step 1/9: loss 2.31, 8,102 tokens/s\n" * 20_000
    stream = Endless(iter([*[piece] * 12, OOM.encode() + b"\n", *[piece] * 3]))
    scan = scan_log(read_blocks(stream))  # type: ignore[arg-type]
    assert scan.lines == 15 * 20_000 + 1
    assert stream.most_asked == log_lines.BLOCK_BYTES
    (hit,) = scan.hits.values()
    assert hit.line.number == 12 * 20_000 + 1
    assert len(hit.before) <= 3
    assert len(hit.after) <= 2


def test_a_line_without_end_is_cut_and_not_gathered() -> None:
    blocks = read_blocks(Endless(iter([b"x" * log_lines.BLOCK_BYTES] * 8 + [b"\nlast\n"])))  # type: ignore[arg-type]
    sizes = [(block.first, len(block.text)) for block in blocks]
    assert max(size for _, size in sizes) <= 2 * log_lines.BLOCK_BYTES
    assert sizes[-1] == (1, 5)


def test_no_pattern_takes_ever_longer_for_a_longer_line() -> None:
    """Lines that almost match are read in pieces of LINE_CHARS: all signatures' marks in one such piece."""
    from envbuilder.doctor.signatures import signatures

    for signature in signatures():
        for mark in signature.marks:
            for filler in (mark, f"{mark} ", " ", "a", "error: "):
                window = (mark + filler * log_lines.LINE_CHARS)[: log_lines.LINE_CHARS]
                thread = threading.Thread(target=signature.fits, args=("\n".join([window] * 3),), daemon=True)
                thread.start()
                thread.join(20)
                assert not thread.is_alive(), signature.id


# --- where the log comes from


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(OOM.encode())))
    assert [finding.check for finding in explain_log("-")] == ["log.gpu-out-of-memory"]


def test_a_missing_standard_input_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError):
        explain_log("-")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "folder"])
def test_a_log_that_cant_be_read_is_an_input_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "job.out"
    make(path)
    with pytest.raises(InputError) as caught:
        explain_log(str(path))
    assert "job.out" in caught.value.message


def test_the_command_reads_a_pipe_and_exits_as_for_a_failed_check() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "envbuilder", "doctor", "--log", "-"],
        input=OOM, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 8, done.stderr
    assert "A GPU ran out of memory." in done.stdout


# --- real programs


def test_real_compilers_and_linkers_say_what_the_table_knows(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("void f(); int main() { f(); }\n", encoding="utf-8")
    (tmp_path / "h.cpp").write_text("#include <cusolverDn.h>\n", encoding="utf-8")
    (tmp_path / "bad.cpp").write_text("int main() { return nothing; }\n", encoding="utf-8")

    def compile_(*words: str) -> list[str]:
        done = subprocess.run(
            ["g++", *words], cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
        assert done.returncode != 0
        return named(done.stderr)

    assert compile_("a.cpp") == ["undefined-reference"]
    assert compile_("a.cpp", "-lno-such-library") == ["link-library-missing"]
    assert compile_("h.cpp") == ["cuda-headers-missing"]
    assert compile_("-std=c++99", "a.cpp") == ["host-compiler-too-old"]
    assert compile_("bad.cpp") == ["unknown"]


@pytest.mark.parametrize(
    ("script", "identity"),
    [
        ("import ctypes; ctypes.CDLL('libcudart.so.99')", "cuda-library-missing"),
        ("import no_such_package", "python-module-missing"),
        ("open('/dev/full', 'w').write('x' * 100_000)", "disk-full"),
        (
            "import resource as r; r.setrlimit(7, (9, 9)); [open('/dev/null') for _ in range(20)]",
            "too-many-open-files",
        ),
        ("bytearray(1 << 62)", "host-out-of-memory"),
        ("raise LookupError('nothing knows this')", "unknown"),
    ],
)
def test_a_real_pythons_traceback_is_what_the_table_knows(script: str, identity: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert named(done.stderr)[0] == identity


@pytest.mark.needs_env
def test_a_real_torchrun_in_which_one_rank_fails_is_told_from_the_others(
    quickstart: Quickstart, tmp_path: Path
) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "def load(path): return open(path)\n"
        "if d.get_rank() == 1: load('/nowhere/data.jsonl')\n"
        "d.barrier()\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [quickstart.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (finding,) = explained(done.stderr)
    assert (finding.check, finding.verdict) == ("log.unknown", "failed")
    assert "rank 1 | FileNotFoundError" in finding.evidence[0]
    assert f"[{script}:3, in load]" in finding.evidence[0]
    assert any("lost its connection" in line for line in finding.evidence)
    assert finding.evidence[-1].startswith("the first failure that torchrun saw")
