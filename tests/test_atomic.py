from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envbuilder.atomic import FOLDER_MODE, make_folder, new_file, remove_leftovers, write_atomically, writing
from envbuilder.errors import MismatchError


@pytest.fixture(params=[0o000, 0o077], ids=["umask-000", "umask-077"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_and_bytes_arrive_and_replace_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "één\n")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("umask")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "er" / "file", "x")
    assert mode(tmp_path / "deep" / "er" / "file") == 0o640
    assert mode(tmp_path / "deep") & 0o777 == FOLDER_MODE & 0o777


@pytest.mark.usefixtures("umask")
def test_what_a_group_may_do_in_a_folder_it_may_in_the_folders_below(tmp_path: Path) -> None:
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir()
    shared.chmod(0o2770)
    private.mkdir()
    private.chmod(0o2750)
    for folder in (shared, private):
        make_folder(folder / "a" / "b")
    assert [mode(shared / "a"), mode(shared / "a" / "b")] == [0o2770, 0o2770]
    assert [mode(private / "a"), mode(private / "a" / "b")] == [0o2750, 0o2750]
    assert (shared / "a" / "b").stat().st_gid == shared.stat().st_gid


def test_a_folder_that_everybody_may_write_into_shares_nothing(tmp_path: Path) -> None:
    (tmp_path / "like-tmp").mkdir()
    (tmp_path / "like-tmp").chmod(0o1777)
    make_folder(tmp_path / "like-tmp" / "a")
    assert mode(tmp_path / "like-tmp" / "a") & 0o777 == 0o750


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail_half_way() -> None:
        with new_file(tmp_path / "a", size=3) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_at_the_path_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "a").symlink_to("target")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "new"


def test_a_full_disk_names_the_path_and_the_bytes_needed_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "from envbuilder.atomic import write_atomically\n"
        "from envbuilder.errors import EnvbuilderError\n"
        "from pathlib import Path\n"
        "import sys\n"
        "try:\n"
        "    write_atomically(Path(sys.argv[1]), bytes(300_000))\n"
        "except EnvbuilderError as error:\n"
        "    print(error.message)\n"
        "    sys.exit(error.exit_code)\n"
    )
    path = tmp_path / "big"
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert str(path) in done.stdout
    assert "300,000 bytes" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_place_where_one_may_not_write_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MismatchError, match="can't be written") as caught:
        write_atomically(tmp_path / "file" / "below", "x")
    assert "--root" in caught.value.remedy


def test_other_system_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path, 1):
        (tmp_path / "absent").read_bytes()


def test_a_folder_that_another_process_makes_and_takes_away_meanwhile_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    met: list[Path] = []

    def late(self: Path, target: Path) -> Path:
        if met:
            return rename(self, target)
        met.append(target)
        Path(target, "page").mkdir(parents=True)
        try:
            return rename(self, target)
        finally:
            shutil.rmtree(target)

    monkeypatch.setattr(Path, "rename", late)
    make_folder(tmp_path / "new")
    assert met == [tmp_path / "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_making_a_folder_that_is_there_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir(mode=0o700)
    make_folder(folder)
    assert mode(folder) == 0o700


def test_only_old_leftovers_of_killed_writers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (".a.x1.new", "a", ".hidden"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert (tmp_path / ".a.x1.new").exists()
    now = time.time()
    monkeypatch.setattr("envbuilder.atomic.time.time", lambda: now + 7200)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a"]


def test_a_new_link_to_an_old_file_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    os.utime(tmp_path / "old", (1_000_000_000, 1_000_000_000))
    os.link(tmp_path / "old", tmp_path / ".link.new")
    remove_leftovers(tmp_path)
    assert (tmp_path / ".link.new").exists()
