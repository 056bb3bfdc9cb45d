from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.disks import mount_of, read_mounts
from envbuilder.doctor.quotas import Usage, parse_beegfs, parse_mmlsquota, parse_table
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from tests.doctor.conftest import TinyEnv, make_lock, run_one

CHECK = "storage.free-space"


def test_what_lies_on_one_disk_is_added_up(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finding = run_one(CHECK, root=root, recipe=Recipe(name="tiny", requirements=("tiny",)), lock=make_lock())
    assert len(finding.evidence) == 1
    assert finding.evidence[0].startswith("ROOT and HOME and TMPDIR")
    assert "5.0 GiB needed" in finding.evidence[0]


def test_a_lock_larger_than_the_disk_fails(root: Root) -> None:
    recipe = Recipe(name="tiny", requirements=("tiny",))
    finding = run_one(CHECK, root=root, recipe=recipe, lock=make_lock(size=10**17))
    assert finding.verdict == "failed"
    assert "ROOT" in finding.summary


def test_an_installed_env_needs_no_room_for_its_lock(env: TinyEnv) -> None:
    env.lock = make_lock(size=10**17)
    assert "ROOT" not in env.check(CHECK).summary


def test_a_folder_without_room_that_takes_no_file_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    finding = run_one(CHECK, root=root)
    assert finding.verdict == "failed"
    assert "TMPDIR" in finding.summary
    assert any("TMPDIR (/proc): 0.0 GiB free" in line for line in finding.evidence)
    assert any(line.startswith("TMPDIR (/proc): ") and "free" not in line for line in finding.evidence)


def test_a_disk_that_takes_no_more_files_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def nearly_full(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[5], values[7] = 1_000_000, 500  # f_files, f_favail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    finding = run_one("storage.inodes", root=root)
    assert finding.verdict == "failed"
    assert any("500 more files" in line for line in finding.evidence)


def test_a_disk_that_sets_no_number_of_files_passes(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    # procfs has no inodes to count; so has btrfs.
    monkeypatch.setenv("TMPDIR", "/proc")
    finding = run_one("storage.inodes", root=root)
    assert any(line == "TMPDIR (/proc): proc sets no number of files" for line in finding.evidence)


MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /home rw,nosuid shared:7 - nfs4 server:/export/home rw,vers=4.2,local_lock=none
41 27 0:51 / /scratch\\040two rw,noexec - lustre 10.0.0.1@o2ib:/work rw,flock,lazystatfs
42 27 0:52 / /tmp rw,relatime - ext4 /dev/vdb rw
43 27 0:53 / /tmp rw,nosuid - tmpfs tmpfs rw,size=1024k
44 27 0:54 / /data rw - fuse.wekafs weka rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "is_shared", "is_memory"),
    [
        ("/opt/x", "ext4", False, False),
        ("/home/me", "nfs4", True, False),
        ("/homes", "ext4", False, False),
        ("/scratch two/me", "lustre", True, False),
        ("/tmp/x", "tmpfs", False, True),
        ("/data", "fuse.wekafs", True, False),
    ],
)
def test_a_folder_lies_on_the_last_mount_above_it(
    folder: str, kind: str, is_shared: bool, is_memory: bool
) -> None:
    mount = mount_of(Path(folder), read_mounts(MOUNTS))
    assert (mount.kind, mount.is_shared, mount.is_memory) == (kind, is_shared, is_memory)


def test_a_mounts_options_are_its_own_and_its_file_systems() -> None:
    mount = mount_of(Path("/scratch two"), read_mounts(MOUNTS))
    assert mount.options >= {"noexec", "flock"}
    assert mount.source == "10.0.0.1@o2ib:/work"


KIB, GIB = 1 << 10, 1 << 30


@pytest.mark.parametrize(
    ("text", "space", "files"),
    [
        pytest.param(
            "Disk quotas for usr me (uid 1000):\n"
            "     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace\n"
            "        /scratch 5242880* 4194304 6291456 6d23h59m 120000       0 1000000       -\n"
            "uid 1000 is using default file quota setting\n",
            Usage(5 * GIB, 4 * GIB, 6 * GIB),
            Usage(120000, None, 1000000),
            id="lfs, over its soft limit",
        ),
        pytest.param(
            "  /lustre/fs1/with/a/rather/long/name\n"
            "                [1041408]  5242880 6291456       -     [0]       0       0       -\n",
            Usage(1041408 * KIB, 5 * GIB, 6 * GIB),
            Usage(0, None, None),
            id="lfs -q, wrapped, some servers away",
        ),
        pytest.param(
            "Disk quotas for user me (uid 1000): \n"
            "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
            "server:/export/home  491520  500000 1048576       0    1234       0       0       0\n",
            Usage(491520 * KIB, 500000 * KIB, GIB),
            Usage(1234, None, None),
            id="quota -w -p",
        ),
    ],
)
def test_the_tables_of_lfs_and_quota_are_read(text: str, space: Usage, files: Usage) -> None:
    assert list(parse_table(text)) == [(space, files)]


@pytest.mark.parametrize(
    "text",
    [
        "Disk quotas for user me (uid 1000): none\n",
        "quota: error while getting quota from server:/export/home for me (id 1000): Connection refused\n",
        "",
    ],
)
def test_a_user_without_quota_has_none(text: str) -> None:
    assert not list(parse_table(text))


MMLSQUOTA = (
    "mmlsquota::HEADER:version:reserved:reserved:filesystemName:quotaType:id:name:blockUsage:blockQuota:"
    "blockLimit:blockInDoubt:blockGrace:filesUsage:filesQuota:filesLimit:filesInDoubt:filesGrace:remarks:quota:"
    "defQuota:fid:filesetname:\n"
    "mmlsquota::0:1:::gpfs01:USR:1000:me:2097152:10485760:12582912:0:none:4000:0:500000:0:none:e:on:off:::\n"
)


def test_the_fields_of_mmlsquota_are_read_by_their_names() -> None:
    expected = (Usage(2 * GIB, 10 * GIB, 12 * GIB), Usage(4000, None, 500000))
    assert list(parse_mmlsquota(MMLSQUOTA)) == [expected]
    assert not list(parse_mmlsquota("mmlsquota: 6027-1234 There is no such file system.\n"))


def test_beegfs_counts_in_bytes_and_may_set_no_limit() -> None:
    text = "name,id,size,hard,files,hard\nme,1000,1073741824,10737418240,1000,unlimited\n"
    assert list(parse_beegfs(text)) == [(Usage(GIB, None, 10 * GIB), Usage(1000, None, None))]


@pytest.fixture
def lustre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROOT and HOME lie on Lustre, as the mounts tell."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text("27 1 0:9 / / rw - lustre 10.0.0.1@o2ib:/work rw,flock\n", encoding="utf-8")
    monkeypatch.setattr("envbuilder.doctor.quotas.TIMEOUT_S", 20)  # the tests' machine may be busy
    monkeypatch.setattr("envbuilder.doctor.disks._MOUNTS", mounts)


def lfs(kib: int, *, soft: int = 0, limit: int = 0, files: int = 10, most: int = 0) -> str:
    """A script that answers as `lfs quota -q -u` does, and for a group tells of no limit."""
    row = f"/scratch {kib} {soft} {limit} - {files} 0 {most} -"
    group = "/scratch 9 0 0 - 9 0 0 -"
    return f'test "$1 $2" = "quota -q" || exit 2; test "$3" = -g && echo "{group}" || echo "{row}"'


@pytest.mark.usefixtures("lustre")
@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (lfs(10 << 20, limit=11 << 20), "failed"),
        (lfs(10 << 20, files=990_000, most=1_000_000), "failed"),
        (lfs(10 << 20, soft=9 << 20, limit=900 << 20), "warning"),
        (lfs(10 << 20, limit=900 << 20, most=1_000_000), "ok"),
        (lfs(10 << 20), "ok"),
    ],
)
def test_a_quota_must_leave_room_for_an_env(
    root: Root, programs: Callable[..., Path], answer: str, verdict: str
) -> None:
    programs(lfs=answer)
    finding = run_one("storage.quota", root=root)
    assert finding.verdict == verdict
    assert any("user has 10.0 GiB of" in line for line in finding.evidence)
    assert any("group has" in line for line in finding.evidence)


@pytest.mark.usefixtures("lustre")
def test_a_program_for_quotas_that_hangs_is_left_alone(
    root: Root, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envbuilder.doctor.quotas.TIMEOUT_S", 0.3)
    programs(lfs="exec sleep 60")
    finding = run_one("storage.quota", root=root)
    assert finding.verdict == "ok"
    assert all(line.endswith("lfs gave no answer") for line in finding.evidence)


@pytest.mark.usefixtures("lustre")
def test_without_its_program_a_quota_is_not_looked_at(root: Root, programs: Callable[..., Path]) -> None:
    programs()
    finding = run_one("storage.quota", root=root)
    assert finding.verdict == "skipped"
    assert "lustre, lfs is not on this machine" in finding.summary


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HOME and TMPDIR of this test alone, and no variable that points a cache elsewhere."""
    for variable in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_caches_below_an_ordinary_home_pass(root: Root, own_caches: Path) -> None:
    finding = run_one("storage.caches", root=root)
    assert finding.verdict == "ok"
    assert any(
        line.startswith(f"TRITON_CACHE_DIR: {own_caches}/.triton/cache, on ") for line in finding.evidence
    )


@pytest.mark.usefixtures("own_caches")
def test_a_cache_that_takes_no_file_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/triton")
    finding = run_one("storage.caches", root=root)
    assert finding.verdict == "failed"
    assert 'export TRITON_CACHE_DIR="$(mktemp -d -p /tmp)"' in str(finding.remedy)


def test_a_cache_below_a_file_fails(root: Root, own_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_caches / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_caches / "file"))
    finding = run_one("storage.caches", root=root)
    assert finding.verdict == "failed"
    assert "TORCH_EXTENSIONS_DIR" in finding.summary
    assert any("torch_extensions, on" in line and "can't be written to" in line for line in finding.evidence)


@pytest.mark.usefixtures("own_caches", "lustre")
def test_caches_on_a_shared_disk_are_a_warning_in_a_job(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    finding = run_one("storage.caches", root=root)
    assert finding.verdict == "warning"
    assert "TRITON_CACHE_DIR" in str(finding.remedy)


@pytest.mark.usefixtures("own_caches", "lustre")
def test_caches_on_a_shared_disk_pass_where_nothing_trains(
    root: Root, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run_one("storage.caches", root=root).verdict == "ok"
