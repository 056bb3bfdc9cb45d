"""publish and use between users of one group. As root only: each step runs under a user id of its own.

The accounts are in this test's own passwd and group files, which its processes alone see in the places of the
machine's: in a mount namespace each.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import envbuilder
from envbuilder import node_folder
from envbuilder.env_image import env_receipt, usable_env
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.image.make import make_image
from envbuilder.install import install_env
from envbuilder.kept_images import marker_of, published_version
from envbuilder.paths import Root
from envbuilder.report import Quiet, Unit
from envbuilder.sharing import PublishReport, open_shared_folder, publish, use_published
from envbuilder.sharing.shared_folder import CURRENT
from tests.lab.images import need_fuse
from tests.sharing.published import MINOR, NAME, make_root, published

pytestmark = pytest.mark.lab

GROUP, ANN, BEN, CYD = 61_000, 61_001, 61_002, 61_003
PASSWD = "".join(
    f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in (("ann", ANN), ("ben", BEN), ("cyd", CYD))
)
GROUPS = f"project:x:{GROUP}:ann,ben\nann:x:{ANN}:\nben:x:{BEN}:\ncyd:x:{CYD}:\n"
SYSTEM_PYTHON = Path("/usr/bin/python3")
"""This process's own lies perhaps in a home of root's."""
CLONE_NEWNS = 0x00020000


@pytest.fixture(scope="module", autouse=True)
def modules_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Does it all once as root: what is imported only when it is needed can't be read by the others."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "shared").mkdir()
    root = make_root(folder, python=SYSTEM_PYTHON)
    published(root, folder / "shared")
    take(folder / "shared", folder / "mine")


@pytest.fixture
def top() -> Iterator[Path]:
    """A folder that all users come to, as pytest's own is root's alone; the accounts, and a home for each."""
    folder = Path(tempfile.mkdtemp(prefix="sharing-lab-"))
    folder.chmod(0o755)
    texts = {"passwd": "root:x:0:0:root:/root:/bin/sh\n" + PASSWD, "group": "root:x:0:\n" + GROUPS}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)
    for uid in (ANN, BEN, CYD):
        home(folder, uid).mkdir(mode=0o700)
        os.chown(home(folder, uid), uid, uid)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared(top: Path) -> Path:
    """The project's folder, as a centre's support sets it up: setgid, the group may write, others nothing."""
    folder = top / "shared"
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2770)
    return folder


def as_user(
    top: Path,
    uid: int,
    work: Callable[[], object],
    *,
    groups: Sequence[int] = (GROUP,),
    umask: int = 0o077,
    ends_with: int = 0,
) -> None:
    """Does `work` in a process of user `uid`, whose own group is another; its failure is the test's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            for name in ("passwd", "group"):
                subprocess.run(["mount", "--bind", top / name, f"/etc/{name}"], check=True)
            os.setgroups(list(groups))
            os.setgid(uid)
            os.setuid(uid)
            os.umask(umask)
            work()
            code = 0
        except BaseException as error:
            traceback.print_exc()
            print(getattr(error, "context", ""), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == ends_with


def home(top: Path, uid: int) -> Path:
    return top / str(uid)


def take(shared: Path, root: Path) -> Path:
    """Uses what is published, as the command does; the env's folder."""
    used = use_published(
        open_shared_folder(shared), NAME, root=Root(root), python=SYSTEM_PYTHON, reporter=Quiet()
    )
    return install_env(used.recipe, used.bundle, root=Root(root), python=used.python, reporter=Quiet()).path


def ann_publishes(top: Path, shared: Path) -> Path:
    """Under umask 077, from her home, which nobody else may enter; the version's folder."""

    def work() -> None:
        published(make_root(home(top, ANN) / "work", python=SYSTEM_PYTHON), shared)

    as_user(top, ANN, work)
    (version,) = (path for path in (shared / NAME).iterdir() if path.name != CURRENT)
    return version


def test_the_second_user_has_an_env_that_neither_compiles_nor_reads_the_firsts_home(
    top: Path, shared: Path
) -> None:
    version = ann_publishes(top, shared)
    below = [version, *version.rglob("*")]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in below} == {(ANN, GROUP)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in below} == {0o2750, 0o440}
    assert stat.S_IMODE((shared / NAME).stat().st_mode) == 0o2770
    assert stat.S_IMODE((shared / NAME / CURRENT).stat().st_mode) == 0o640

    def ben() -> None:
        env = take(shared, home(top, BEN) / "root")
        subprocess.run([env / "bin/python", "-c", "import one, built"], check=True)

    as_user(top, BEN, ben)
    env = home(top, BEN) / f"root/envs/{NAME}"
    assert (env / f"lib/python{MINOR}/site-packages/one.py").stat().st_uid == BEN
    wheel = version / f"bundles/{NAME}/files/one-1.0-py3-none-any.whl"
    assert (home(top, BEN) / f"root/bundles/{NAME}/files" / wheel.name).samefile(wheel)


def test_a_flipped_byte_is_found_and_its_owner_named(top: Path, shared: Path) -> None:
    wheel = ann_publishes(top, shared) / f"bundles/{NAME}/files/one-1.0-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[10] ^= 1
    wheel.write_bytes(bytes(content))

    def ben() -> None:
        with pytest.raises(IntegrityError) as caught:
            take(shared, home(top, BEN) / "root")
        assert caught.value.remedy == f"Ask ann for: envbuilder publish {NAME} --to {shared}"

    as_user(top, BEN, ben)


def test_one_outside_the_group_is_told_which_group_it_takes(top: Path, shared: Path) -> None:
    ann_publishes(top, shared)

    def cyd() -> None:
        with pytest.raises(MismatchError, match="for the group project, and you are not in it") as caught:
            take(shared, home(top, CYD) / "root")
        assert "id -Gn" in caught.value.remedy
        with pytest.raises(MismatchError, match="you are not in it"):
            publish(Root(home(top, CYD) / "root"), NAME, open_shared_folder(shared), Quiet())

    as_user(top, CYD, cyd, groups=())


def test_one_who_joined_the_group_meanwhile_is_told_to_log_in_again(top: Path, shared: Path) -> None:
    ann_publishes(top, shared)

    def ben() -> None:
        with pytest.raises(MismatchError) as caught:
            take(shared, home(top, BEN) / "root")
        assert caught.value.remedy == "Log in again, or: newgrp project"

    as_user(top, BEN, ben, groups=())


def test_what_someone_outside_the_group_owns_is_refused(top: Path, shared: Path) -> None:
    version = ann_publishes(top, shared)
    os.chown(version / f"bundles/{NAME}/start.py", CYD, GROUP)

    def ben() -> None:
        with pytest.raises(MismatchError, match="is cyd's, who is not in the group project"):
            take(shared, home(top, BEN) / "root")

    as_user(top, BEN, ben)


def test_what_another_group_or_everybody_may_write_to_is_refused(top: Path, shared: Path) -> None:
    files = ann_publishes(top, shared) / f"bundles/{NAME}/files"

    def ben_is_refused(sentence: str) -> None:
        def ben() -> None:
            with pytest.raises(MismatchError, match=sentence):
                take(shared, home(top, BEN) / "root")

        as_user(top, BEN, ben)

    os.chown(files, ANN, CYD)
    files.chmod(0o2775)
    ben_is_refused("The group cyd may write to")
    os.chown(files, ANN, GROUP)
    files.chmod(0o2757)
    ben_is_refused("Everybody may write to")


def test_either_member_publishes_in_the_place_of_the_others_and_breaks_nobodys_env(
    top: Path, shared: Path
) -> None:
    anns = ann_publishes(top, shared)
    os.utime(anns, (1_000_000_000, 1_000_000_000))
    for folder in anns.rglob("*"):
        os.utime(folder, (1_000_000_000, 1_000_000_000))

    def ben() -> None:
        take(shared, home(top, BEN) / "used")
        report: PublishReport = published(
            make_root(home(top, BEN) / "work", python=SYSTEM_PYTHON), shared, prune=True
        )
        assert report.removed == ()  # what is hers, she alone may remove

    as_user(top, BEN, ben)
    assert (home(top, BEN) / f"used/bundles/{NAME}").resolve().is_relative_to(anns)

    def ann() -> None:
        mine = home(top, ANN) / "used"
        take(shared, mine)
        assert Root(mine).bundle(NAME).resolve().stat().st_uid == BEN

    as_user(top, ANN, ann)


def keep_as_image(root: Root) -> None:
    """Puts an image into the place of the env's folder, as `install --image` leaves ROOT."""
    receipt, _ = env_receipt(root, NAME)
    scratch = root.path / "env"
    root.env(NAME).rename(scratch)
    make_image(scratch, receipt, root=root, reporter=Quiet())
    shutil.rmtree(scratch)
    (root.path / "env.squashfs").unlink()


def test_an_env_that_is_an_image_is_mounted_by_the_second_user_where_the_first_has_published_it(
    top: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_fuse()
    # This process's interpreter and source tree are perhaps nothing for the others.
    tool = top / "tool/envbuilder"
    tool.mkdir(parents=True)
    for name in ("__init__", "env_image_enter", "sandbox_root"):
        shutil.copy(Path(envbuilder.__file__).with_name(f"{name}.py"), tool)
    for path in (top / "tool", *(top / "tool").rglob("*")):
        path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(SYSTEM_PYTHON))
    monkeypatch.setattr(envbuilder, "__file__", str(tool / "__init__.py"))
    monkeypatch.setattr(node_folder, "NODE_FOLDERS", home(top, BEN))

    def ann() -> None:
        root = make_root(home(top, ANN) / "work", python=SYSTEM_PYTHON)
        keep_as_image(root)
        published(root, shared)

    def ben() -> None:
        root = Root(home(top, BEN) / "root")
        used = use_published(open_shared_folder(shared), NAME, root=root, python=None, reporter=Quiet())
        assert used.image is not None
        assert used.image.path.stat().st_uid == ANN
        assert not root.env(NAME).exists()
        with usable_env(root, NAME, used.image, Quiet()) as env:
            assert env.launcher, "it is mounted"
            subprocess.run([*env.python, "-c", "import one, built"], check=True)
        assert marker_of(used.image.path).stat().st_uid == BEN
        assert marker_of(published_version(used.image.path)).stat().st_gid == GROUP

    as_user(top, ANN, ann)
    images = [path for path in shared.rglob("*") if path.parent.name == "images"]
    assert {path.suffix for path in images} == {".squashfs", ".json"}
    assert {(path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) for path in images} == {(GROUP, 0o440)}
    as_user(top, BEN, ben)


class Killed(Quiet):
    """Ends the process as the first bytes are told of."""

    def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_publisher_who_is_killed_leaves_the_version_before(top: Path, shared: Path) -> None:
    version = ann_publishes(top, shared)
    root = Root(home(top, ANN) / "work/root")
    as_user(
        top,
        ANN,
        lambda: publish(root, NAME, open_shared_folder(shared), Killed()),
        ends_with=-signal.SIGKILL,
    )
    assert len(list((shared / NAME).iterdir())) == 3  # the version, the pointer, and what is not seen

    def ben() -> None:
        mine = home(top, BEN) / "root"
        take(shared, mine)
        assert Root(mine).bundle(NAME).resolve().is_relative_to(version)

    as_user(top, BEN, ben)
