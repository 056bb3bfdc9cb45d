from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from envbuilder.compile.units.object_cache import (
    CacheRequest,
    DepfileError,
    FileHashes,
    ObjectCache,
    list_names,
    parse_depfile,
)
from envbuilder.errors import MismatchError

OBJECT = b"\x7fELF" + bytes(1000)
REQUEST = CacheRequest(
    package="fused",
    compiler="nvcc 13.0 abc",
    arguments=("-O3", "-gencode", "arch=compute_90,code=sm_90"),
    source_text_sha256="0" * 64,
    source_name="/source/csrc/kernel.cu",
    environment=(("CPATH", "/x"),),
    listing="1",
)


class Tree:
    """Headers, a cache, and what it said."""

    def __init__(self, folder: Path) -> None:
        self.headers = {"/source/a.h": folder / "a.h", "/cuda/b.h": folder / "b.h"}
        for name, path in self.headers.items():
            path.write_text(name, encoding="utf-8")
        self.folder = folder / "objects" / "1000"
        self.notes: list[str] = []
        self.cache = self.opened()

    def opened(self, *, size: int = 1 << 30, hash_file: Callable[[Path], str] | None = None) -> ObjectCache:
        return ObjectCache(self.folder, hash_file, size=size, note=self.notes.append)

    def store(self, content: bytes = OBJECT, request: CacheRequest = REQUEST) -> None:
        assert self.cache.store(request, self.headers, content, extra={"seconds": 12.5})

    def look_up(self, request: CacheRequest = REQUEST) -> bytes | None:
        found = self.cache.look_up(request, self.headers.get)
        return found.content if found else None

    def files(self, kind: str) -> list[Path]:
        return sorted(path for path in (self.folder / kind).rglob("*") if path.is_file())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_what_was_stored_is_found_in_another_process_too(tree: Tree) -> None:
    assert tree.look_up() is None
    tree.store()
    found = tree.opened().look_up(REQUEST, tree.headers.get)
    assert found is not None
    assert found.content == OBJECT
    assert found.sha256 == hashlib.sha256(OBJECT).hexdigest()
    assert found.extra == {"seconds": 12.5}
    assert not tree.notes


def test_a_header_is_found_under_its_own_name_where_none_other_is_given(tmp_path: Path) -> None:
    header = tmp_path / "a.h"
    header.write_text("1", encoding="utf-8")
    cache = ObjectCache(tmp_path / "objects")
    assert cache.store(REQUEST, {str(header): header}, OBJECT)
    assert cache.look_up(REQUEST) is not None
    header.write_text("2", encoding="utf-8")
    assert cache.look_up(REQUEST) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, package="other"),
        replace(REQUEST, compiler="nvcc 12.8 abc"),
        replace(REQUEST, arguments=("-O3",)),
        replace(REQUEST, arguments=(*REQUEST.arguments[:-2], " ".join(REQUEST.arguments[-2:]))),
        replace(REQUEST, source_text_sha256="1" * 64),
        replace(REQUEST, source_name="/source/csrc/other.cu"),
        replace(REQUEST, environment=()),
        replace(REQUEST, listing="2"),
    ],
)
def test_any_other_request_is_a_miss(tree: Tree, other: CacheRequest) -> None:
    tree.store()
    assert tree.look_up(other) is None


def test_a_header_that_changed_is_a_miss_and_both_objects_are_kept(tree: Tree) -> None:
    tree.store(b"first")
    tree.headers["/source/a.h"].write_text("changed", encoding="utf-8")
    assert tree.look_up() is None
    tree.store(b"second")
    assert tree.look_up() == b"second"
    tree.headers["/source/a.h"].write_text("/source/a.h", encoding="utf-8")
    assert tree.look_up() == b"first"


def test_a_header_that_is_gone_or_no_file_or_out_of_reach_is_a_miss(tree: Tree) -> None:
    tree.store()
    path = tree.headers["/source/a.h"]
    path.unlink()
    assert tree.look_up() is None
    os.mkfifo(path)
    assert tree.look_up() is None
    path.unlink()
    path.mkdir()
    assert tree.look_up() is None
    del tree.headers["/source/a.h"]
    assert tree.look_up() is None


def test_an_object_whose_headers_can_not_be_read_is_not_stored(tree: Tree) -> None:
    tree.headers["/source/gone.h"] = tree.folder / "gone.h"
    assert not tree.cache.store(REQUEST, tree.headers, OBJECT)
    assert "not cached" in tree.notes[0]
    assert not tree.files("objects")


def test_an_object_is_not_stored_when_a_header_changed_while_it_was_compiled(tree: Tree) -> None:
    newest = max(path.stat().st_ctime_ns for path in tree.headers.values())
    assert not tree.cache.store(REQUEST, tree.headers, OBJECT, began_ns=newest)
    assert "changed meanwhile" in tree.notes[0]
    assert tree.cache.store(REQUEST, tree.headers, OBJECT, began_ns=newest + 1)


@pytest.mark.parametrize("damage", [b"", OBJECT[:-1], OBJECT[:-1] + b"\x01", OBJECT + b"\x00"])
def test_a_damaged_object_is_removed_and_counts_as_a_miss(tree: Tree, damage: bytes) -> None:
    tree.store()
    (path,) = tree.files("objects")
    path.write_bytes(damage)
    assert tree.look_up() is None
    assert "damaged" in tree.notes[0]
    assert not tree.files("objects")
    assert not tree.files("manifests")
    tree.store()
    assert tree.look_up() == OBJECT


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_manifest_is_removed_and_counts_as_a_miss(tree: Tree, damage: bytes) -> None:
    tree.store()
    (path,) = tree.files("manifests")
    path.write_bytes(damage)
    assert tree.look_up() is None
    assert "damaged" in tree.notes[0]
    assert not tree.files("manifests")
    # With the right hash in its name, but not one of ours.
    path.with_name(f"{hashlib.sha256(damage).hexdigest()}.json").write_bytes(damage)
    assert tree.look_up() is None
    assert not tree.files("manifests")


def test_a_manifest_edited_to_name_other_headers_is_not_believed(tree: Tree) -> None:
    tree.store()
    (path,) = tree.files("manifests")
    tree.headers["/source/a.h"].write_text("changed", encoding="utf-8")
    changed = hashlib.sha256(b"changed").hexdigest()
    path.write_bytes(
        path.read_bytes().replace(hashlib.sha256(b"/source/a.h").hexdigest().encode(), changed.encode())
    )
    assert tree.look_up() is None


def test_a_link_in_an_object_s_place_is_not_followed(tree: Tree, tmp_path: Path) -> None:
    tree.store()
    (path,) = tree.files("objects")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert tree.look_up() is None
    tree.store()
    assert tree.look_up() == OBJECT
    assert not path.is_symlink()


def test_the_folder_is_this_user_s_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(tree.folder.stat().st_mode) == 0o700
    tree.store()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tree.files("objects")} == {0o600}
    monkeypatch.setattr(os, "geteuid", lambda: tree.folder.stat().st_uid + 1)
    with pytest.raises(MismatchError, match="not a folder of this user") as caught:
        tree.opened()
    assert str(tree.folder) in caught.value.remedy
    assert tree.look_up() is None  # nor are its files read


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o702])
def test_a_folder_where_others_may_write_is_refused(tree: Tree, mode: int) -> None:
    tree.folder.chmod(mode)
    with pytest.raises(MismatchError, match="Others may write"):
        tree.opened()


def test_a_link_for_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(MismatchError, match="not a folder of this user"):
        ObjectCache(tmp_path / "link")


def test_a_folder_that_others_may_read_is_closed(tree: Tree) -> None:
    tree.folder.chmod(0o2755)
    tree.opened()
    assert stat.S_IMODE(tree.folder.stat().st_mode) == 0o700


def test_a_folder_that_can_not_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MismatchError) as caught:
        ObjectCache(tmp_path / "file" / "objects")
    assert caught.value.remedy


def test_an_object_that_can_not_be_written_is_no_failure(tree: Tree) -> None:
    (tree.folder / "objects").write_text("", encoding="utf-8")  # in the folder's place
    assert not tree.cache.store(REQUEST, tree.headers, OBJECT)
    assert "not cached" in tree.notes[0]
    assert not tree.files("manifests")


def test_closing_removes_the_least_recently_used(tree: Tree) -> None:
    requests = [replace(REQUEST, source_name=f"{number}.cu") for number in range(4)]
    for number, request in enumerate(requests):
        tree.store(bytes([number]) * 100_000, request)
    for path in tree.files("objects") + tree.files("manifests"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    tree.cache.close()
    assert len(tree.files("objects")) == len(tree.files("manifests")) == 4
    assert tree.look_up(requests[2]) is not None  # used just now
    tree.opened(size=150_000).close()
    assert [tree.look_up(request) is not None for request in requests] == [False, False, True, False]
    assert len(tree.files("objects")) == 1
    assert not tree.notes  # that something was evicted is no damage
    assert len(tree.files("manifests")) == 1


def test_closing_removes_what_killed_writers_left_and_nothing_of_living_ones(tree: Tree) -> None:
    tree.store()
    place = tree.files("objects")[0].parent
    (place / ".living.new").write_bytes(bytes(1000))
    tree.opened(size=0).close()
    assert [path.name for path in tree.files("objects")] == [".living.new"]


def test_a_key_keeps_the_last_few_manifests(tree: Tree) -> None:
    for number in range(20):
        tree.headers["/source/a.h"].write_text(f"header {number}", encoding="utf-8")
        tree.store(b"object %d" % number)
    assert len(tree.files("manifests")) == 16
    assert tree.look_up() == b"object 19"


def test_an_evicted_object_takes_its_manifest_with_it(tree: Tree) -> None:
    tree.store()
    tree.files("objects")[0].unlink()
    assert tree.look_up() is None
    assert not tree.files("manifests")
    assert not tree.notes


def _work(folder: Path, headers: dict[str, Path], number: int) -> None:
    cache = ObjectCache(folder, size=200_000)
    for turn in range(30):
        which = (number + turn) % 5
        request = replace(REQUEST, source_name=f"{which}.cu")
        found = cache.look_up(request, headers.get)
        assert found is None or found.content == bytes([which]) * 50_000
        cache.store(request, headers, bytes([which]) * 50_000)
        if turn % 10 == 0:
            cache.close()


def test_processes_that_use_the_cache_at_once_never_get_a_wrong_object(tree: Tree) -> None:
    context = multiprocessing.get_context("fork" if sys.version_info < (3, 12) else "forkserver")
    processes = [context.Process(target=_work, args=(tree.folder, tree.headers, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_file_is_read_once_as_long_as_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.h"
    path.write_bytes(b"one")
    later = path.stat().st_ctime_ns + 10_000_000_000
    hashes = FileHashes(lambda: later)
    assert hashes(path) == hashlib.sha256(b"one").hexdigest()
    known = hashes._known
    assert list(known.values()) == [hashes(path)]
    (key,) = known
    known[key] = "remembered"
    assert hashes(path) == "remembered"
    path.write_bytes(b"other")
    assert hashes(path) == hashlib.sha256(b"other").hexdigest()


def test_the_hash_of_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.h"
    path.write_bytes(b"one")
    hashes = FileHashes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert hashes(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=times)
    assert hashes(path) == hashlib.sha256(b"two").hexdigest()


def test_threads_can_hash_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.h"
    path.write_bytes(b"one" * 100_000)
    hashes, found = FileHashes(), set[str]()
    threads = [threading.Thread(target=lambda: found.add(hashes(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {hashlib.sha256(b"one" * 100_000).hexdigest()}


def test_a_listing_changes_with_names_only(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.h").write_text("1", encoding="utf-8")
    first = list_names(tmp_path)
    (tmp_path / "csrc/a.h").write_text("2", encoding="utf-8")
    assert list_names(tmp_path) == first
    (tmp_path / "csrc/b.h").write_text("", encoding="utf-8")
    assert list_names(tmp_path) != first
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    assert list_names(tmp_path.parent / "copy") == list_names(tmp_path)


NVCC = """o o.o : x\\ y.cu \\
    /usr/include/stdc-predef.h \\
    /cuda/bin/../include/crt/host_config.h \\
    he$a#d\\ er.h
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a.o: a.cpp b.h\n", ["a.cpp", "b.h"], id="one line"),
        pytest.param("a.o: a.cpp \\\n b.h \\\r\n c.h\n", ["a.cpp", "b.h", "c.h"], id="continued"),
        pytest.param("a.o: a.h b.h\na.h:\nb.h:\n\n", ["a.h", "b.h"], id="phony rules"),
        pytest.param("a.o: a.h\nb.o: a.h c.h\n", ["a.h", "c.h"], id="two rules"),
        pytest.param("a.o b.o: a.h\n", ["a.h"], id="two targets"),
        pytest.param(
            "a\\ b.o: c\\ d.h $$x.h \\#y.h e\\:f g:h\n", ["c d.h", "$x.h", "#y.h", "e:f", "g:h"], id="marked"
        ),
        pytest.param("a.o: b\\\\\\ c d\\e\n", ["b\\ c", "d\\e"], id="backslashes"),
        pytest.param("a.o: b\u00a0c\u2028d\n", ["b\u00a0c\u2028d"], id="only blanks separate"),
        pytest.param("# a comment\na.o:\n", [], id="a rule without prerequisites"),
        pytest.param(
            NVCC,
            ["x y.cu", "/usr/include/stdc-predef.h", "/cuda/bin/../include/crt/host_config.h", "he$a#d er.h"],
            id="nvcc leaves spaces, $ and # as they are",
        ),
    ],
)
def test_dependency_files_are_read_as_make_does(text: str, expected: list[str]) -> None:
    assert parse_depfile(text) == expected


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "a.o a.cpp\n", "a.o: a.cpp \\\n b", "a.o: b.h"])
def test_a_dependency_file_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(DepfileError):
        parse_depfile(text)


def test_what_the_compiler_writes_is_understood(tmp_path: Path) -> None:
    names = ["a b.h", "do$$ll$ar.h", "ha#sh.h", "co:lon.h", "back\\slash.h", "plain.h"]
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("", encoding="utf-8")
    (folder / "x y.cpp").write_text("".join(f'#include "{name}"\n' for name in names), encoding="utf-8")
    command = ["g++", "-MMD", "-MP", "-MF", "x.d", "-c", "x y.cpp", "-o", "o o.o"]
    subprocess.run(command, cwd=folder, check=True)
    assert parse_depfile((folder / "x.d").read_text(encoding="utf-8")) == ["x y.cpp", *names]


def test_a_compiled_unit_comes_from_the_cache_until_a_header_changes(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("#define VALUE 1\n", encoding="utf-8")
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint value() { return VALUE; }\n', encoding="utf-8")
    cache = ObjectCache(tmp_path / "objects")

    def compile_unit() -> bytes:
        subprocess.run(["g++", "-MD", "-MF", "a.d", "-c", "a.cpp", "-o", "a.o"], cwd=tmp_path, check=True)
        return (tmp_path / "a.o").read_bytes()

    first = compile_unit()
    names = parse_depfile((tmp_path / "a.d").read_text(encoding="utf-8"))
    assert "a.h" in names
    assert cache.store(REQUEST, {name: tmp_path / name for name in names}, first)
    found = cache.look_up(REQUEST, lambda name: tmp_path / name)
    assert found is not None
    assert found.content == first
    (tmp_path / "a.h").write_text("#define VALUE 2\n", encoding="utf-8")
    assert cache.look_up(REQUEST, lambda name: tmp_path / name) is None
    assert compile_unit() != first
