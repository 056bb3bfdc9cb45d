"""Fixtures of the whole suite.

Tests marked `needs_env` use the quickstart env that `make env` builds under .envbuilder (or under
$ENVBUILDER_TEST_ROOT). Without it they are left out, and a line says so; where CI=true that is a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lab.index_server import IndexServer

REPOSITORY = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]
"""A command's words → its exit code, standard output and standard error."""


@dataclass(frozen=True)
class Quickstart:
    """The quickstart recipe's bundle and env, as `make env` leaves them."""

    root: Path
    """ROOT. Tests read it and never write into it."""
    python: Path
    """The env's interpreter: torch, transformers and peft are there."""
    bundle_files: Path
    """The bundle's wheels and sdists, the CUDA toolchain's among them."""


def _quickstart_root() -> Path:
    return Path(os.environ.get("ENVBUILDER_TEST_ROOT") or REPOSITORY / ".envbuilder").absolute()


def _quickstart_is_there() -> bool:
    return (_quickstart_root() / "envs/quickstart/envbuilder.json").exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _quickstart_is_there() or os.environ.get("CI") == "true":
        return
    left_out = [item for item in items if item.get_closest_marker("needs_env")]
    if left_out:
        kept = [item for item in items if not item.get_closest_marker("needs_env")]
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI=true, a skip is a failure: a test that nobody runs holds nothing."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests left out: they need the quickstart env (make env)")


@pytest.fixture(scope="session")
def quickstart() -> Quickstart:
    root = _quickstart_root()
    if not _quickstart_is_there():
        pytest.fail(f"there is no quickstart env under {root}: run make env")
    return Quickstart(root, root / "envs/quickstart/bin/python", root / "bundles/quickstart/files")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IndexServer]:
    """An index on loopback that serves what a test puts into its folder."""
    # Here: the trainer's tests run inside the env, which has nothing of what this imports.
    from tests.lab.index_server import IndexServer

    folder = tmp_path / "served"
    folder.mkdir()
    with IndexServer(folder) as server:
        yield server


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `envbuilder WORDS` in an empty folder; (exit code, standard output, standard error)."""
    # Here: the trainer's tests run inside the env, which has nothing of what this imports.
    from envbuilder.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENVBUILDER_ROOT", raising=False)

    def envbuilder(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["envbuilder", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return envbuilder
