"""A fetched bundle, set up by its start.py where there is no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import uv

from envbuilder import __version__
from envbuilder.paths import Root
from tests.fetch.bundles import NAME, Fetcher, lock_of
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_wheel

PROGRAM = "import envbuilder, small_need; print(envbuilder.__version__, small_need.__version__)"


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    """A bundle with uv as it is, and a small stand-in for what else envbuilder needs."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "served").mkdir()
    uv_version = version("uv")
    program = Path(uv.find_uv_bin()).read_bytes()
    wheels = [
        make_wheel(
            folder / "served",
            "uv",
            uv_version,
            files={f"uv-{uv_version}.data/scripts/uv": program},
            tag="py3-none-manylinux_2_17_x86_64",
        ),
        make_wheel(folder / "served", "small-need", "4.2"),
        make_wheel(folder / "served", "other", "1.0"),
    ]
    text = lock_of(wheels, {"uv": "tool", "small-need": "tool"})
    with IndexServer(folder / "served") as server, loopback_client() as client:
        root = Root(folder / "root with a space")
        Fetcher(root, server.url, client, text).fetch()
        yield root


def start(
    root: Root, *arguments: str | Path, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, so none of pip, ensurepip's bundle and this test's own environment can help.
    command = [*prefix, sys.executable, "-S", "-E", root.bundle(NAME) / "start.py", *arguments]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        # What a user may have set must not sway it.
        env={
            **os.environ,
            "UV_INDEX_URL": "http://127.0.0.1:9/",
            "UV_NO_BINARY": "1",
            "UV_REQUIRE_HASHES": "0",
        },
    )


def no_network() -> tuple[str, ...]:
    prefix = ("unshare", "-rn")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    return prefix


def test_the_bundle_sets_up_the_tool_without_network(fetched: Root) -> None:
    done = start(fetched, prefix=no_network())
    assert done.returncode == 0, done.stderr
    tool = fetched.path / "tool"
    command = (
        f"{tool}/bin/envbuilder' --root '{fetched.path}' compile '{fetched.bundle(NAME)}/recipe.toml' --local"
    )
    assert command in done.stdout
    ran = subprocess.run(
        [tool / "bin/python", "-c", PROGRAM], cwd=fetched.path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert ran.stdout.split() == [__version__, "4.2"]
    assert (tool / "bin/envbuilder").exists()
    assert not list(fetched.path.glob(".start-*"))


def test_it_can_be_run_again_and_into_a_folder_of_choice(fetched: Root, tmp_path: Path) -> None:
    for _ in range(2):
        done = start(fetched, tmp_path / "mine")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/bin/envbuilder").exists()


def test_a_folder_with_other_things_is_left_alone(fetched: Root, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    done = start(fetched, tmp_path)
    assert done.returncode == 7
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(
    "name", ["files/small_need-4.2-py3-none-any.whl", f"pylock.{NAME}.toml", "tool/*.whl"]
)
def test_a_changed_byte_stops_it(fetched: Root, tmp_path: Path, name: str) -> None:
    (path,) = fetched.bundle(NAME).glob(name)
    original, mode = path.read_bytes(), path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(original.replace(b"e", b"f", 1))
    done = start(fetched, tmp_path / "tool")
    path.write_bytes(original)
    path.chmod(mode)
    assert done.returncode == 5
    assert path.name in done.stderr
    assert "--verify" in done.stderr
    assert not (tmp_path / "tool").exists()


def test_another_python_than_the_bundles_is_told_which_to_use(fetched: Root, tmp_path: Path) -> None:
    record = fetched.bundle(NAME) / "bundle.json"
    original = record.read_text()
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    record.write_text(original.replace(f'"python": "{running}"', '"python": "3.99"'))
    done = start(fetched, tmp_path / "tool")
    record.write_text(original)
    assert done.returncode == 7
    assert "python3.99" in done.stderr


def test_an_incomplete_bundle_says_so(fetched: Root, tmp_path: Path) -> None:
    record = fetched.bundle(NAME) / "bundle.json"
    hidden = record.rename(record.with_name("hidden"))
    done = start(fetched, tmp_path / "tool")
    hidden.rename(record)
    assert done.returncode == 7
    assert "incomplete" in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("a", "b")])
def test_wrong_usage_is_told(fetched: Root, arguments: tuple[str, ...]) -> None:
    done = start(fetched, *arguments)
    assert done.returncode == 2
    assert "start.py [DIR]" in done.stderr
