from __future__ import annotations

import base64
import csv
import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from envbuilder.bundle import hash_file
from envbuilder.compile.wheels.wheel_rewrite import rewrite_wheel
from envbuilder.errors import BuildError
from tests.lab.installers import install
from tests.lab.packages import make_wheel

INFO = "tool-1.0.dist-info"
NAME = "tool-1.0-py3-none-any.whl"
CONTENT = {
    "tool.py": b"import sys\n",
    "tool-1.0.data/scripts/run-tool": b"#!python\nprint('ran')\n",
    "other/data, with a comma.txt": b"data" * 1000,
    f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n",
    f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n",
    f"{INFO}/RECORD": b"not,what,it\nshould,be,\n",
}


def pack(
    path: Path,
    content: Mapping[str, bytes] = CONTENT,
    *,
    order: Sequence[str] = (),
    mode: int = 0o644,
    year: int = 2026,
    compression: int = zipfile.ZIP_DEFLATED,
    folders: bool = False,
) -> Path:
    """A wheel as some backend might pack it."""
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        if folders:
            archive.writestr(zipfile.ZipInfo("other/"), b"")
        for name in order or content:
            entry = zipfile.ZipInfo(name, (year, 5, 6, 7, 8, 10))
            executable = 0o111 & mode >> 2 if name.endswith("run-tool") else 0
            entry.external_attr = (stat.S_IFREG | mode | executable) << 16
            entry.compress_type = compression
            archive.writestr(entry, content[name])
    return path


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_same_content_gives_the_same_bytes_however_it_was_packed(tmp_path: Path) -> None:
    one = pack(tmp_path / "a" / NAME)
    other = pack(
        tmp_path / "b" / NAME,
        {**CONTENT, f"{INFO}/RECORD": b"", f"{INFO}/RECORD.jws": b"{}"},
        order=[*sorted(CONTENT, reverse=True), f"{INFO}/RECORD.jws"],
        mode=0o600,
        year=1999,
        compression=zipfile.ZIP_STORED,
        folders=True,
    )
    before = other.read_bytes()
    first = rewrite_wheel(one, tmp_path / "x", build_tag="1_a", sboms={"s.json": b"{}"})
    old = os.umask(0o077)
    try:
        second = rewrite_wheel(other, tmp_path / "y", build_tag="1_a", sboms={"s.json": b"{}"})
    finally:
        os.umask(old)
    assert first.name == second.name == "tool-1.0-1_a-py3-none-any.whl"
    assert hash_file(first) == hash_file(second)
    assert other.read_bytes() == before
    assert rewrite_wheel(first, tmp_path / "z").read_bytes() == first.read_bytes()


def test_other_content_gives_other_bytes(tmp_path: Path) -> None:
    one = rewrite_wheel(pack(tmp_path / "a" / NAME), tmp_path / "x")
    changed = {**CONTENT, "tool.py": b"import os\n"}
    assert hash_file(one) != hash_file(rewrite_wheel(pack(tmp_path / "b" / NAME, changed), tmp_path / "y"))


def test_nothing_of_the_content_is_lost_and_record_has_all_of_it(tmp_path: Path) -> None:
    wheel = rewrite_wheel(
        pack(tmp_path / NAME), tmp_path / "new", build_tag="1_torch2.11.0_cu130", sboms={"s.json": b"{}"}
    )
    found = members(wheel)
    rows = list(csv.reader(found[f"{INFO}/RECORD"].decode().splitlines()))
    for name, digest, size in rows[:-1]:
        made = base64.urlsafe_b64encode(hashlib.sha256(found[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={made}", str(len(found[name])))
    assert [row[0] for row in rows] == list(found)
    assert rows[-1] == [f"{INFO}/RECORD", "", ""]
    changed = {f"{INFO}/RECORD", f"{INFO}/WHEEL"}
    assert {name: data for name, data in found.items() if name not in changed} == {
        **{name: data for name, data in CONTENT.items() if name not in changed},
        f"{INFO}/sboms/s.json": b"{}",
    }
    text = found[f"{INFO}/WHEEL"].decode()
    assert text.splitlines()[-2:] == ["Tag: py3-none-any", "Build: 1_torch2.11.0_cu130"]
    assert parse_wheel_filename(wheel.name)[2] == (1, "_torch2.11.0_cu130")


def test_members_have_fixed_times_and_modes_and_metadata_comes_last(tmp_path: Path) -> None:
    wheel = rewrite_wheel(pack(tmp_path / NAME, mode=0o640), tmp_path / "new")
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    modes = {entry.filename: entry.external_attr >> 16 for entry in entries}
    assert modes.pop("tool-1.0.data/scripts/run-tool") == stat.S_IFREG | 0o755
    assert set(modes.values()) == {stat.S_IFREG | 0o644}
    names = [entry.filename for entry in entries]
    assert names == sorted(names, key=lambda name: (name.startswith(INFO), name.endswith("RECORD"), name))
    assert wheel.stat().st_mode & 0o777 == 0o640


def test_a_build_tag_takes_the_place_of_another_and_none_keeps_it(tmp_path: Path) -> None:
    text = CONTENT[f"{INFO}/WHEEL"].strip().replace(b"\n", b"\r\n") + b"\r\nBuild: 7\r\n"
    given = pack(tmp_path / "tool-1.0-7-py3-none-any.whl", {**CONTENT, f"{INFO}/WHEEL": text})
    kept = rewrite_wheel(given, tmp_path / "kept")
    assert kept.name == given.name
    assert members(kept)[f"{INFO}/WHEEL"].endswith(b"\nBuild: 7\n")
    tagged = rewrite_wheel(given, tmp_path / "tagged", build_tag="1_b")
    assert tagged.name == "tool-1.0-1_b-py3-none-any.whl"
    assert members(tagged)[f"{INFO}/WHEEL"].count(b"Build:") == 1
    assert b"\r" not in members(tagged)[f"{INFO}/WHEEL"]


def test_a_bill_of_the_backends_own_stays_unless_it_has_the_same_name(tmp_path: Path) -> None:
    own = {f"{INFO}/sboms/theirs.json": b"1", f"{INFO}/sboms/ours.json": b"2"}
    given = pack(tmp_path / NAME, {**CONTENT, **own})
    found = members(rewrite_wheel(given, tmp_path / "new", sboms={"ours.json": b"3"}))
    assert {name: data for name, data in found.items() if "/sboms/" in name} == {
        f"{INFO}/sboms/theirs.json": b"1",
        f"{INFO}/sboms/ours.json": b"3",
    }


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_pip_and_uv_install_it_with_its_program(tmp_path: Path, installer: str) -> None:
    wheel = rewrite_wheel(pack(tmp_path / NAME), tmp_path / "new", build_tag="1_a", sboms={"s.json": b"{}"})
    install(installer, tmp_path / "there", wheel)
    done = subprocess.run([tmp_path / "there/bin/run-tool"], capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n"
    assert (tmp_path / "there" / INFO / "sboms/s.json").read_bytes() == b"{}"


def test_the_wheel_tool_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    wheel = rewrite_wheel(make_wheel(tmp_path, "plain", "1.0"), tmp_path / "new", build_tag="1_a")
    command = [sys.executable, "-m", "wheel", "unpack", "--dest", str(tmp_path / "out"), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "out/plain-1.0/plain.py").is_file()


def without(name: str) -> dict[str, bytes]:
    return {path: data for path, data in CONTENT.items() if path != name}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tool.whl", CONTENT, "it has a wrong name"),
        (NAME, without(f"{INFO}/WHEEL"), "it has no WHEEL file, or more than one"),
        (NAME, {**CONTENT, "b-2.dist-info/WHEEL": b""}, "it has no WHEEL file, or more than one"),
        ("tool-2.0-py3-none-any.whl", CONTENT, r"its metadata is that of tool-1\.0\.dist-info"),
        ("else-1.0-py3-none-any.whl", CONTENT, r"its metadata is that of tool-1\.0\.dist-info"),
        (NAME, {**without(f"{INFO}/WHEEL"), "tool-x.dist-info/WHEEL": b""}, "its metadata is that of tool-x"),
        (NAME, {**CONTENT, "../up.py": b""}, r"\.\./up\.py leads out of it"),
        (NAME, {**CONTENT, "/up.py": b""}, "/up.py leads out of it"),
        (NAME, {**CONTENT, f"{INFO}/WHEEL": b"\xff"}, "it is damaged"),
    ],
)
def test_what_is_no_wheel_is_refused(
    tmp_path: Path, name: str, content: Mapping[str, bytes], why: str
) -> None:
    with pytest.raises(BuildError, match=f"is not a wheel: {why}") as caught:
        rewrite_wheel(pack(tmp_path / name, content), tmp_path / "new")
    assert caught.value.remedy
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_links_and_doubled_members_are_refused(tmp_path: Path) -> None:
    linked, doubled = pack(tmp_path / "a" / NAME), pack(tmp_path / "b" / NAME)
    with zipfile.ZipFile(linked, "a") as archive:
        entry = zipfile.ZipInfo("tool/link.py")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with zipfile.ZipFile(doubled, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("tool.py", b"other")
    with pytest.raises(BuildError, match=r"tool/link\.py is a link"):
        rewrite_wheel(linked, tmp_path / "new")
    with pytest.raises(BuildError, match=r"it holds tool\.py twice"):
        rewrite_wheel(doubled, tmp_path / "new")


@pytest.mark.parametrize("damage", ["no archive", "cut off", "other bytes"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    wheel = pack(tmp_path / NAME, compression=zipfile.ZIP_STORED)
    data = wheel.read_bytes()
    broken = {
        "no archive": b"text",
        "cut off": data[:-40],
        "other bytes": data.replace(b"import", b"!mport", 1),
    }
    wheel.write_bytes(broken[damage])
    with pytest.raises(BuildError, match="it is damaged"):
        rewrite_wheel(wheel, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize("tag", ["a1", "1-2", ""])
def test_what_is_no_build_tag_is_a_mistake_of_the_caller(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ValueError, match="is not a build tag"):
        rewrite_wheel(pack(tmp_path / NAME), tmp_path / "new", build_tag=tag)


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_a_bill_has_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a file name"):
        rewrite_wheel(pack(tmp_path / NAME), tmp_path / "new", sboms={name: b""})
