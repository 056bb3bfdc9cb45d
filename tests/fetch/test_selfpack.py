from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from email.parser import BytesParser
from pathlib import Path

import pytest
import uv

from envbuilder import __version__
from envbuilder.fetch.selfpack import PackedWheel, pack_tool, pack_trainer
from envbuilder.requirements import tool_requires, trainer_requires

REPOSITORY = Path(__file__).parents[2]


def members(wheel: PackedWheel) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unpacked(wheel: PackedWheel, folder: Path) -> Path:
    """An environment's site-packages with only `wheel` in it, made by uv."""
    (folder / wheel.filename).write_bytes(wheel.content)
    environment = {**os.environ, "UV_CACHE_DIR": str(folder / "cache"), "UV_NO_CONFIG": "1"}
    command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--target", str(folder / "site"), str(folder / wheel.filename)]
    subprocess.run([*command, "--python", sys.executable], env=environment, check=True)
    return folder / "site"


def test_the_same_sources_give_the_same_bytes() -> None:
    assert pack_tool() == pack_tool()
    assert pack_trainer() == pack_trainer()


def test_the_tool_holds_both_packages_and_nothing_that_python_made() -> None:
    names = set(members(pack_tool()))
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("envbuilder", "trainer")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"envbuilder-{__version__}.dist-info"
    assert names == wanted | {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")
    }


def test_the_trainer_is_a_distribution_of_its_own_with_its_requirements() -> None:
    wheel = pack_trainer()
    assert wheel.filename == f"envbuilder_trainer-{__version__}-py3-none-any.whl"
    content = members(wheel)
    metadata = BytesParser().parsebytes(content[f"envbuilder_trainer-{__version__}.dist-info/METADATA"])
    assert metadata["Name"] == "envbuilder-trainer"
    assert metadata.get_all("Requires-Dist") == list(trainer_requires())
    assert {name.split("/")[0] for name in content} == {
        "trainer",
        f"envbuilder_trainer-{__version__}.dist-info",
    }


@pytest.mark.parametrize("pack", [pack_tool, pack_trainer])
def test_record_names_every_member_with_its_hash(pack: type) -> None:
    content = members(pack())
    (record,) = (name for name in content if name.endswith("/RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(content[record].decode().splitlines())}
    assert rows.pop(record) == ["", ""]
    del content[record]
    assert rows == {
        name: [
            f"sha256={urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()}",
            str(len(data)),
        ]
        for name, data in content.items()
    }


def test_an_installed_tool_packs_itself_to_the_same_bytes(tmp_path: Path) -> None:
    tool, trainer = pack_tool(), pack_trainer()
    site = unpacked(tool, tmp_path)
    program = (
        "import envbuilder, sys; from envbuilder.fetch.selfpack import pack_tool, pack_trainer\n"
        "print(envbuilder.__file__); print(pack_tool().sha256); print(pack_trainer().sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(site / "envbuilder/__init__.py"), tool.sha256, trainer.sha256]


def test_the_tool_carries_the_metadata_that_it_was_installed_with() -> None:
    metadata = BytesParser().parsebytes(members(pack_tool())[f"envbuilder-{__version__}.dist-info/METADATA"])
    assert metadata["Version"] == __version__
    assert set(tool_requires()) <= set(metadata.get_all("Requires-Dist", []))
