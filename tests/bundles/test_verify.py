"""`bundle verify`: every byte, every stray file, and no write."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from envbuilder.bundles import verify_bundle
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.hashing import open_plain
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.report import Quiet, Unit
from tests.bundles.samples import LONG_NAME, NAME, Sample

EVERY_KIND = [
    "files/top-2.0-py3-none-any.whl",
    "files/native-1.5.tar.gz",
    "tool/envbuilder-0.1-py3-none-any.whl",
    "tool/envbuilder_trainer-0.1-py3-none-any.whl",
    "models/tiny/config.json",
    f"models/tiny/{LONG_NAME}",
    "patches/native.patch",
    "recipe.toml",
    "start.py",
]


def found(root: Root) -> dict[str, str]:
    """What is wrong, by path."""
    with pytest.raises(IntegrityError) as caught:
        verify_bundle(root, NAME, Quiet())
    assert caught.value.remedy == f"envbuilder fetch recipes/{NAME}.toml --verify"
    return caught.value.context


def test_a_sound_bundle_is_read_to_the_last_byte(sample: Sample, bundle: Bundle) -> None:
    last: dict[str, tuple[int, int]] = {}

    class Progress(Quiet):
        def progress(self, label: str, done: int, total: int, unit: Unit, *_: object, **__: object) -> None:
            last[label] = (done, total)

    report = verify_bundle(sample.root, NAME, Progress())

    files = [path for path in bundle.path.rglob("*") if path.is_file() and path.name != "bundle.json"]
    assert report.files == len(files)
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert last == {"verify": (report.bytes, report.bytes)}


@pytest.mark.parametrize("path", EVERY_KIND)
def test_a_flipped_bit_is_found_wherever_it_is(sample: Sample, bundle: Bundle, path: str) -> None:
    content = bytearray((bundle.path / path).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.path / path).write_bytes(content)

    problems = found(sample.root)

    assert list(problems) == [path]
    assert problems[path].startswith("changed: expected sha256 ")


def test_everything_that_is_wrong_is_listed_at_once(sample: Sample, bundle: Bundle, tmp_path: Path) -> None:
    files = bundle.path / "files"
    os.truncate(files / "top-2.0-py3-none-any.whl", 10)
    (files / "leaf-1.0-py3-none-any.whl").unlink()
    (files / "quick-1.0-py3-none-any.whl").write_bytes(b"longer" * 1000)
    (files / "stray-1.0-py3-none-any.whl").write_bytes(b"")
    (bundle.path / "models/tiny/pytorch_model.bin").write_bytes(b"")
    # The right bytes, but through a link: who may write its target may change them.
    patch = bundle.path / "patches/native.patch"
    (tmp_path / "elsewhere").write_bytes(patch.read_bytes())
    patch.unlink()
    patch.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(bundle.path / "pipe")

    problems = {path: text.split(":")[0] for path, text in found(sample.root).items()}

    assert problems == {
        "files/leaf-1.0-py3-none-any.whl": "missing",
        "files/quick-1.0-py3-none-any.whl": "changed",
        "files/stray-1.0-py3-none-any.whl": "strange",
        "files/top-2.0-py3-none-any.whl": "truncated",
        "models/tiny/pytorch_model.bin": "strange",
        "patches/native.patch": "strange",
        "pipe": "strange",
    }


def test_a_folder_that_is_a_link_is_strange_and_what_should_be_in_it_missing(
    sample: Sample, bundle: Bundle, tmp_path: Path
) -> None:
    (bundle.path / "tool").rename(tmp_path / "tool")
    (bundle.path / "tool").symlink_to(tmp_path / "tool")

    problems = found(sample.root)

    assert problems["tool"] == "strange: a symbolic link"
    assert problems["tool/envbuilder-0.1-py3-none-any.whl"] == "missing"


def test_a_changed_lock_and_an_incomplete_bundle_are_refused_first(sample: Sample, bundle: Bundle) -> None:
    lock = bundle.path / f"pylock.{NAME}.toml"
    lock.write_text(lock.read_text() + "\n")
    with pytest.raises(IntegrityError, match=r"pylock.sample.toml"):
        verify_bundle(sample.root, NAME, Quiet())

    (bundle.path / "bundle.json").unlink()
    with pytest.raises(MismatchError, match="incomplete"):
        verify_bundle(sample.root, NAME, Quiet())


def test_what_a_fetch_is_bringing_is_counted_and_not_strange(sample: Sample, bundle: Bundle) -> None:
    (bundle.path / "files/.0123456789abcdef.new").write_bytes(b"half")
    assert verify_bundle(sample.root, NAME, Quiet()).leftovers == 1


@pytest.fixture
def read_only(bundle: Bundle) -> Iterator[Bundle]:
    paths = [bundle.path, *bundle.path.rglob("*")]
    for path in paths:
        path.chmod(0o550 if path.is_dir() else 0o440)
    yield bundle
    for path in paths:
        path.chmod(0o750 if path.is_dir() else 0o640)


def test_a_read_only_bundle_is_verified_and_nothing_is_written(sample: Sample, read_only: Bundle) -> None:
    def state() -> dict[str, tuple[int, int]]:
        # Root may write to a read-only folder: this tells it.
        found = [(path, path.lstat()) for path in sample.root.path.rglob("*")]
        return {str(path): (status.st_mtime_ns, status.st_ctime_ns) for path, status in found}

    before = state()
    verify_bundle(sample.root, NAME, Quiet())
    assert state() == before


def test_a_file_that_the_disk_no_longer_gives_is_listed(
    sample: Sample, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> FileIO:
        if path.name == "start.py":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_plain(path)

    # No file that every user may open fails to be read, so the disk's fault is made here.
    monkeypatch.setattr("envbuilder.hashing.open_plain", broken)
    assert found(sample.root) == {"start.py": f"can't be read: {os.strerror(errno.EIO)}"}
