"""`bundle gc`: what nothing needs goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from envbuilder.bundles import GcReport, collect_garbage, gc
from envbuilder.errors import MismatchError
from envbuilder.kept_images import marked_as_used, marker_of
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.bundles.samples import NAME, Sample, contents, sha256
from tests.conftest import Run
from tests.image.samples import put_image


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours have passed since all that a test has made: a ctime can't be set."""
    now = time.time
    monkeypatch.setattr("envbuilder.bundles.gc.time.time", lambda: now() + 7200)


def stored(root: Root, content: bytes) -> Path:
    path = root.store / sha256(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o440)
    os.utime(path, (1, 1))  # as old as one likes: only the ctime counts
    return path


def linked(root: Root, place: Path) -> Path:
    """The store's name of a file that lies in a bundle."""
    path = root.store / sha256(place.read_bytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(place, path)
    return path


def ctime(path: Path) -> float:
    return path.lstat().st_ctime


def collect(root: Root, *, dry_run: bool = False) -> GcReport:
    return collect_garbage(root, Quiet(), dry_run=dry_run)


@pytest.mark.usefixtures("later")
def test_stored_files_of_no_bundle_go_and_those_of_bundles_stay(sample: Sample, bundle: Bundle) -> None:
    orphan = stored(sample.root, b"of no bundle")
    held = [linked(sample.root, path) for path in sorted((bundle.path / "files").iterdir())]
    (sample.root.store / "README").write_text("not ours")
    before = contents(bundle.path)

    report = collect(sample.root)

    assert (report.removed, report.bytes_freed, report.kept) == ((orphan,), len(b"of no bundle"), ())
    assert not orphan.exists()
    assert all(path.exists() for path in held)
    assert (sample.root.store / "README").exists()
    assert contents(bundle.path) == before
    assert collect(sample.root).removed == ()


@pytest.mark.usefixtures("later")
def test_a_dry_run_says_the_same_and_removes_nothing(sample: Sample, bundle: Bundle) -> None:
    orphan = stored(sample.root, b"of no bundle")
    report = collect(sample.root, dry_run=True)
    assert orphan.exists()
    assert report.removed == collect(sample.root).removed == (orphan,)
    assert report.dry_run


def test_what_was_stored_or_linked_within_the_hour_stays(sample: Sample) -> None:
    # A fetch that is under way has stored it and not made its bundle yet; its mtime says nothing.
    stored(sample.root, b"of no bundle")
    assert collect(sample.root).removed == ()


def test_what_a_fetch_links_while_garbage_is_collected_stays(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = stored(sample.root, b"of no bundle")
    files = gc._files

    def a_fetch_comes(path: Path) -> list[os.stat_result]:
        os.link(path, sample.root.path / "linked")
        return files(path)

    # It was untouched for an hour when it was chosen; then the link gives it a new ctime.
    time.sleep(0.2)
    monkeypatch.setattr(gc, "_UNTOUCHED", 0.1)
    monkeypatch.setattr(gc, "_files", a_fetch_comes)
    assert collect(sample.root).removed == ()
    assert orphan.exists()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("link", [True, False])
def test_an_incomplete_bundle_keeps_what_its_lock_names_and_what_lies_in_it(
    sample: Sample, bundle: Bundle, link: bool
) -> None:
    (bundle.path / "bundle.json").unlink()
    files = bundle.path / "files"
    if link:
        # The first fetch of it: there is no lock yet.
        (bundle.path / f"pylock.{NAME}.toml").unlink()
        held = [linked(sample.root, files / "top-2.0-py3-none-any.whl")]
    else:
        # A file system without hard links: the store's files and the bundle's are two.
        held = [stored(sample.root, path.read_bytes()) for path in sorted(files.iterdir())]
    assert collect(sample.root).removed == ()
    assert all(path.exists() for path in held)


@pytest.mark.usefixtures("later")
def test_a_lock_of_another_schema_counts(sample: Sample) -> None:
    orphan = stored(sample.root, b"of an old bundle")
    old = sample.root.bundle("old")
    old.mkdir(parents=True)
    (old / "pylock.old.toml").write_text(f'[packages.wheels.hashes]\nsha256 = "{orphan.name}"\n')
    assert collect(sample.root).removed == ()


@pytest.mark.usefixtures("later")
def test_partial_files_leftovers_and_caches_of_deleted_bundles_go(sample: Sample, bundle: Bundle) -> None:
    root = sample.root
    garbage = [
        root.store / "partial" / f"{'0' * 64}.abc.part",
        root.store / "partial" / ".git-abc" / "packed.tar.gz",
        bundle.path / "files" / ".0123.new",
        root.path / "bundles" / f".{NAME}.abc.new" / "files" / "half.whl",
        root.path / "bundles" / f".{NAME}.abc.old" / "bundle.json",
        root.wheelhouse / "key" / ".x.whl.abc.new",
        root.cache / "fetch" / "deleted.json",
    ]
    kept = [root.cache / "fetch" / f"{NAME}.json", root.path / "runs/r/.mine.new", root.path / ".mine.new"]
    for path in garbage + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    before = contents(bundle.path).keys() - {"files/.0123.new"}

    report = collect(root)

    assert report.bytes_freed == 5 * len(garbage)
    assert [path for path in garbage if path.exists()] == []
    assert all(path.exists() for path in kept)
    assert contents(bundle.path).keys() == before
    assert (root.store / "partial").is_dir()


@pytest.mark.usefixtures("later")
def test_only_the_last_link_frees_bytes(sample: Sample) -> None:
    twice = stored(sample.root, b"abc")
    leftover = sample.root.path / "bundles" / ".x.abc.old" / "x.whl"
    leftover.parent.mkdir(parents=True)
    os.link(twice, leftover)
    elsewhere = stored(sample.root, b"linked from elsewhere")
    os.link(elsewhere, sample.root.path / "kept")

    for dry_run in (True, False):
        report = collect(sample.root, dry_run=dry_run)
        assert set(report.removed) == {twice, elsewhere, leftover.parent}
        assert report.bytes_freed == 3


@pytest.mark.usefixtures("later")
def test_no_link_is_followed_and_nothing_outside_root_is_touched(sample: Sample, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "store").mkdir(parents=True)
    (outside / "store" / ("0" * 64)).write_bytes(b"not ROOT's")
    (outside / ".x.new").write_bytes(b"not ROOT's")
    sample.root.path.mkdir()
    sample.root.store.symlink_to(outside / "store")
    sample.root.cache.symlink_to(outside)
    staging = sample.root.path / "bundles" / ".x.abc.new"
    staging.mkdir(parents=True)
    (staging / "link").symlink_to(outside)
    (sample.root.path / "bundles" / ".link.new").symlink_to(outside)

    report = collect(sample.root)

    assert set(report.removed) == {staging, sample.root.path / "bundles" / ".link.new"}
    assert len(contents(outside)) == 2


@pytest.mark.usefixtures("later")
def test_a_bundle_on_another_disk_keeps_what_it_names(sample: Sample, bundle: Bundle, tmp_path: Path) -> None:
    held = stored(sample.root, (bundle.path / "files/top-2.0-py3-none-any.whl").read_bytes())
    (sample.root.path / "bundles").rename(tmp_path / "bundles")
    (sample.root.path / "bundles").symlink_to(tmp_path / "bundles")
    collect(sample.root)
    assert held.exists()


@pytest.mark.usefixtures("later")
def test_what_may_not_be_removed_is_named_and_the_rest_goes_on(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted([stored(sample.root, b"one"), stored(sample.root, b"two")])
    unlink = Path.unlink

    def forbidden(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok)

    # As in a sticky folder with another user's file; a test that runs as root meets no such refusal.
    monkeypatch.setattr(Path, "unlink", forbidden)
    report = collect(sample.root)

    assert report.removed == (second,)
    assert [path for path, _ in report.kept] == [first]
    assert report.kept[0][1].startswith("Operation not permitted, owner ")
    assert report.bytes_freed == 3


@pytest.mark.usefixtures("later")
def test_where_a_bundles_lock_cannot_be_read_nothing_is_removed(sample: Sample) -> None:
    orphan = stored(sample.root, b"perhaps that bundle's")
    (sample.root.bundle("x") / "pylock.x.toml").mkdir(parents=True)  # not even root reads a folder's text
    with pytest.raises(MismatchError, match="nothing is removed"):
        collect(sample.root)
    assert orphan.exists()


def test_an_empty_root_has_no_garbage(tmp_path: Path) -> None:
    assert collect(Root(tmp_path / "none")).removed == ()


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@pytest.fixture
def superseded(root: Root) -> Path:
    """An image of 11 bytes that was used, and that another has superseded."""
    old = put_image(root, "a" * 64, b"older image")
    with marked_as_used(old):
        put_image(root, "b" * 64)
    return old


@pytest.mark.usefixtures("later")
def test_superseded_images_go_with_what_marks_them_and_their_sizes_are_told(
    root: Root, superseded: Path, run: Run
) -> None:
    stays = sorted(path for path in root.images.iterdir() if path.stem != superseded.stem)
    assert collect(root, dry_run=True).images == ((superseded, 11),)
    assert f"would be removed: {superseded}, 11 B" in run("--root", root.path, "bundle", "gc", "--dry-run")[1]
    report = collect(root)
    assert report.images == ((superseded, 11),)
    assert (report.removed, report.bytes_freed) == ((superseded, marker_of(superseded)), 11)
    assert sorted(root.images.iterdir()) == stays


def test_an_image_stays_for_an_hour_after_its_last_use(
    root: Root, superseded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = marker_of(superseded)
    while ctime(marker) < ctime(root.images / "tiny-lab.json") + 0.001:
        with marked_as_used(superseded):
            pass
    before = ctime(root.images / "tiny-lab.json")
    monkeypatch.setattr("envbuilder.bundles.gc.time.time", lambda: (before + ctime(marker)) / 2 + 3600)
    assert collect(root).removed == ()
    monkeypatch.setattr("envbuilder.bundles.gc.time.time", lambda: ctime(root.images) + 7200)
    assert collect(root).removed == (superseded, marker)


def test_an_image_stays_for_an_hour_after_it_was_superseded(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that has read the receipt before has not marked the image yet."""
    old, receipt = put_image(root, "a" * 64), root.images / "tiny-lab.json"
    before = ctime(old)
    put_image(root, "b" * 64)
    while ctime(receipt) < before + 0.001:  # the disk's clock has ticks
        put_image(root, "b" * 64)
    monkeypatch.setattr("envbuilder.bundles.gc.time.time", lambda: (before + ctime(receipt)) / 2 + 3600)
    assert collect(root).removed == ()
    monkeypatch.setattr("envbuilder.bundles.gc.time.time", lambda: ctime(receipt) + 7200)
    assert collect(root).removed == (old,)


@pytest.mark.usefixtures("later")
def test_an_image_that_counts_stays_whoever_uses_it_or_not(root: Root) -> None:
    put_image(root, "a" * 64)
    assert collect(root).removed == ()
    (root.images / "tiny-lab.json").unlink()
    assert collect(root).removed == ()


@pytest.mark.usefixtures("later")
def test_what_a_killed_install_left_of_an_image_goes(root: Root) -> None:
    put_image(root, "a" * 64)
    left = root.images / f".tiny-lab-{'b' * 12}.squashfs.abc.new"
    left.write_bytes(b"hsqs")
    assert collect(root).removed == (left,)
