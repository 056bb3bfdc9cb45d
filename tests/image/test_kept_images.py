"""Which images ROOT keeps, which is the same as one that would be made, and how use is told to others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from envbuilder import kept_images
from envbuilder.env_image import find_image
from envbuilder.image.make import find_same
from envbuilder.kept_images import kept_images as images_of
from envbuilder.kept_images import marked_as_used, marker_of, superseded_at
from envbuilder.paths import Root
from tests.conftest import Run
from tests.image.samples import ENV, put_image

OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def test_the_image_that_the_receipt_names_counts_and_older_ones_are_superseded(root: Root) -> None:
    old, new = put_image(root, OLD, b"older image"), put_image(root, NEW)
    os.utime(old, (1_000_000_000, 1_000_000_000))
    (root.images / "notes.squashfs").touch()
    first, second = images_of(root)
    assert (first.path, first.recipe, first.digest, first.size) == (old, "tiny-lab", OLD[:12], 11)
    assert (first.made_at, first.superseded) == ("2001-09-09T01:46:40+00:00", True)
    assert (second.path, second.superseded) == (new, False)


def test_status_lists_them_with_size_digest_and_date(root: Root, run: Run) -> None:
    old, new = put_image(root, OLD, b"older image"), put_image(root, NEW)
    code, out, _ = run("--json", "--root", root.path, "status")
    assert code == 0
    listed = json.loads(out)["images"]
    assert [(one["path"], one["size"], one["digest"]) for one in listed] == [
        (str(old), 11, OLD[:12]),
        (str(new), 4, NEW[:12]),
    ]
    code, out, _ = run("--root", root.path, "status")
    first, second = (line for line in out.splitlines() if ".squashfs" in line)
    assert f"11 B, sha256 {OLD[:12]}…, {listed[0]['made_at']}; superseded" in first
    assert "superseded" not in second


@pytest.mark.parametrize("receipt", [None, "{}"])
def test_without_a_receipt_that_names_another_none_is_superseded(root: Root, receipt: str | None) -> None:
    path = put_image(root, OLD)
    (root.images / "tiny-lab.json").unlink()
    if receipt is not None:
        (root.images / "tiny-lab.json").write_text(receipt)
    assert superseded_at(path) is None
    assert [image.superseded for image in images_of(root)] == [False]


def test_an_image_in_use_is_marked_at_once_and_again_and_again(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_images, "_EVERY_S", 0.001)
    path = put_image(root, OLD)
    with marked_as_used(path):
        assert marker_of(path).stat().st_mode & 0o777 == 0o660
        for _ in range(3):
            os.utime(marker_of(path), (0, 0))
            while marker_of(path).stat().st_mtime == 0:
                pass
    os.utime(marker_of(path), (0, 0))
    with marked_as_used(path):
        assert marker_of(path).stat().st_mtime > 0


def test_who_may_not_write_there_uses_it_all_the_same() -> None:
    with marked_as_used(Path("/sys/tiny-lab.squashfs")):  # not even root may
        pass
    assert not Path("/sys/tiny-lab.used").exists()


def test_an_image_of_the_same_is_found_whenever_it_was_made(root: Root) -> None:
    put_image(root, OLD)
    later = ENV.model_copy(update={"created_at": "2027-01-01T00:00:00+00:00"})
    assert find_same(root, later) == find_image(root, "tiny-lab")


@pytest.mark.parametrize("change", [{"lock_sha256": "1" * 64}, {"python": "3.11.8"}, {"recipe": "other"}])
def test_an_image_of_something_else_is_not_the_same(root: Root, change: dict[str, str]) -> None:
    put_image(root, OLD)
    assert find_same(root, ENV.model_copy(update=change)) is None


def test_nor_is_one_of_another_envbuilder_one_that_is_cut_off_or_one_whose_interpreter_is_gone(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_image(root, OLD)
    with monkeypatch.context() as patched:
        patched.setattr("envbuilder.image.make.__version__", "0.0.1")
        assert find_same(root, ENV) is None
    assert find_same(root, ENV) is not None
    path.write_bytes(b"hsq")
    assert find_same(root, ENV) is None
    put_image(root, OLD)
    record = root.images / "tiny-lab.json"
    record.write_text(record.read_text().replace("/bin/sh", "/nowhere/python3"))
    assert find_same(root, ENV) is None
