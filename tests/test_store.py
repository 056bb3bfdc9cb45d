from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.errors import IntegrityError, MismatchError, NetworkError
from envbuilder.store import Store

BODY = b"body" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
SIZE = len(BODY)
LONG_AGO = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.check_folder()
    return store


def partials(store: Store) -> list[Path]:
    return sorted((store.folder / "partial").iterdir())


def leave(store: Store, content: bytes, name: str = "other") -> Path:
    """What a fetch that was killed leaves."""
    part = store.folder / "partial" / f"{SHA256}.{name}.part"
    part.write_bytes(content)
    return part


def failing(error: BaseException) -> Callable[[Path], None]:
    def fill(part: Path) -> None:
        part.write_bytes(BODY[:10])
        raise error

    return fill


def whole(part: Path) -> None:
    part.write_bytes(BODY)


def test_a_file_is_stored_under_its_hash_and_can_not_be_written(store: Store) -> None:
    assert not store.has(SHA256, SIZE)
    path = store.add(SHA256, SIZE, whole)
    assert path == store.path(SHA256) == store.folder / SHA256
    assert path.read_bytes() == BODY
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert store.has(SHA256, SIZE)
    assert not store.has(SHA256, SIZE + 1)
    assert partials(store) == []


def test_what_another_fetch_left_is_gone_on_from(store: Store) -> None:
    leave(store, BODY[:100], "a")
    leave(store, BODY[:300], "b")
    leave(store, BODY[:200], "c")

    def fill(part: Path) -> None:
        assert part.read_bytes() == BODY[:300]
        whole(part)

    store.add(SHA256, SIZE, fill)
    assert partials(store) == []


def test_a_partial_file_that_another_fetch_may_be_writing_is_left_to_it(store: Store) -> None:
    alive, abandoned = leave(store, BODY[:100], "alive"), leave(store, BODY[:200], "abandoned")
    os.utime(abandoned, (LONG_AGO, LONG_AGO))
    with pytest.raises(KeyboardInterrupt):
        store.add(SHA256, SIZE, failing(KeyboardInterrupt()))
    assert alive.read_bytes() == BODY[:100]
    assert not abandoned.exists()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), NetworkError("away", remedy="wait")], ids=["ctrl-c", "network"]
)
def test_an_interrupted_download_is_kept(store: Store, error: BaseException) -> None:
    with pytest.raises(type(error)):
        store.add(SHA256, SIZE, failing(error))
    assert [path.read_bytes() for path in partials(store)] == [BODY[:10]]
    assert not store.has(SHA256, SIZE)


@pytest.mark.parametrize("kind", [IntegrityError, MismatchError])
def test_of_wrong_bytes_and_of_a_full_disk_nothing_stays(
    store: Store, kind: type[IntegrityError] | type[MismatchError]
) -> None:
    leave(store, BODY[:5])
    with pytest.raises(kind):
        store.add(SHA256, SIZE, failing(kind("no", remedy="none")))
    assert partials(store) == []
    assert not store.path(SHA256).exists()


def test_a_fetch_that_was_overtaken_takes_what_the_other_stored(store: Store) -> None:
    def overtaken(part: Path) -> None:
        store.add(SHA256, SIZE, whole)
        assert not part.exists()

    assert store.add(SHA256, SIZE, overtaken).read_bytes() == BODY


def test_a_fetch_that_was_overtaken_before_it_began_takes_what_the_other_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over = Store._take_over

    def after_another(self: Store, part: Path, sha256: str, size: int) -> None:
        monkeypatch.setattr(Store, "_take_over", take_over)
        store.add(SHA256, SIZE, whole)
        assert not part.exists()
        take_over(self, part, sha256, size)

    monkeypatch.setattr(Store, "_take_over", after_another)
    assert store.add(SHA256, SIZE, failing(AssertionError("nothing is left to do"))).read_bytes() == BODY
    assert partials(store) == []


def test_a_partial_file_that_somebody_removed_is_a_typed_error(store: Store) -> None:
    with pytest.raises(NetworkError, match="removed"):
        store.add(SHA256, SIZE, Path.unlink)


def test_links_planted_in_the_store_are_not_followed(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(BODY[:100])
    store.path(SHA256).symlink_to(target)
    (store.folder / "partial" / f"{SHA256}.planted.part").symlink_to(target)

    def fill(part: Path) -> None:
        assert part.read_bytes() == b""
        whole(part)

    assert not store.has(SHA256, 100)
    store.add(SHA256, SIZE, fill)
    assert target.read_bytes() == BODY[:100]
    assert store.path(SHA256).read_bytes() == BODY
    assert not store.path(SHA256).is_symlink()


def test_a_store_that_everybody_may_write_into_is_refused(store: Store) -> None:
    store.folder.chmod(0o777)
    with pytest.raises(MismatchError, match="Everybody") as caught:
        store.add(SHA256, SIZE, whole)
    assert caught.value.remedy == f"chmod o-w {store.folder}"


def test_partial_files_of_what_is_stored_are_tidied_away_and_others_stay(store: Store) -> None:
    store.add(SHA256, SIZE, whole)
    leave(store, BODY[:10])
    other = store.folder / "partial" / f"{'0' * 64}.other.part"
    other.write_bytes(b"")
    store.tidy()
    assert partials(store) == [other]


def test_tidying_leaves_what_is_no_partial_file(store: Store) -> None:
    scratch = store.folder / "partial" / ".git-scratch"
    scratch.mkdir()
    store.tidy()
    assert partials(store) == [scratch]


@pytest.mark.parametrize("refused", ["read", "remove"])
def test_a_partial_file_of_another_user_is_no_obstacle(
    store: Store, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    # Root may do everything, so the refusal is made here; tests/lab/test_shared_root.py has real users.
    theirs = leave(store, BODY[:300], "theirs")
    os.utime(theirs, (LONG_AGO, LONG_AGO))
    leave(store, BODY[:200], "own")
    forbidden = {"read": "open", "remove": "unlink"}[refused]
    allowed = getattr(Path, forbidden)

    def refuse(path: Path, *given: object, **named: object) -> object:
        if path == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *given, **named)

    monkeypatch.setattr(Path, forbidden, refuse)

    def fill(part: Path) -> None:
        assert part.read_bytes() == (BODY[:200] if refused == "read" else BODY[:300])
        whole(part)

    assert store.add(SHA256, SIZE, fill).read_bytes() == BODY
    assert partials(store) == ([theirs] if refused == "remove" else [])
    store.tidy()


@pytest.mark.parametrize("umask", [0o000, 0o077], ids=["umask-000", "umask-077"])
@pytest.mark.parametrize("parent", [0o2750, 0o2770])
def test_the_store_has_the_modes_of_its_parent_whatever_the_umask(
    tmp_path: Path, umask: int, parent: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(parent)
    before = os.umask(umask)
    try:
        path = Store(root / "store").add(SHA256, SIZE, whole)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert path.stat().st_gid == root.stat().st_gid
    for folder in (root / "store", root / "store" / "partial"):
        assert stat.S_IMODE(folder.stat().st_mode) == parent


def test_a_group_may_share_a_store(store: Store) -> None:
    for folder in (store.folder, store.folder / "partial"):
        folder.chmod(0o2770)
    assert store.add(SHA256, SIZE, whole).read_bytes() == BODY


def add_many(folder: Path, begin: object) -> None:
    """Stores the same twenty files as seven other processes, where no file lock does anything."""
    fcntl.flock = fcntl.lockf = lambda *_: None  # type: ignore[assignment]
    begin.wait()  # type: ignore[attr-defined]
    for number in range(20):
        body = bytes([number]) * 100_000

        def fill(part: Path, body: bytes = body) -> None:
            with part.open("wb") as file:
                for start in range(0, len(body), 10_000):
                    file.write(body[start : start + 10_000])

        Store(folder).add(hashlib.sha256(body).hexdigest(), len(body), fill)
    Store(folder).tidy()
    sys.exit(0)


def test_eight_processes_store_the_same_files_without_locks(store: Store) -> None:
    context = multiprocessing.get_context("fork" if sys.version_info < (3, 12) else "forkserver")
    begin = context.Barrier(8)
    processes = [context.Process(target=add_many, args=(store.folder, begin)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    stored = [path for path in store.folder.iterdir() if path.name != "partial"]
    assert len(stored) == 20
    for path in stored:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert partials(store) == []
