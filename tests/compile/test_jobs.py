from __future__ import annotations

import os
from pathlib import Path

import pytest

from envbuilder.compile.units.jobs import MachineLimits, machine_limits

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
    limits = machine_limits(system, {})
    assert max(1, min(limits.cpus, limits.memory // (4 * GIB))) == expected


def test_a_machine_that_tells_nothing_gives_the_cpus(tmp_path: Path) -> None:
    assert machine_limits(tmp_path, {}).cpus == 16


QUOTA = {"sys/fs/cgroup/job/cpu.max": "250000 100000", "sys/fs/cgroup/job/memory.max": str(12 * GIB)}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, MachineLimits(16, 64 * GIB, "16 CPUs (affinity), 64.0 GiB (available)"), id="none"),
        pytest.param(
            {"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "32768"},
            MachineLimits(8, 32 * GIB, "8 CPUs (SLURM_CPUS_ON_NODE), 32.0 GiB (SLURM_MEM_PER_NODE)"),
            id="a batch script has all CPUs of its job",
        ),
        pytest.param(
            {"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_STEP_NUM_TASKS": "4"},
            MachineLimits(2, 64 * GIB, "2 CPUs (SLURM_CPUS_PER_TASK), 64.0 GiB (available)"),
            id="one task of a step has its own",
        ),
        pytest.param(
            {"SLURM_CPUS_PER_TASK": "1"},
            MachineLimits(1, 64 * GIB, "1 CPU (SLURM_CPUS_PER_TASK), 64.0 GiB (available)"),
            id="only the task's CPUs are told",
        ),
        pytest.param(
            {"SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_CPU": "2048"},
            MachineLimits(4, 8 * GIB, "4 CPUs (SLURM_CPUS_ON_NODE), 8.0 GiB (SLURM_MEM_PER_CPU)"),
            id="memory for each CPU",
        ),
        pytest.param(
            {"SLURM_MEM_PER_CPU": "2048"},
            MachineLimits(16, 64 * GIB, "16 CPUs (affinity), 64.0 GiB (available)"),
            id="memory for each of nobody knows how many CPUs",
        ),
        pytest.param(
            {"SLURM_MEM_PER_NODE": "20G"},
            MachineLimits(16, 20 * GIB, "16 CPUs (affinity), 20.0 GiB (SLURM_MEM_PER_NODE)"),
            id="memory with a suffix",
        ),
        pytest.param(
            {"SLURM_MEM_PER_NODE": "0", "SLURM_CPUS_ON_NODE": "99"},
            MachineLimits(16, 64 * GIB, "16 CPUs (affinity), 64.0 GiB (available)"),
            id="all memory of the node, more CPUs than may be used",
        ),
        pytest.param(
            {"SLURM_MEM_PER_NODE": "much", "SLURM_CPUS_ON_NODE": "", "SLURM_CPUS_PER_TASK": "-1"},
            MachineLimits(16, 64 * GIB, "16 CPUs (affinity), 64.0 GiB (available)"),
            id="not numbers",
        ),
    ],
)
def test_the_smallest_limit_counts_and_is_named(
    tmp_path: Path, variables: dict[str, str], expected: MachineLimits
) -> None:
    system = machine(tmp_path, available=64 * GIB, mounts="", cgroup="", files={})
    assert machine_limits(system, variables) == expected


def test_a_control_group_limits_a_job_too(tmp_path: Path) -> None:
    system = machine(tmp_path, available=64 * GIB, mounts=V2, cgroup="0::/job\n", files=QUOTA)
    limits = machine_limits(system, {"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_NODE": "32768"})
    assert limits == MachineLimits(3, 12 * GIB, "3 CPUs (control group), 12.0 GiB (control group)")


def test_where_nothing_tells_of_memory_some_is_taken_for_there(tmp_path: Path) -> None:
    assert machine_limits(tmp_path, {}) == MachineLimits(
        16, 4 * GIB, "16 CPUs (affinity), 4.0 GiB (nothing tells)"
    )


def test_variables_are_this_process_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "5")
    assert machine_limits(tmp_path).cpus == 5


def test_this_machine_can_be_asked() -> None:
    limits = machine_limits()
    assert limits.cpus >= 1
    assert limits.memory > 0
