"""Promises 21 to 23: what is in an env is what was locked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.commands import Workplace
from tests.promises.conftest import MINOR, TARGET, publish_tools

RECIPE = f'name = "env"\nrequirements = ["one"]\n{TARGET}'


@pytest.fixture
def desk(tmp_path: Path, server: IndexServer) -> Workplace:
    """A workplace with a bundle of one wheel."""
    publish_tools(server.folder)
    make_wheel(server.folder, "one", "1.0", files={"one.py": "bytes = 'locked'\n"})
    place = Workplace(tmp_path / "place", {"PIP_INDEX_URL": server.url})
    place.add("env", RECIPE)
    for command in ("lock", "fetch"):
        place.succeed(command, place.recipe("env"))
    return place


def installed(place: Workplace) -> str | None:
    """What the env has as the module `one`."""
    module = place.root.env("env") / "lib" / f"python{MINOR}" / "site-packages" / "one.py"
    return module.read_text() if module.exists() else None


def swapped(place: Workplace, folder: Path) -> tuple[Path, Path]:
    """The wheel in the bundle, and one with the same name, size and RECORD, and other code."""
    wheel = place.root.bundle("env") / "files" / "one-1.0-py3-none-any.whl"
    folder.mkdir()
    other = make_wheel(folder, "one", "1.0", files={"one.py": "bytes = 'foiled'\n"})
    assert other.stat().st_size == wheel.stat().st_size
    return wheel, other


def test_promise_21_bytes_swapped_after_verification_are_not_installed(
    desk: Workplace, tmp_path: Path
) -> None:
    """Bytes swapped between verification and install → what is installed is what was verified."""
    wheel, other = swapped(desk, tmp_path / "other")
    desk.succeed("bundle", "verify", "env")
    desk.succeed("install", desk.recipe("env"))
    other.replace(wheel)
    ended = desk.run("install", desk.recipe("env"), "--reinstall")
    assert ended.code == 5, ended
    assert ended.context["file"] == str(wheel)
    assert installed(desk) == "bytes = 'locked'\n"


def test_promise_21_bytes_swapped_all_the_while_are_never_installed(desk: Workplace, tmp_path: Path) -> None:
    """Bytes swapped between verification and install → what is installed is what was verified."""
    wheel, other = swapped(desk, tmp_path / "other")
    good = shutil.copyfile(wheel, tmp_path / "good")
    ended = threading.Event()

    def swap() -> None:
        link = wheel.with_name(".swapped")
        while not ended.is_set():
            for source in (other, good):
                os.link(source, link)
                link.replace(wheel)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        codes = {desk.run("install", desk.recipe("env"), "--reinstall").code for _ in range(12)}
    finally:
        ended.set()
        swapping.join()
    assert codes <= {0, 5, 7}
    assert installed(desk) in (None, "bytes = 'locked'\n")


def test_promise_22_a_files_digest_counts_and_not_its_name(desk: Workplace, server: IndexServer) -> None:
    """Same file name, new bytes → the digest wins."""
    recipe, old_lock = desk.recipe("env"), desk.lock("env").read_text()
    desk.succeed("install", recipe)
    make_wheel(server.folder, "one", "1.0", files={"one.py": "bytes = 'newest'\n"})

    # The new lock's bytes come, though bundle, store and env have a file of that name and version.
    desk.succeed("lock", recipe, "--upgrade")
    assert desk.succeed("fetch", recipe)["transferred_files"] == 1
    desk.succeed("install", recipe)
    assert installed(desk) == "bytes = 'newest'\n"

    # The old lock's are still in the store.
    desk.lock("env").write_text(old_lock)
    assert desk.succeed("fetch", recipe)["transferred_files"] == 0
    desk.succeed("install", recipe)
    assert installed(desk) == "bytes = 'locked'\n"

    # Without them, the index's new ones don't do.
    shutil.rmtree(desk.root.path)
    assert desk.run("fetch", recipe).code == 5


def test_promise_23_a_stray_package_is_named_by_doctor(desk: Workplace, tmp_path: Path) -> None:
    """A stray `pip install` into the env → doctor names the package."""
    desk.succeed("install", desk.recipe("env"))
    words = ("doctor", desk.recipe("env"), "--only", "env.distributions")
    assert desk.run(*words).code == 0
    stray = make_wheel(tmp_path, "stray", "0.1")
    python = desk.root.env("env") / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*pip, "--quiet", "--no-index", str(stray)], check=True, env={"PATH": os.defpath})
    ended = desk.run(*words)
    assert ended.code == 8
    assert "stray 0.1 is not in the lock" in ended.out
