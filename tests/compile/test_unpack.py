"""Hostile archives are refused whole (promise: nothing of them is on the disk afterwards)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

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
        pytest.param([entry("evil-1.0/" + "d/" * 600 + "out")], id="over-long"),
        pytest.param([entry("evil-1.0/device", b"", type=tarfile.CHRTYPE)], id="device"),
        pytest.param([entry("evil-1.0/pipe", b"", type=tarfile.FIFOTYPE)], id="pipe"),
        pytest.param([link("evil-1.0/passwd", "/etc/passwd")], id="absolute link"),
        pytest.param([link("evil-1.0/up", "../..")], id="link out"),
        pytest.param([link("evil-1.0/up", "."), entry("evil-1.0/up/out")], id="file through a link"),
        pytest.param([link("evil-1.0/self", "self")], id="link to itself"),
        pytest.param([link("evil-1.0/hard", "../../etc/passwd", tarfile.LNKTYPE)], id="hard link out"),
        pytest.param([entry("evil-1.0/setup.py", b"other")], id="duplicate"),
        pytest.param([entry("evil-1.0/setup.py/below")], id="file as folder"),
        pytest.param([entry("second/setup.py")], id="two top folders"),
    ],
)
def test_a_hostile_member_is_refused_and_nothing_is_unpacked(tmp_path: Path, members: list[Member]) -> None:
    path = archive(tmp_path, GOOD, *members)
    with pytest.raises(IntegrityError, match="nothing of it was unpacked"):
        unpack_sdist(path, tmp_path / "place" / "tree")
    assert sorted(found.name for found in tmp_path.rglob("*") if not found.is_dir()) == [path.name]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"PK\x03\x04", lambda data: b""]
)
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = archive(tmp_path, GOOD, entry("evil-1.0/data", bytes(range(256)) * 400))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError, match="can't be read"):
        unpack_sdist(path, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


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
