"""`bundle pack`: one file, the same for everybody, or none."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from envbuilder.bundle import open_bundle
from envbuilder.bundles import pack_bundle
from envbuilder.bundles.unpack import header
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.bundles.samples import NAME, Sample, contents


def test_the_same_bundle_gives_the_same_bytes_whatever_the_time_the_modes_and_the_umask(
    sample: Sample, tmp_path: Path
) -> None:
    first = pack_bundle(sample.make(), tmp_path, Quiet())
    other = Sample(Root(tmp_path / "other"))
    before = os.umask(0o077)
    try:
        bundle = other.make()
        for path in bundle.path.rglob("*"):
            os.utime(path, (1, 1))
        second = pack_bundle(bundle, tmp_path / "second.tar", Quiet())
    finally:
        os.umask(before)

    assert first.archive == tmp_path / f"{NAME}.tar"
    assert first.archive.read_bytes() == second.archive.read_bytes()
    assert first.manifest_sha256 == second.manifest_sha256
    assert second.archive.stat().st_mode & 0o777 == 0o640


def test_stock_tools_read_the_archive(bundle: Bundle, tmp_path: Path) -> None:
    report = pack_bundle(bundle, tmp_path, Quiet())

    with tarfile.open(report.archive) as archive:
        members = archive.getmembers()
        packed = {
            member.name: content.read() for member in members if (content := archive.extractfile(member))
        }
    assert [member.name for member in members][:2] == ["unpack.py", "manifest.json"]
    assert members[-1].name == f"{NAME}/bundle.json"
    assert {(member.mode, member.mtime, member.uid, member.gid) for member in members} == {(0o644, 0, 0, 0)}
    assert {f"{NAME}/{path}": data for path, data in contents(bundle.path).items()} == {
        name: data for name, data in packed.items() if "/" in name
    }
    assert hashlib.sha256(packed["manifest.json"]).hexdigest() == report.manifest_sha256
    assert report.bytes == report.archive.stat().st_size

    (tmp_path / "out").mkdir()
    unpacked = subprocess.run(
        ["tar", "-xf", report.archive, "-C", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert (unpacked.returncode, unpacked.stderr) == (0, "")
    assert contents(tmp_path / "out" / NAME) == contents(bundle.path)


def test_a_file_of_more_than_8_gib_gets_a_header_that_stock_tools_read() -> None:
    block = header("sample/models/big", 20 << 30)
    member = tarfile.TarInfo.frombuf(block[1024:], "utf-8", "strict")
    assert (len(block), member.name) == (1536, "sample/models/big")
    assert b"20 size=21474836480\n" in block


@pytest.mark.parametrize(
    "path",
    ["files/top-2.0-py3-none-any.whl", "models/tiny/config.json", "tool/envbuilder-0.1-py3-none-any.whl"],
)
@pytest.mark.parametrize("change", ["flip", "grow", "truncate", "remove", "link"])
def test_what_is_not_as_locked_is_not_packed(bundle: Bundle, tmp_path: Path, path: str, change: str) -> None:
    file = bundle.path / path
    content = file.read_bytes()
    file.unlink()
    if change == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif change != "remove":
        file.write_bytes(
            {"flip": bytes([content[0] ^ 1]) + content[1:], "grow": content + b"x", "truncate": content[:-1]}[
                change
            ]
        )

    with pytest.raises(IntegrityError) as caught:
        pack_bundle(bundle, tmp_path / "out" / "x.tar", Quiet())
    assert caught.value.context["file"] == str(file)
    assert list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*")) == []


def test_a_record_that_was_replaced_since_the_bundle_was_opened_is_not_packed(
    bundle: Bundle, tmp_path: Path
) -> None:
    record = bundle.path / "bundle.json"
    record.write_text(record.read_text().replace('"3.12"', '"3.11"'))
    with pytest.raises(IntegrityError, match=r"bundle\.json"):
        pack_bundle(bundle, tmp_path, Quiet())


def test_files_that_no_lock_names_stay_behind(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "files/.secret").write_text("token")
    report = pack_bundle(bundle, tmp_path, Quiet())
    assert b".secret" not in report.archive.read_bytes()


def pack_with_a_small_disk(root: Path, archive: Path) -> None:
    """Exits with the error's code, and says what it was."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        pack_bundle(open_bundle(Root(root), NAME), archive, Quiet())
    except MismatchError as error:
        Path(f"{archive}.error").write_text(f"{error.message} {error.context['bytes needed']}")
        sys.exit(error.exit_code)


def test_without_room_there_is_a_typed_error_and_no_half_archive(
    sample: Sample, bundle: Bundle, tmp_path: Path
) -> None:
    archive = tmp_path / "out" / "x.tar"
    archive.parent.mkdir()
    process = multiprocessing.get_context("forkserver").Process(
        target=pack_with_a_small_disk, args=(sample.root.path, archive)
    )
    process.start()
    process.join()

    assert process.exitcode == 7
    assert [path.name for path in archive.parent.iterdir()] == ["x.tar.error"]
    assert "There is no room for" in (archive.parent / "x.tar.error").read_text()


def test_what_a_killed_pack_of_this_archive_left_is_removed_once_it_is_old(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f".{NAME}.tar.abc.new").write_bytes(b"half")
    (tmp_path / ".other.new").write_bytes(b"somebody's")
    pack_bundle(bundle, tmp_path, Quiet())
    assert (tmp_path / f".{NAME}.tar.abc.new").exists()

    monkeypatch.setattr("envbuilder.bundles.pack._ABANDONED", -1.0)
    pack_bundle(bundle, tmp_path, Quiet())
    assert not (tmp_path / f".{NAME}.tar.abc.new").exists()
    assert (tmp_path / ".other.new").exists()
