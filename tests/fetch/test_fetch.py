"""fetch against a real index on loopback: what arrives, what is not asked for again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from envbuilder.errors import EnvbuilderError, IntegrityError, MismatchError, NetworkError
from envbuilder.paths import Root
from envbuilder.recipe import load_recipe
from envbuilder.report import Quiet, Unit
from tests.fetch.bundles import NAME, PYTHON, Fetcher, lock_of, sha256
from tests.lab.index_server import Fault, IndexServer, loopback_client
from tests.lab.packages import make_sdist, make_wheel

GROUPS = {"source": "build", "needed-by-tool": "tool"}
BIG = 3_000_000
"""Bytes of the file that is interrupted on its way."""


@pytest.fixture
def served(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "served"
    folder.mkdir()
    content = os.urandom(BIG)
    return [
        make_wheel(folder, "big", "1.0", files={"big.bin": content}),
        make_wheel(folder, "one", "1.0"),
        make_wheel(folder, "needed-by-tool", "2.0"),
        make_sdist(folder, "source", "3.0"),
    ]


@pytest.fixture
def server(served: list[Path]) -> Iterator[IndexServer]:
    with IndexServer(served[0].parent) as server:
        yield server


@pytest.fixture
def fetcher(served: list[Path], server: IndexServer, tmp_path: Path) -> Iterator[Fetcher]:
    text = lock_of(served, GROUPS)
    with loopback_client() as client:
        yield Fetcher(Root(tmp_path / "root"), server.url, client, text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_complete(fetcher: Fetcher, served: list[Path]) -> None:
    assert names(fetcher.files) == {path.name for path in served}
    for path in served:
        assert (fetcher.files / path.name).read_bytes() == path.read_bytes()
    assert names(fetcher.root.store) == {sha256(path) for path in served} | {"partial"}
    assert names(fetcher.root.store / "partial") == set()


def refused(fetcher: Fetcher, kind: type[EnvbuilderError]) -> EnvbuilderError:
    with pytest.raises(kind) as caught:
        fetcher.fetch()
    assert not (fetcher.root.bundle(NAME) / "bundle.json").exists()
    return caught.value


def test_a_bundle_holds_files_lock_recipe_and_tool(fetcher: Fetcher, served: list[Path]) -> None:
    report = fetcher.fetch()
    assert_complete(fetcher, served)
    size = sum(path.stat().st_size for path in served)
    assert (report.files, report.bytes) == (report.transferred_files, report.transferred_bytes) == (4, size)
    bundle = report.bundle
    assert bundle.path == fetcher.root.bundle(NAME)
    assert (bundle.path / f"pylock.{NAME}.toml").read_text() == fetcher.lock_text
    assert load_recipe(bundle.path / "recipe.toml") == fetcher.recipe
    assert (bundle.path / "start.py").is_file()
    assert bundle.record.python == PYTHON
    assert bundle.record.tool_files == ("needed_by_tool-2.0-py3-none-any.whl",)
    assert names(bundle.path / "tool") == {bundle.record.tool_wheel}
    assert sha256(bundle.path / "tool" / bundle.record.tool_wheel) == bundle.record.tool_sha256


def test_files_of_a_bundle_are_links_into_the_store(fetcher: Fetcher, served: list[Path]) -> None:
    fetcher.fetch()
    for path in served:
        assert (fetcher.files / path.name).samefile(fetcher.root.store / sha256(path))


def test_a_second_fetch_asks_nobody_and_writes_nothing(fetcher: Fetcher, server: IndexServer) -> None:
    fetcher.fetch()
    server.requests.clear()
    before = {path: path.lstat().st_ctime_ns for path in fetcher.root.path.rglob("*")}
    report = fetcher.fetch()
    assert (report.transferred_files, report.transferred_bytes) == (0, 0)
    assert server.requests == []
    assert {path: path.lstat().st_ctime_ns for path in fetcher.root.path.rglob("*")} == before


def test_what_another_bundle_brought_comes_from_the_store(
    fetcher: Fetcher, server: IndexServer, served: list[Path]
) -> None:
    fetcher.fetch()
    shutil.rmtree(fetcher.root.bundle(NAME))
    server.requests.clear()
    assert fetcher.fetch().transferred_files == 0
    assert server.requests == []
    assert_complete(fetcher, served)


def test_a_file_that_left_the_lock_leaves_the_bundle(fetcher: Fetcher, served: list[Path]) -> None:
    fetcher.fetch()
    smaller = replace(fetcher, lock_text=lock_of(served[1:], GROUPS))
    (fetcher.files / "stray.txt").write_text("?")
    smaller.fetch()
    assert names(fetcher.files) == {path.name for path in served[1:]}


def test_progress_ends_with_all_bytes(fetcher: Fetcher) -> None:
    class Listener(Quiet):
        seen: dict[str, tuple[int, int]]

        def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
            assert unit == "bytes"
            self.seen[label] = (done, total)

    listener = Listener()
    listener.seen = {}
    report = fetcher.fetch(reporter=listener)
    assert listener.seen == {"fetch": (report.bytes, report.bytes)}
    listener.seen = {}
    fetcher.fetch(reporter=listener, verify=True)
    assert listener.seen == {"check": (report.bytes, report.bytes)}


def change_in_place(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.chmod(0o640)
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name(".moved"))
    path.symlink_to(".moved")


@pytest.mark.parametrize("damage", [replace_by_link, Path.unlink])
def test_a_damaged_file_is_found_and_mended(
    fetcher: Fetcher, served: list[Path], damage: Callable[[Path], None]
) -> None:
    fetcher.fetch()
    damage(fetcher.files / served[1].name)
    fetcher.fetch()
    assert_complete_but_hidden(fetcher, served)
    assert fetcher.fetch().transferred_files == 0


def assert_complete_but_hidden(fetcher: Fetcher, served: list[Path]) -> None:
    (fetcher.files / ".moved").unlink(missing_ok=True)
    assert_complete(fetcher, served)


def test_verify_finds_a_changed_byte_that_looks_untouched_and_fetches_that_file_only(
    fetcher: Fetcher, server: IndexServer, served: list[Path]
) -> None:
    fetcher.fetch()
    change_in_place(fetcher.files / served[1].name)
    # As if a disk had flipped the bit: the record of the last fetch says that this is how it left the file.
    stamps_file = fetcher.root.cache / "fetch" / f"{NAME}.json"
    stamps = json.loads(stamps_file.read_text())
    found = (fetcher.files / served[1].name).stat()
    stamps[f"files/{served[1].name}"] |= {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    stamps_file.write_text(json.dumps(stamps))
    server.requests.clear()

    assert fetcher.fetch().transferred_files == 0
    report = fetcher.fetch(verify=True)
    assert (report.transferred_files, report.transferred_bytes) == (1, served[1].stat().st_size)
    assert server.file_requests() == [served[1].name]
    assert_complete(fetcher, served)


def test_a_lost_record_of_what_was_checked_costs_no_transfer(fetcher: Fetcher, server: IndexServer) -> None:
    fetcher.fetch()
    (fetcher.root.cache / "fetch" / f"{NAME}.json").write_text("{")
    assert fetcher.fetch().transferred_files == 0


@pytest.mark.parametrize("what", ["sha256", "size"])
def test_an_index_that_announces_another_file_is_refused_before_the_transfer(
    fetcher: Fetcher, server: IndexServer, served: list[Path], what: str
) -> None:
    server.announced_sha256 = {served[1].name: "0" * 64} if what == "sha256" else {}
    server.announced_size = {served[1].name: 1} if what == "size" else {}
    error = refused(fetcher, IntegrityError)
    assert error.context["got"] in (f"sha256 {'0' * 64}", "size 1")
    assert "envbuilder lock RECIPE" in error.remedy
    assert served[1].name not in server.file_requests()


def test_a_file_that_left_the_index_is_named_with_the_index(
    fetcher: Fetcher, server: IndexServer, served: list[Path]
) -> None:
    make_wheel(served[1].parent, "one", "2.0")
    served[1].unlink()
    error = refused(fetcher, NetworkError)
    assert error.exit_code == 4
    assert error.context == {"index": "default", "file": served[1].name}


def test_one_failure_stops_the_other_transfers(
    fetcher: Fetcher, server: IndexServer, served: list[Path]
) -> None:
    # The big file waits for longer than any test may; only the small one's failure can end the fetch.
    server.faults[served[0].name] = [Fault(status=503, headers={"Retry-After": "3600"})] * 10
    server.faults[served[1].name] = [Fault(status=404)]
    assert "404" in refused(fetcher, NetworkError).message


def test_a_python_that_the_lock_does_not_serve_is_refused(
    fetcher: Fetcher, server: IndexServer, served: list[Path]
) -> None:
    text = lock_of(served, GROUPS, target={"python": "<3.11"})
    with pytest.raises(MismatchError, match=PYTHON):
        replace(fetcher, lock_text=text).fetch()
    assert server.requests == []
