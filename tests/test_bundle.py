from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from envbuilder.bundle import bundle_file, copy_verified, hash_file, open_bundle
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.recipe import TargetSpec
from envbuilder.target import target_for
from tests.fetch.bundles import NAME, PYTHON, Fetcher, lock_of
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_wheel

FETCH = f"envbuilder fetch recipes/{NAME}.toml"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    served = tmp_path / "served"
    served.mkdir()
    text = lock_of([make_wheel(served, "one", "1.0")])
    with IndexServer(served) as server, loopback_client() as client:
        return Fetcher(Root(tmp_path / "root"), server.url, client, text).fetch().bundle


def root_of(bundle: Bundle) -> Root:
    return Root(bundle.path.parent.parent)


def test_a_fetched_bundle_opens_with_its_lock(bundle: Bundle) -> None:
    opened = open_bundle(root_of(bundle), NAME)
    assert opened.lock.digest == bundle.record.lock_sha256
    assert [str(package.name) for package in opened.lock.pylock.packages] == ["one"]


def test_a_missing_bundle_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="does not exist") as caught:
        open_bundle(Root(tmp_path), NAME)
    assert caught.value.exit_code == 7
    assert caught.value.remedy == FETCH


def test_a_bundle_without_its_last_file_is_incomplete(bundle: Bundle) -> None:
    (bundle.path / "bundle.json").unlink()
    with pytest.raises(MismatchError, match="incomplete") as caught:
        open_bundle(root_of(bundle), NAME)
    assert caught.value.remedy == FETCH


@pytest.mark.parametrize("content", ["{}", "{"], ids=["empty", "torn"])
def test_a_damaged_record_is_refused(bundle: Bundle, content: str) -> None:
    (bundle.path / "bundle.json").write_text(content)
    with pytest.raises(IntegrityError, match="damaged"):
        open_bundle(root_of(bundle), NAME)


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_lock_changed_in_the_bundle_is_refused(bundle: Bundle, change: str) -> None:
    lock = bundle.path / f"pylock.{NAME}.toml"
    lock.unlink() if change == "remove" else lock.write_text("# another\n")
    with pytest.raises(IntegrityError, match="sha256 differs"):
        open_bundle(root_of(bundle), NAME)


def test_a_file_that_is_gone_from_the_bundle_is_named(bundle: Bundle) -> None:
    (file,) = bundle.lock.select(target_for(TargetSpec(), PYTHON))
    path = bundle_file(bundle, file)
    assert hash_file(path) == file.sha256
    path.unlink()
    with pytest.raises(MismatchError, match=file.filename):
        bundle_file(bundle, file)


def test_one_changed_byte_is_found_on_use_and_nothing_is_copied(bundle: Bundle, tmp_path: Path) -> None:
    path = next((bundle.path / "files").iterdir())
    good = path.read_bytes()
    sha256 = hashlib.sha256(good).hexdigest()
    copy_verified(path, sha256, len(good), tmp_path / "use" / "copy")
    assert (tmp_path / "use" / "copy").read_bytes() == good
    (tmp_path / "use" / "copy").unlink()

    bad = bytearray(good)
    bad[50] ^= 1
    path.unlink()
    path.write_bytes(bad)
    with pytest.raises(IntegrityError, match=path.name) as caught:
        copy_verified(path, sha256, len(good), tmp_path / "use" / "copy")
    assert caught.value.exit_code == 5
    assert caught.value.context == {
        "file": str(path),
        "expected": sha256,
        "got": hashlib.sha256(bad).hexdigest(),
    }
    assert caught.value.remedy == f"{FETCH} --verify"
    assert not list((tmp_path / "use").iterdir())
