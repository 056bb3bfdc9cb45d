"""publish and use of an env that is kept as an image alone: it stays where it is published."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from envbuilder.env_image import check_image, find_image, usable_env
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.kept_images import marked_as_used, marker_of
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.conftest import Run
from tests.sharing.published import NAME, keep_as_image, make_root, mode, overwrite, published, use

OLD = 1_000_000_000


@pytest.fixture
def imaged(tmp_path: Path) -> Root:
    """A ROOT whose env is an image alone; its bytes are none of a squashfs."""
    root = make_root(tmp_path / "imaged")
    keep_as_image(root, b"hsqs and more")
    return root


def test_an_env_that_is_an_image_is_used_where_it_is_published(
    imaged: Root, shared: Path, tmp_path: Path, run: Run
) -> None:
    version = published(imaged, shared).folder
    code, out, err = run("--json", "--root", tmp_path / "mine", "use", NAME, "--from", shared)
    assert code == 0, err
    mine = Root(tmp_path / "mine")
    image = find_image(mine, NAME)
    assert image is not None
    assert json.loads(out)["env"] == str(image.path)
    assert image.path.readlink() == version / "images" / image.path.name
    assert {mode(path) for path in (version / "images").iterdir()} == {0o440}
    assert image.path.samefile(imaged.images / image.path.name), "on one disk it is stored once"
    assert not mine.env(NAME).exists()
    check_image(image)
    assert list(shared.rglob("*.used")) == []


def test_its_bytes_are_compared_again_each_time_it_is_used(
    imaged: Root, shared: Path, tmp_path: Path
) -> None:
    image = use(published(imaged, shared).folder.parent.parent, tmp_path / "mine").image
    assert image is not None
    overwrite(image.path.resolve(), b"hsqs And more")
    mine = Root(tmp_path / "mine")
    with pytest.raises(IntegrityError, match="differs") as caught, usable_env(mine, NAME, image, Quiet()):
        pytest.fail("it was used")
    assert caught.value.remedy == f"envbuilder use {NAME} --from {shared}"
    with pytest.raises(IntegrityError, match="are not as"):
        use(shared, tmp_path / "other")


def test_prune_leaves_a_version_whose_image_is_in_use(imaged: Root, shared: Path, tmp_path: Path) -> None:
    version = published(imaged, shared).folder
    image = use(shared, tmp_path / "mine").image
    assert image is not None
    for folder in (version, *(path for path in version.rglob("*") if path.is_dir())):
        os.utime(folder, (OLD, OLD))
    with marked_as_used(image.path):
        pass
    assert published(imaged, shared, prune=True).removed == ()
    os.utime(marker_of(version), (OLD, OLD))
    assert published(imaged, shared, prune=True).removed == (version,)
    assert not marker_of(version).exists()


def test_a_version_that_is_pruned_says_how_to_come_by_the_new_one(
    imaged: Root, shared: Path, tmp_path: Path
) -> None:
    image = use(published(imaged, shared).folder.parent.parent, tmp_path / "mine").image
    assert image is not None
    image.path.resolve().unlink()
    with pytest.raises(IntegrityError, match="is missing") as caught:
        find_image(Root(tmp_path / "mine"), NAME)
    assert caught.value.remedy == f"envbuilder use {NAME} --from {shared}"


def test_with_an_interpreter_of_ones_own_the_published_image_is_left_alone(
    imaged: Root, shared: Path, tmp_path: Path, run: Run
) -> None:
    published(imaged, shared)
    words = ("--root", tmp_path / "mine", "use", NAME, "--from", shared, "--python", sys.executable)
    assert run(*words)[0] == 0
    mine = Root(tmp_path / "mine")
    assert (mine.env(NAME) / "envbuilder.json").is_file()
    assert find_image(mine, NAME) is None
    # The image, used later, is no reason to take the folder away.
    code, out, _ = run(*words[:-2])
    assert (code, "goes before the image" in out) == (0, True)


def test_an_image_whose_interpreter_is_not_on_this_machine_is_refused_with_the_way_out(
    tmp_path: Path, shared: Path
) -> None:
    root = make_root(tmp_path / "elsewhere")
    keep_as_image(root, b"hsqs", interpreter="/home/ann/bin/python3")
    published(root, shared)
    with pytest.raises(MismatchError, match="no interpreter /home/ann/bin/python3") as caught:
        use(shared, tmp_path / "mine")
    assert "--python PATH" in caught.value.remedy
    assert not (tmp_path / "mine").exists()


def test_a_damaged_image_is_not_published(imaged: Root, shared: Path) -> None:
    image = find_image(imaged, NAME)
    assert image is not None
    overwrite(image.path, b"hsqs And more")
    with pytest.raises(IntegrityError) as caught:
        published(imaged, shared)
    assert caught.value.remedy == f"envbuilder install recipes/{NAME}.toml --image --reinstall"


def test_who_publishes_a_used_image_publishes_its_bytes(imaged: Root, shared: Path, tmp_path: Path) -> None:
    published(imaged, shared)
    use(shared, tmp_path / "mine")
    again = published(Root(tmp_path / "mine"), shared, name="again").folder
    (image,) = (again / "images").glob("*.squashfs")
    assert not image.is_symlink()
    assert image.read_bytes() == b"hsqs and more"
