"""What an older lock holds, and what of it is to be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.index import Index
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.lock_text import compose_lock
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.report import Quiet
from envbuilder.resolve.files import choose_files
from envbuilder.resolve.kept import Resolution, kept_version, kept_versions
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_wheel

TARGET = TargetSpec(python=">=3.11,<3.13")
RESOLUTION: Resolution = {
    "runtime": {"3.11": {"app": "1.0", "dep": "1.0"}, "3.12": {"app": "1.0", "dep": "2.0"}},
    "build": {"3.11": {}, "3.12": {"app": "1.0"}},
    "tool": {"3.11": {}, "3.12": {}},
}


@pytest.fixture
def lock(server: IndexServer) -> SourceLock:
    recipe = Recipe(name="demo", requirements=("app",), target=TARGET)
    make_wheel(server.folder, "app", "1.0")
    for version in ("1.0", "2.0"):
        make_wheel(server.folder, "dep", version)
    with loopback_client() as client:
        indexes = {"default": Index("default", server.url, client)}
        entries = choose_files(recipe, RESOLUTION, {}, indexes=indexes, reporter=Quiet())
    return parse_lock("demo", compose_lock(recipe, digest="0" * 64, resolver="uv", entries=entries))


def test_a_lock_is_read_back_as_the_resolution_that_it_was_made_of(lock: SourceLock) -> None:
    assert kept_versions(lock, TARGET) == RESOLUTION


def test_packages_that_are_to_be_upgraded_are_free_whatever_way_their_names_are_written(
    lock: SourceLock,
) -> None:
    kept = kept_versions(lock, TARGET, frozenset({"DEP"}))

    assert kept["runtime"] == {"3.11": {"app": "1.0"}, "3.12": {"app": "1.0"}}


def test_without_a_lock_nothing_is_kept() -> None:
    assert kept_versions(None, TARGET) == {}


@pytest.mark.parametrize("with_lock", [True, False])
def test_a_package_that_the_lock_lacks_can_not_be_upgraded(lock: SourceLock, with_lock: bool) -> None:
    with pytest.raises(InputError, match="no absent, other in the lock"):
        kept_versions(lock if with_lock else None, TARGET, frozenset({"other", "absent"}))


def test_a_python_that_the_old_lock_did_not_serve_keeps_nothing(lock: SourceLock) -> None:
    kept = kept_versions(lock, TargetSpec(python=">=3.12,<3.14"))

    assert kept["runtime"] == {"3.12": {"app": "1.0", "dep": "2.0"}, "3.13": {}}


def test_one_version_of_a_package_is_known_only_where_there_is_one(tmp_path: Path) -> None:
    assert kept_version(RESOLUTION, "app") == "1.0"
    assert kept_version(RESOLUTION, "dep") is None
    assert kept_version(RESOLUTION, "absent") is None
