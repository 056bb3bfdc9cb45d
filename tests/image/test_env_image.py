"""Finding an env's image and refusing one that is not what was installed. No squashfs tool is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from envbuilder import node_folder
from envbuilder.env_image import EnvImage, check_image, env_receipt, find_image, find_squashfuse, usable_env
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.image.make import find_mksquashfs
from envbuilder.model import EnvReceipt, ImageReceipt
from envbuilder.node_folder import private_node_folder
from envbuilder.paths import Root
from envbuilder.report import Quiet

CONTENT = b"hsqs and more"
ENV = EnvReceipt(
    recipe="tiny",
    lock_sha256="0" * 64,
    python="3.11.7",
    compute_capabilities=(),
    packages=(),
    extensions=(),
    provided=None,
    created_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """With an image that has the right bytes, though it is no squashfs."""
    root = Root(tmp_path / "root")
    root.images.mkdir(parents=True)
    receipt = ImageReceipt(
        file="tiny-000000000000.squashfs",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        plain_files=3,
        plain_bytes=30,
        mksquashfs="4.5.1",
        tool_version="0.1.0",
        interpreter="/usr/bin/python3",
        env=ENV,
        created_at="2026-01-01T00:00:00+00:00",
    )
    (root.images / receipt.file).write_bytes(CONTENT)
    (root.images / "tiny.json").write_text(receipt.model_dump_json())
    return root


def image_in(root: Root) -> EnvImage:
    image = find_image(root, "tiny")
    assert image is not None
    return image


def test_an_env_that_is_only_an_image_is_found(root: Root) -> None:
    assert env_receipt(root, "tiny") == (ENV, image_in(root))
    check_image(image_in(root))


def test_an_env_that_is_a_folder_goes_before_its_image(root: Root) -> None:
    root.env("tiny").mkdir(parents=True)
    assert env_receipt(root, "tiny")[1] is not None, "a folder without a receipt is no env"
    (root.env("tiny") / "envbuilder.json").write_text(ENV.model_dump_json())
    assert env_receipt(root, "tiny") == (ENV, None)
    with usable_env(root, "tiny", None, Quiet()) as used:
        assert used.python == (str(root.env("tiny") / "bin/python"),)


def test_where_there_is_neither_the_command_that_installs_it_is_told(root: Root) -> None:
    with pytest.raises(MismatchError) as caught:
        env_receipt(root, "other")
    assert caught.value.remedy == "envbuilder install recipes/other.toml"


def test_one_changed_byte_is_refused_before_anything_is_used(root: Root) -> None:
    image_in(root).path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(IntegrityError) as caught, usable_env(root, "tiny", image_in(root), Quiet()):
        pytest.fail("it was used")
    assert caught.value.remedy == "envbuilder install recipes/tiny.toml --image --reinstall"
    assert caught.value.context["expected"] == image_in(root).receipt.sha256


@pytest.mark.parametrize("harm", ["shorter", "missing", "damaged receipt"])
def test_an_image_that_can_t_be_the_one_is_refused_without_reading_it(root: Root, harm: str) -> None:
    path = image_in(root).path
    if harm == "shorter":
        path.write_bytes(CONTENT[:-1])
    elif harm == "missing":
        path.unlink()
    else:
        (root.images / "tiny.json").write_text("{}")
    with pytest.raises(IntegrityError) as caught:
        find_image(root, "tiny")
    assert "--image" in caught.value.remedy


def test_images_that_everybody_may_change_are_refused(root: Root) -> None:
    root.images.chmod(0o777)
    with pytest.raises(MismatchError, match="Everybody may write"):
        find_image(root, "tiny")


def test_without_any_squashfs_tool_the_env_as_a_folder_is_the_way_out(
    root: Root, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MismatchError) as caught, usable_env(root, "tiny", image_in(root), Quiet()):
        pytest.fail("it was used")
    assert "squashfs-tools" in caught.value.remedy
    assert "envbuilder install recipes/tiny.toml" in caught.value.remedy
    assert caught.value.context["mounting"] == "there is no squashfuse"
    with pytest.raises(MismatchError) as caught:
        find_mksquashfs()
    assert "squashfs-tools" in caught.value.remedy
    assert "envbuilder install RECIPE" in caught.value.remedy


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_folder_that_somebody_has_planted_on_the_node_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    monkeypatch.setattr(node_folder, "NODE_FOLDERS", tmp_path)
    place = node_folder.node_folder()
    if planted == "open":
        place.mkdir()
        place.chmod(0o777)
    elif planted == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.touch(mode=0o600)
    assert private_node_folder() is None


def test_the_folder_on_the_node_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_folder, "NODE_FOLDERS", tmp_path)
    made = private_node_folder()
    assert made == node_folder.node_folder()
    assert made is not None
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_node_folder() == made


def test_the_squashfuse_that_apptainer_brings_along_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        name: tmp_path / "opt" / name for name in ("bin/apptainer", "libexec/apptainer/bin/squashfuse_ll")
    }
    for path in programs.values():
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").symlink_to(programs["bin/apptainer"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_squashfuse() == str(programs["libexec/apptainer/bin/squashfuse_ll"])
    (tmp_path / "bin/squashfuse").touch(mode=0o755)
    assert find_squashfuse() == str(tmp_path / "bin/squashfuse"), "the PATH comes first"
