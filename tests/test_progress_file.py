"""Progress files: what one process writes, another reads; a damaged one is as good as none."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from envbuilder.paths import Root
from envbuilder.progress_file import Progress, ProgressFile, job_progress, progress_path, read_progress


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = progress_path(Root(tmp_path), "7")
    assert path == tmp_path / "logs/slurm/progress-7.json"
    ProgressFile(path).write(
        done=3, total=9, running=("a.cu", "b.cu"), seconds_left=12.5, stage="building x 1.0"
    )
    read = read_progress(path)
    assert read is not None
    assert read == Progress(3, 9, ("a.cu", "b.cu"), 12.5, "building x 1.0", read.updated)
    assert (read.life, read.node, read.ended) == (1, "", None)
    assert json.loads(path.read_text()) == {
        "done": 3,
        "total": 9,
        "running": ["a.cu", "b.cu"],
        "seconds_left": 12.5,
        "stage": "building x 1.0",
        "figures": "",
        "life": 1,
        "node": "",
        "ended": None,
        "updated": read.updated,
    }
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_job_says_which_life_it_is_in_and_with_what_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    root = Root(tmp_path)
    ProgressFile(progress_path(root, "7")).write(done=3, total=9, stage="done", ended=75)
    file = job_progress(root)
    assert file is not None
    file.begin()
    begun = read_progress(progress_path(root, "7"))
    assert begun is not None
    assert (begun.life, begun.node, begun.ended) == (3, "node1", None)
    assert (begun.done, begun.total, begun.stage) == (3, 9, "starting")
    file.write(done=9, total=9, stage="linking")
    file.end(6)
    ended = read_progress(progress_path(root, "7"))
    assert ended is not None
    assert (ended.ended, ended.done, ended.stage) == (6, 9, "linking")


@pytest.mark.parametrize("seconds", [None, math.inf, math.nan])
def test_a_time_that_nobody_knows_is_none(tmp_path: Path, seconds: float | None) -> None:
    ProgressFile(tmp_path / "p.json").write(done=0, total=1, seconds_left=seconds)
    read = read_progress(tmp_path / "p.json")
    assert read is not None
    assert read.seconds_left is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"done": 1}', '{"done": "1", "total": 2, "running": [], "stage": ""}', "\xff"]
)
def test_a_file_that_is_none_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("latin-1"))
    assert read_progress(path) is None
    assert read_progress(tmp_path / "absent.json") is None


def test_a_place_that_can_t_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ProgressFile(tmp_path / "file" / "p.json").write(done=0, total=1)


def test_many_threads_write_and_every_read_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    ProgressFile(path).write(done=0, total=400)

    def write(start: int) -> None:
        for done in range(start, start + 50):
            ProgressFile(path).write(done=done, total=400, running=["x" * done])

    threads = [threading.Thread(target=write, args=(50 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    reads = []
    while any(thread.is_alive() for thread in threads):
        reads.append(read_progress(path))
    for thread in threads:
        thread.join()
    assert reads
    assert None not in reads
