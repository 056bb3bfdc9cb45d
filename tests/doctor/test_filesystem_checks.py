from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.checks.filesystem import why_nothing_runs
from envbuilder.paths import Root
from tests.doctor.apart import limits_told_by
from tests.doctor.conftest import run_one


@pytest.fixture(autouse=True)
def own_folders(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME and TMPDIR of this test alone."""
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    root.path.mkdir()


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this what is told to be mounted."""

    def tell(text: str) -> None:
        path = tmp_path / "mountinfo"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr("envbuilder.doctor.disks._MOUNTS", path)

    return tell


def test_folders_that_programs_run_from_pass(root: Root) -> None:
    finding = run_one("storage.noexec", root=root)
    assert finding.verdict == "ok"
    assert all(line.endswith("a script there runs") for line in finding.evidence)
    assert not list(root.path.iterdir())


def test_a_disk_that_keeps_no_right_to_execute_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a FAT or SMB disk: the mode is taken and forgotten.
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    finding = run_one("storage.noexec", root=root)
    assert finding.verdict == "failed"
    assert "ROOT and HOME and TMPDIR" in finding.summary
    assert all("does not run: Permission denied" in line for line in finding.evidence)


def test_only_the_folder_that_nothing_runs_from_is_moved(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    real, scratch = Path.chmod, os.environ["TMPDIR"]

    def chmod(path: Path, mode: int) -> None:
        if not str(path).startswith(scratch):
            real(path, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    finding = run_one("storage.noexec", root=root)
    assert finding.summary.endswith("from TMPDIR.")
    moved = f"{root.path}/envbuilder-tmpdir"
    assert finding.remedy == f"mkdir -p {moved} && export TMPDIR={moved}"
    # The command does what it says.
    command = ["/bin/sh", "-ec", f"{finding.remedy}; cd $TMPDIR; pwd"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == moved


def test_noexec_among_the_mount_options_is_told(root: Root, mounts: Callable[[str], None]) -> None:
    mounts("27 1 254:0 / / rw,nosuid,noexec - ext4 /dev/vda rw\n")
    finding = run_one("storage.noexec", root=root)
    # What counts is what runs: mountinfo of another namespace may be stale.
    assert finding.verdict == "ok"
    assert all("ext4 at /, noexec among its options" in line for line in finding.evidence)


MOUNT_NOEXEC = """
mount -t tmpfs -o noexec none "$1" && exec "$2" -c '
import sys
from pathlib import Path
from envbuilder.doctor.checks.filesystem import why_nothing_runs
print(why_nothing_runs(Path(sys.argv[1])))' "$1"
"""


def test_a_real_noexec_mount_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    unshare = shutil.which("unshare") or "unshare"
    command = [unshare, "-rm", "/bin/sh", "-c", MOUNT_NOEXEC, "sh", folder, sys.executable]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        assert ended.stdout == "Permission denied\n"
    else:  # no namespaces for this user: nothing was mounted
        assert why_nothing_runs(folder) is None


def test_folders_without_a_right_to_write_are_not_tried(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, "/proc")
    finding = run_one("storage.noexec", root=Root(Path("/proc/root-of-envs")))
    assert finding.verdict == "skipped"
    assert "not tried" in finding.summary


def test_locks_that_work_pass(root: Root) -> None:
    finding = run_one("storage.locks", root=root)
    assert finding.verdict == "ok"
    assert all("flock works, lockf works" in line for line in finding.evidence)


@pytest.fixture
def locks_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the locks of every new Python what these lines make of them, as another file system would."""

    def change(lines: str) -> None:
        folder = tmp_path / "customised"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"import errno, fcntl\n{lines}\n", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return change


def test_locks_that_do_nothing_are_a_warning(root: Root, locks_in_the_child: Callable[[str], None]) -> None:
    locks_in_the_child("fcntl.flock = fcntl.lockf = lambda *_: None")
    finding = run_one("storage.locks", root=root)
    assert finding.verdict == "warning"
    assert "ROOT and HOME" in finding.summary
    assert all("flock does nothing, lockf does nothing" in line for line in finding.evidence)


def test_locks_that_the_file_system_refuses_are_a_warning(
    root: Root, locks_in_the_child: Callable[[str], None]
) -> None:
    locks_in_the_child(
        "def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = refuse"
    )
    finding = run_one("storage.locks", root=root)
    assert finding.verdict == "warning"
    assert all("flock No locks available, lockf works" in line for line in finding.evidence)


def test_locks_that_never_answer_are_a_warning(
    root: Root, locks_in_the_child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envbuilder.doctor.checks.filesystem.LOCK_TIMEOUT_S", 0.5)
    locks_in_the_child("import time\nfcntl.flock = lambda *_: time.sleep(60)")
    finding = run_one("storage.locks", root=root)
    assert finding.verdict == "warning"
    assert any("flock gave no answer" in line for line in finding.evidence)


@pytest.mark.parametrize("options", ["rw,localflock", "rw,vers=3,local_lock=all", "rw,vers=3,nolock"])
def test_locks_that_hold_on_one_node_only_are_a_warning(
    root: Root, mounts: Callable[[str], None], options: str
) -> None:
    mounts(f"27 1 0:9 / / rw - nfs server:/export {options}\n")
    finding = run_one("storage.locks", root=root)
    assert finding.verdict == "warning"
    assert "on this node alone" in finding.summary


def test_a_disk_that_takes_long_to_write_is_a_warning(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.3))
    finding = run_one("storage.speed", root=root)
    assert finding.verdict == "warning"
    assert "MiB/s with fsync" in finding.evidence[0]
    assert "ENVBUILDER_ROOT=FOLDER" in str(finding.remedy)


def test_a_disk_that_takes_long_to_make_a_file_is_a_warning(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def slowly(path: Path, data: bytes) -> int:
        time.sleep(0.03)
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", slowly)
    assert run_one("storage.speed", root=root).verdict == "warning"


def test_a_disk_above_the_bounds_passes(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the tests' disk does meanwhile.
    monkeypatch.setattr("envbuilder.doctor.checks.filesystem.SLOW_MIB_PER_S", 0)
    monkeypatch.setattr("envbuilder.doctor.checks.filesystem.SLOW_MS_PER_FILE", 1e9)
    finding = run_one("storage.speed", root=root)
    assert finding.verdict == "ok"
    assert len(finding.evidence) == 1
    assert not list(root.path.iterdir())


def test_each_disk_is_measured_by_itself(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    finding = run_one("storage.speed", root=root)
    assert finding.evidence[0].startswith("ROOT (")
    assert finding.evidence[1].startswith("TMPDIR (/proc): ")


def test_a_scratch_folder_on_a_disk_passes(root: Root, mounts: Callable[[str], None]) -> None:
    mounts("27 1 254:0 / / rw - xfs /dev/vda rw\n")
    finding = run_one("storage.scratch", root=root)
    assert (finding.verdict, finding.evidence[0].split(": ")[1]) == ("ok", "xfs at /")


def test_a_scratch_folder_that_is_not_there_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = root.path / "of-another-job"
    monkeypatch.setenv("TMPDIR", str(missing))
    finding = run_one("storage.scratch", root=root)
    assert finding.verdict == "failed"
    assert f"mkdir -p {missing}" in str(finding.remedy)


@pytest.mark.parametrize(("limit", "verdict"), [(8 << 30, "warning"), (64 << 30, "ok")])
def test_a_scratch_folder_in_memory_is_a_warning_where_that_is_scarce(
    root: Root,
    mounts: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    verdict: str,
) -> None:
    mounts("27 1 0:9 / / rw - tmpfs tmpfs rw,size=1024k\n")
    told = limits_told_by(tmp_path / "system", memory_max=str(limit))
    monkeypatch.setattr("envbuilder.doctor.checks.limits.control_group_limits", told)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 64 << 18, "SC_PAGE_SIZE": 4096}[name])
    assert run_one("storage.scratch", root=root).verdict == verdict


def test_a_disk_with_the_clock_of_this_machine_passes(root: Root) -> None:
    assert run_one("storage.clock", root=root).verdict == "ok"


@pytest.mark.parametrize(("ahead_s", "told"), [(3600, "behind the clock"), (-3600, "ahead of the clock")])
def test_a_clock_that_is_not_the_disks_is_a_warning(
    root: Root, monkeypatch: pytest.MonkeyPatch, ahead_s: int, told: str
) -> None:
    monkeypatch.setattr("envbuilder.doctor.checks.filesystem.time", lambda: time.time() + ahead_s)
    finding = run_one("storage.clock", root=root)
    assert finding.verdict == "warning"
    assert "ROOT and TMPDIR" in finding.summary
    assert all(told in line for line in finding.evidence)
