"""A ROOT that two users of one group share. As root only: each step runs under a user id of its own."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.bundle import copy_verified
from envbuilder.errors import MismatchError
from envbuilder.store import Store

pytestmark = pytest.mark.lab

GROUP, ANN, BEN = 61_000, 61_001, 61_002
"""Ids that no account needs to have."""
BODY = b"body" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
SIZE = len(BODY)
LONG_AGO = 1_000_000_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as centres set one up for a project: setgid, the group may write."""
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
    root = tmp_path / "root"
    root.mkdir()
    os.chown(root, ANN, GROUP)
    root.chmod(0o2770)
    return root


def as_user(uid: int, work: Callable[[], object], *, umask: int = 0o077) -> None:
    """Does `work` in a process of user `uid`, whose own group is another; its failure is the test's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([GROUP])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(umask)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def whole(part: Path) -> None:
    part.write_bytes(BODY)


def interrupted(part: Path) -> None:
    part.write_bytes(BODY[:100])
    raise KeyboardInterrupt


def leave_partial(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.add(SHA256, SIZE, interrupted)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_one_user_stores_the_other_uses_and_adds_to(root: Path, umask: int) -> None:
    store = Store(root / "store")
    as_user(ANN, lambda: store.add(SHA256, SIZE, whole), umask=umask)
    for folder in (store.folder, store.folder / "partial"):
        assert (stat.S_IMODE(folder.stat().st_mode), folder.stat().st_gid) == (0o2770, GROUP)
    stored = store.path(SHA256).stat()
    assert (stat.S_IMODE(stored.st_mode), stored.st_uid, stored.st_gid) == (0o440, ANN, GROUP)

    other = b"other"
    digest = hashlib.sha256(other).hexdigest()

    def ben() -> None:
        assert store.has(SHA256, SIZE)
        copy_verified(store.path(SHA256), SHA256, SIZE, root / "bundles" / "ben")
        store.add(digest, len(other), lambda part: part.write_bytes(other) and None)
        store.tidy()

    as_user(BEN, ben, umask=umask)
    assert store.path(digest).stat().st_uid == BEN
    assert stat.S_IMODE((root / "bundles").stat().st_mode) == 0o2770


def test_another_users_partial_file_is_neither_read_nor_fatal(root: Path) -> None:
    store = Store(root / "store")
    as_user(ANN, lambda: leave_partial(store))

    def ben() -> None:
        def fill(part: Path) -> None:
            assert part.read_bytes() == b""
            whole(part)

        store.add(SHA256, SIZE, fill)

    as_user(BEN, ben)
    # In a folder that the group may write into, anybody may clear away what is stored by now.
    assert list((store.folder / "partial").iterdir()) == []


def test_nor_is_one_that_may_not_be_removed(root: Path) -> None:
    store = Store(root / "store")
    as_user(ANN, lambda: leave_partial(store))
    (theirs,) = (store.folder / "partial").iterdir()
    os.utime(theirs, (LONG_AGO, LONG_AGO))
    (store.folder / "partial").chmod(0o3770)  # sticky: each may remove their own only

    def ben() -> None:
        store.add(SHA256, SIZE, whole)
        store.tidy()

    as_user(BEN, ben)
    assert list((store.folder / "partial").iterdir()) == [theirs]
    assert store.path(SHA256).read_bytes() == BODY


def test_a_store_that_the_group_may_only_read_serves_what_it_has_and_says_so(
    tmp_path: Path, root: Path
) -> None:
    root.chmod(0o2750)
    store = Store(root / "store")
    as_user(ANN, lambda: store.add(SHA256, SIZE, whole))

    def ben() -> None:
        assert store.has(SHA256, SIZE)
        assert store.path(SHA256).read_bytes() == BODY
        store.tidy()
        with pytest.raises(MismatchError, match="can't be written"):
            store.add("0" * 64, 1, whole)

    as_user(BEN, ben)


def test_without_a_setgid_bit_the_group_is_the_parents_all_the_same(root: Path) -> None:
    root.chmod(0o770)
    as_user(ANN, lambda: make_folder(root / "a" / "b"))
    for folder in (root / "a", root / "a" / "b"):
        assert (stat.S_IMODE(folder.stat().st_mode), folder.stat().st_gid) == (0o2770, GROUP)


def test_either_user_may_replace_a_published_file(root: Path) -> None:
    as_user(ANN, lambda: write_atomically(root / "bundles" / "record", "ann"))
    as_user(BEN, lambda: write_atomically(root / "bundles" / "record", "ben"))
    record = root / "bundles" / "record"
    assert (record.read_text(), record.stat().st_uid, stat.S_IMODE(record.stat().st_mode)) == (
        "ben",
        BEN,
        0o640,
    )
    assert record.stat().st_gid == GROUP


def test_a_disk_that_is_full_on_the_way_keeps_no_partial_file(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from envbuilder.atomic import writing\n"
        "from envbuilder.errors import MismatchError\n"
        "from envbuilder.store import Store\n"
        "store = Store(Path(sys.argv[1]) / 'store')\n"
        "def fill(part):\n"
        "    with writing(part, 3_000_000):\n"
        "        part.write_bytes(bytes(3_000_000))\n"
        "try:\n"
        "    store.add('0' * 64, 3_000_000, fill)\n"
        "except MismatchError as error:\n"
        "    left = list((store.folder / 'partial').iterdir())\n"
        "    print(error.exit_code, error.context['bytes needed'], error.context['file'], len(left))\n"
    )
    mount = f'mount -t tmpfs -o size=1m,mode=750 tmpfs "{tmp_path}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    code, needed, file, left = done.stdout.split()
    assert (code, needed, left) == ("7", "3000000", "0")
    assert Path(file).parent == tmp_path / "store" / "partial"
