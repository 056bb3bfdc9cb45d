"""Hostile archives are refused whole (promise: nothing of them is on the disk afterwards)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.compile import unpack
from envbuilder.compile.unpack import unpack_sdist
from envbuilder.errors import IntegrityError

Member = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"x", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    return entry(name, b"", type=kind, linkname=target)


def archive(folder: Path, *members: Member) -> Path:
    path = folder / "evil-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD = entry("evil-1.0/setup.py")


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([entry("evil-1.0/../../out")], id="dots"),
        pytest.param([entry("/tmp/out")], id="absolute"),
        pytest.param([entry("evil-1.0/src/../../../out")], id="dots later"),
        pytest.param([entry("evil-1.0/..")], id="dots alone"),
        pytest.param([entry("evil-1.0/./setup.py")], id="another spelling"),
        pytest.param([entry("evil-1.0//setup.py")], id="double slash"),
        pytest.param([entry("evil-1.0/" + "d/" * 600 + "out")], id="over-long"),
        pytest.param([entry("evil-1.0/" + "n" * 300)], id="over-long name"),
        pytest.param([entry("evil-1.0/" + "ü" * 130)], id="over-long name in bytes"),
        pytest.param([entry("evil-1.0/device", b"", type=tarfile.CHRTYPE)], id="device"),
        pytest.param([entry("evil-1.0/disk", b"", type=tarfile.BLKTYPE)], id="block device"),
        pytest.param([entry("evil-1.0/pipe", b"", type=tarfile.FIFOTYPE)], id="pipe"),
        pytest.param([link("evil-1.0/passwd", "/etc/passwd")], id="absolute link"),
        pytest.param([link("evil-1.0/up", "../..")], id="link out"),
        pytest.param([link("evil-1.0/up", "."), entry("evil-1.0/up/out")], id="file through a link"),
        pytest.param([link("evil-1.0/self", "self")], id="link to itself"),
        pytest.param([link("evil-1.0/a", "b"), link("evil-1.0/b", "a")], id="links in a circle"),
        pytest.param([link("evil-1.0/d/up", "..")], id="folder in itself"),
        pytest.param([link("evil-1.0/up", "d/../../.."), entry("evil-1.0/d/x")], id="link out by a folder"),
        pytest.param([link("evil-1.0/none", "nowhere")], id="link to nothing"),
        pytest.param([link("evil-1.0/setup.py", "other"), entry("evil-1.0/other")], id="duplicate link"),
        pytest.param([link("evil-1.0/hard", "../../etc/passwd", tarfile.LNKTYPE)], id="hard link out"),
        pytest.param([entry("evil-1.0/setup.py", b"other")], id="duplicate"),
        pytest.param([entry("evil-1.0/setup.py/below")], id="file as folder"),
        pytest.param([entry("evil-1.0/d/below"), entry("evil-1.0/d")], id="folder as file"),
        pytest.param([entry("second/setup.py")], id="two top folders"),
    ],
)
def test_a_hostile_member_is_refused_and_nothing_is_unpacked(tmp_path: Path, members: list[Member]) -> None:
    path = archive(tmp_path, GOOD, *members)
    with pytest.raises(IntegrityError, match="nothing of it was unpacked"):
        unpack_sdist(path, tmp_path / "place" / "tree")
    assert sorted(found.name for found in tmp_path.rglob("*") if not found.is_dir()) == [path.name]


def zeros(size: int) -> Member:
    """A file that is much larger than what is packed of it."""
    return entry("evil-1.0/zeros", bytes(size))


def many_links(depth: int, width: int) -> list[Member]:
    """Folders that are each linked many times into the one above: `width` ** `depth` files of a few."""
    members = [entry(f"evil-1.0/{depth}/file")]
    for level in range(depth):
        members += [link(f"evil-1.0/{level}/{number}", f"../{level + 1}") for number in range(width)]
    return members


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([zeros(2000)], "more than 1,000 bytes"),
        (
            [*[link(f"evil-1.0/{n}", "evil-1.0/zeros", tarfile.LNKTYPE) for n in range(40)], zeros(970)],
            "bytes",
        ),
        ([entry(f"evil-1.0/{number}") for number in range(120)], "more than 50 files"),
        (many_links(3, 6), "more than 50 files"),
        # Without any file, so that nothing but the looking would be without end.
        ([*many_links(6, 9)[1:], entry("evil-1.0/6/", b"", type=tarfile.DIRTYPE)], "more than 50 files"),
    ],
    ids=["large", "large by links", "many", "many by links", "endless by links"],
)
def test_a_bomb_is_refused_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[Member], message: str
) -> None:
    monkeypatch.setattr(unpack, "LARGEST", 1000)
    monkeypatch.setattr(unpack, "MOST_FILES", 50)
    path = archive(tmp_path, GOOD, *members)
    with pytest.raises(IntegrityError, match=message):
        unpack_sdist(path, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"PK\x03\x04", lambda data: b""]
)
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = archive(tmp_path, GOOD, entry("evil-1.0/data", bytes(range(256)) * 400))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError, match="can't be read"):
        unpack_sdist(path, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_links_to_folders_and_to_links_become_copies(tmp_path: Path) -> None:
    path = archive(
        tmp_path,
        entry("evil-1.0/src/a.cu", b"code"),
        entry("evil-1.0/src/deep/b.cu", b"more"),
        link("evil-1.0/src/c.cu", "a.cu"),
        link("evil-1.0/package/csrc", "../src"),
        link("evil-1.0/d.cu", "package.cu"),
        link("evil-1.0/package.cu", "src/c.cu"),
    )
    tree = unpack_sdist(path, tmp_path / "tree")
    assert {
        str(found.relative_to(tree)): found.read_bytes() for found in tree.rglob("*") if found.is_file()
    } == {
        "src/a.cu": b"code",
        "src/c.cu": b"code",
        "src/deep/b.cu": b"more",
        "package/csrc/a.cu": b"code",
        "package/csrc/c.cu": b"code",
        "package/csrc/deep/b.cu": b"more",
        "d.cu": b"code",
        "package.cu": b"code",
    }
    assert not [found for found in tree.rglob("*") if found.is_symlink()]


def test_a_good_sdist_is_unpacked_with_its_executable_files_and_links_as_copies(tmp_path: Path) -> None:
    path = archive(
        tmp_path,
        entry("evil-1.0/configure", b"#!/bin/sh\n", mode=0o755),
        entry("evil-1.0/src/a.cu", b"code", mode=0o600),
        link("evil-1.0/src/b.cu", "a.cu"),
        link("evil-1.0/c.cu", "evil-1.0/src/a.cu", tarfile.LNKTYPE),
    )
    tree = unpack_sdist(path, tmp_path / "tree")
    assert tree == tmp_path / "tree" / "evil-1.0"
    assert (tree / "configure").stat().st_mode & 0o777 == 0o755
    for name in ("src/a.cu", "src/b.cu", "c.cu"):
        assert (tree / name).read_bytes() == b"code"
        assert not (tree / name).is_symlink()
