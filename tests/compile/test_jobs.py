from __future__ import annotations

import os
from pathlib import Path

import pytest

from envbuilder.compile.jobs import max_jobs

GIB = 1 << 30
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def machine(folder: Path, *, available: int, mounts: str, cgroup: str, files: dict[str, str]) -> Path:
    contents = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n",
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


@pytest.mark.parametrize(
    ("available", "mounts", "cgroup", "files", "expected"),
    [
        pytest.param(256 * GIB, "", "", {}, 16, id="the CPUs of this process"),
        pytest.param(24 * GIB, "", "", {}, 6, id="the memory that is free"),
        pytest.param(1 * GIB, "", "", {}, 1, id="never none"),
        pytest.param(
            256 * GIB,
            V2,
            "0::/slurm/job\n",
            {"sys/fs/cgroup/slurm/memory.max": str(12 * GIB), "sys/fs/cgroup/slurm/job/memory.max": "max"},
            3,
            id="a limit further up, version 2",
        ),
        pytest.param(
            256 * GIB,
            V2,
            "0::/job\n",
            {"sys/fs/cgroup/job/cpu.max": "250000 100000"},
            3,
            id="a CPU quota, version 2",
        ),
        pytest.param(
            256 * GIB,
            V1,
            "5:memory:/job\n4:cpu,cpuacct:/job\n",
            {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(8 * GIB),
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2,
            id="version 1",
        ),
    ],
)
def test_jobs_follow_what_this_process_may_use(
    tmp_path: Path, available: int, mounts: str, cgroup: str, files: dict[str, str], expected: int
) -> None:
    system = machine(tmp_path, available=available, mounts=mounts, cgroup=cgroup, files=files)
    assert max_jobs(system) == expected


def test_a_machine_that_tells_nothing_gives_the_cpus(tmp_path: Path) -> None:
    assert max_jobs(tmp_path) == 16
