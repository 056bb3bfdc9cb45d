"""Limits of control groups, in the layouts that batch systems and containers give."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.cgroup import Limits, control_group_limits

GIB = 1 << 30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
CONTAINER = "35 31 0:32 /docker/4f2a /sys/fs/cgroup/memory ro - cgroup cgroup ro,memory\n"


def system(folder: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("mounts", "groups", "files", "limits"),
    [
        pytest.param("", "", {}, Limits(None, None, None), id="no control groups"),
        pytest.param(
            V2,
            "0::/slurm/job/step",
            {
                "sys/fs/cgroup/slurm/job/memory.max": str(12 * GIB),
                "sys/fs/cgroup/slurm/job/step/memory.max": "max",
                "sys/fs/cgroup/slurm/memory.max": str(64 * GIB),
                "sys/fs/cgroup/slurm/job/cpu.max": "max 100000",
                "sys/fs/cgroup/slurm/cpu.max": "250000 100000",
            },
            Limits(2, 2.5, 12 * GIB),
            id="version 2, limits further up",
        ),
        pytest.param(V2, "0::/", {}, Limits(2, None, None), id="version 2, no limit"),
        pytest.param(
            V2,
            "0::/../../outside",
            {"sys/fs/cgroup/memory.max": str(GIB)},
            Limits(2, None, GIB),
            id="version 2, a group above the namespace",
        ),
        pytest.param(
            HYBRID,
            "5:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/\n0::/job",
            {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(8 * GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            Limits(1, 4.0, 8 * GIB),
            id="version 1 beside an empty version 2",
        ),
        pytest.param(
            CONTAINER,
            "5:memory:/docker/4f2a/inner",
            {
                "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            },
            Limits(1, None, 2 * GIB),
            id="version 1, a container's own mount",
        ),
        pytest.param(
            "31 23 0:28 / /sys/fs/my\\040groups rw - cgroup2 cgroup2 rw\n",
            "0::/",
            {"sys/fs/my groups/memory.max": str(GIB)},
            Limits(2, None, GIB),
            id="mounted at a place with a space",
        ),
    ],
)
def test_the_smallest_limit_up_the_hierarchy_counts(
    tmp_path: Path, mounts: str, groups: str, files: dict[str, str], limits: Limits
) -> None:
    assert control_group_limits(system(tmp_path, mounts, groups, files)) == limits


def test_this_machine_can_be_asked() -> None:
    limits = control_group_limits()
    assert limits.cpus is None or limits.cpus > 0
    assert limits.memory is None or limits.memory > 0
