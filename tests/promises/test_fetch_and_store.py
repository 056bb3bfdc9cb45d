"""Promises 1 to 14: what `fetch` leaves on the disk, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import ssl
import stat
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import envbuilder.fetch.files
from envbuilder.bundles import verify_bundle
from envbuilder.lock import parse_lock
from envbuilder.report import Quiet
from tests.lab.hub_server import HubServer
from tests.lab.index_server import Fault, IndexServer
from tests.promises.commands import (
    OPENED_A_SOCKET,
    Before,
    Ended,
    Workplace,
    die_at_step,
    files_below,
    largest_file,
    no_file_locks,
    no_sockets,
    sha256,
    state,
)
from tests.promises.conftest import REPO, SMALL, TARGET, Published

KILLS = 50
ORIGINS = ["index", "hub"]


def faults_of(
    origin: str, index: IndexServer, hub: HubServer, published: Published
) -> tuple[Path, list[Fault]]:
    """The large file of `origin`, and the list that its server takes the next answers from."""
    file = published.big if origin == "index" else published.weights
    server: IndexServer | HubServer = index if origin == "index" else hub
    return file, server.faults.setdefault(file.name, [])


def fetch_is_refused(place: Workplace, file: Path, code: int, *, before: Before = int) -> Ended:
    """A fetch that ends with `code`, and leaves nothing of `file`."""
    ended = place.fetch("small", before=before)
    assert ended.code == code, ended
    assert ended.told["remedy"]
    digest = sha256(file.read_bytes())
    assert not [name for name in files_below(place.root.store) if digest in name]
    names = {path.name for path in place.root.bundle("small").rglob("*")}
    assert not names & {file.name, "bundle.json"}
    return ended


def lose(place: Workplace, file: Path) -> None:
    """Takes a served file, or one of the bundle, away from bundle and store."""
    (place.root.store / sha256(file.read_bytes())).unlink(missing_ok=True)
    (copy,) = place.root.bundle("small").rglob(file.name)
    copy.unlink()


def is_whole(place: Workplace, published: Published) -> None:
    """The bundle holds all that was served, the store nothing else than its names say; none is on its way."""
    verify_bundle(place.root, "small", Quiet())
    for name, path in published.served.items():
        assert (place.root.bundle("small") / name).read_bytes() == path.read_bytes()
    for name, path in files_below(place.root.store).items():
        assert sha256(path.read_bytes()) == name


def test_promise_01_a_kill_at_any_moment_leaves_a_final_path_absent_or_correct(
    place: Workplace, published: Published
) -> None:
    """kill -9 at any moment → a final path is absent or hash-correct; a second run converges."""
    began, counter = time.monotonic(), place.folder / "steps"
    assert place.fetch("small", before=partial(die_at_step, place.root.path, 1_000_000, counter)).code == 0
    whole, steps = time.monotonic() - began, counter.stat().st_size
    right = {name: path.read_bytes() for name, path in files_below(place.root.bundle("small")).items()}
    shutil.rmtree(place.root.path)

    # Moments over all of a fetch's duration, and before its changes to the disk from the first to the last;
    # up to five kills in a row go on from one another's leavings.
    moments = [(number + 0.5) / KILLS for number in range(KILLS)]
    random.Random(1).shuffle(moments)
    killed = 0
    for number, moment in enumerate(moments, start=1):
        if number % 2:
            running = place.start("fetch", place.recipe("small"))
            running.process.join(whole * moment)
            killed += running.kill().code == -signal.SIGKILL
        else:
            step = partial(die_at_step, place.root.path, int(steps * moment) + 1, counter)
            killed += place.fetch("small", before=step).code == -signal.SIGKILL
        is_absent_or_correct(place, right)
        if number % 5 == 0:
            assert place.fetch("small").code == 0
            is_absent_or_correct(place, right)
            is_whole(place, published)
            shutil.rmtree(place.root.path)
    assert killed > KILLS // 5


@pytest.mark.parametrize("origin", ORIGINS)
def test_promise_01_a_killed_fetch_is_gone_on_from(
    place: Workplace, index: IndexServer, hub: HubServer, published: Published, origin: str
) -> None:
    """kill -9 at any moment → a second run converges: here, without asking twice for what has come."""
    file, faults = faults_of(origin, index, hub, published)
    faults.append(Fault(stall_after=file.stat().st_size - 1))
    running = place.start("fetch", place.recipe("small"))
    tick = threading.Event()
    while running.process.is_alive() and not come_of(place, file):
        tick.wait(0.01)
    assert running.kill().code == -signal.SIGKILL
    come = come_of(place, file)
    index.requests.clear()
    hub.content_requests.clear()
    assert place.fetch("small").code == 0
    is_whole(place, published)
    asked = [headers for path, headers in index.requests if path.endswith(file.name)]
    asked += [headers for *_, headers in hub.content_requests] if origin == "hub" else []
    assert [headers.get("range") for headers in asked] == [f"bytes={come}-"]


def come_of(place: Workplace, file: Path) -> int:
    """Bytes of the partial file of `file`."""
    digest = sha256(file.read_bytes())
    return sum(path.stat().st_size for path in (place.root.store / "partial").glob(f"{digest}.*"))


def is_absent_or_correct(place: Workplace, right: dict[str, bytes]) -> None:
    bundle = place.root.bundle("small")
    for name, path in files_below(bundle).items():
        if path.name.endswith(".new"):
            continue
        # Somebody who works on envbuilder itself may change the tool between two fetches.
        if name.startswith("tool/"):
            assert zipfile.ZipFile(path).testzip() is None
        elif name == "bundle.json":
            verify_bundle(place.root, "small", Quiet())
        else:
            assert path.read_bytes() == right[name]
    for name, path in files_below(place.root.store).items():
        assert name.startswith("partial/") or sha256(path.read_bytes()) == name
    for path in (place.root.cache / "fetch").glob("*.json"):
        json.loads(path.read_bytes())


def all_at_once(place: Workplace, published: Published, before: Before) -> None:
    running = [place.start("fetch", place.recipe("small"), before=before) for _ in range(8)]
    ended = [one.wait() for one in running]
    assert [one.code for one in ended] == [0] * 8, [one.out for one in ended if one.code]
    is_whole(place, published)


def test_promise_02_file_locks_that_do_nothing_do_no_harm(place: Workplace, published: Published) -> None:
    """File locks that silently do nothing (Lustre, GPFS, some NFS) → still correct."""
    all_at_once(place, published, no_file_locks)


def test_promise_03_eight_fetches_at_once_all_succeed(place: Workplace, published: Published) -> None:
    """8 concurrent fetches of one bundle → all exit 0, the store verifies."""
    all_at_once(place, published, int)


Answers = Callable[[bytes, bytes, str, int], list[Fault]]
"""Given the right bytes, other ones of their number, the right ETag, and where to break off."""


def shifted(right: bytes, other: bytes, etag: str, at: int) -> list[Fault]:
    """The second answer begins 1000 bytes before what is asked for, and says so."""
    said = f"bytes {at - 1000}-{len(right) - 1001}/{len(right)}"
    body = bytes(1000) + right[:-1000]
    return [Fault(cut_after=at), Fault(body=body, etag=etag, headers={"Content-Range": said})]


SPLICES: dict[str, tuple[int, Answers]] = {
    "a short read": (0, lambda right, other, etag, at: [Fault(cut_after=at), Fault(cut_after=at // 3)]),
    "a wrong Content-Range": (0, shifted),
    "200 to a Range request": (
        0,
        lambda right, other, etag, at: [Fault(cut_after=at), Fault(ignore_range=True)],
    ),
    "a changed ETag": (0, lambda right, other, etag, at: [Fault(body=other, cut_after=at)]),
    "a changed ETag in a 206": (
        0,
        lambda right, other, etag, at: [
            Fault(body=other, etag=etag, cut_after=at),
            Fault(headers={"ETag": '"changed"'}),
        ],
    ),
    "a changed file under one ETag": (
        0,
        lambda right, other, etag, at: [Fault(body=other, etag=etag, cut_after=at)],
    ),
    "a changed file from then on": (
        5,
        lambda right, other, etag, at: [Fault(cut_after=at), *[Fault(body=other, etag=etag)] * 20],
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("code", "answers"), SPLICES.values(), ids=SPLICES)
def test_promise_04_pieces_of_two_files_are_never_put_together(
    place: Workplace,
    index: IndexServer,
    hub: HubServer,
    published: Published,
    origin: str,
    code: int,
    answers: Answers,
) -> None:
    """Short read, wrong Content-Range, 200 to a Range request, changed ETag → restart or a typed error, never
    a splice."""
    file, faults = faults_of(origin, index, hub, published)
    right = file.read_bytes()
    digest = sha256(right)
    etag = f'"{digest[:16] if origin == "index" else digest}"'
    faults += answers(right, bytes(byte ^ 1 for byte in right), etag, len(right) // 2)
    if code:
        fetch_is_refused(place, file, code)
    else:
        assert place.fetch("small").code == 0
        assert faults == []
        is_whole(place, published)
    asked = [headers for _, headers in index.requests] + [headers for *_, headers in hub.content_requests]
    assert f"bytes={len(right) // 2}-" in {headers.get("range") for headers in asked}


class RateLimit(list[Fault]):
    """Refuses for a second, and for another one whoever comes back before that."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.refused = 0
        self._fault = Fault(status=status, headers={"Retry-After": "1"})
        self._until = float("inf")

    def __bool__(self) -> bool:
        return time.monotonic() < self._until

    def pop(self, _: object = 0) -> Fault:
        self.refused += 1
        self._until = time.monotonic() + 1
        return self._fault


BOTH = f"""
name = "both"
requirements = ["plain"]
{TARGET}
[build.plain]
[model.tiny]
repo = "{REPO}"
"""


@pytest.mark.parametrize(
    ("command", "server", "what", "busy", "final"),
    [
        pytest.param("fetch small", "index", "one", 429, 404, id="a page of the index"),
        pytest.param("fetch small", "index", "one-1.0-py3-none-any.whl", 503, 410, id="a wheel"),
        pytest.param("fetch small", "hub", "model.safetensors", 429, 403, id="a model's weights"),
        pytest.param("lock both", "index", "plain-1.0.tar.gz", 503, 404, id="an sdist to be read"),
        pytest.param("lock both", "hub", REPO, 503, 403, id="the hub's API"),
        pytest.param("lock both", "hub", "config.json", 429, 410, id="a small file of a model"),
    ],
)
def test_promise_05_a_busy_server_is_asked_again_when_it_says_and_a_refusal_is_final(
    place: Workplace,
    index: IndexServer,
    hub: HubServer,
    command: str,
    server: str,
    what: str,
    busy: int,
    final: int,
) -> None:
    """429 and 503 → bounded retries that honour Retry-After; a permanent 4xx → none."""
    place.add("both", BOTH)
    faults: dict[str, Any] = (index if server == "index" else hub).faults
    verb, name = command.split()

    def run() -> int:
        return place.run(verb, place.recipe(name)).code

    faults[what] = limit = RateLimit(busy)
    assert run() == 0
    assert limit.refused == 1
    shutil.rmtree(place.root.path)
    place.lock("both").unlink(missing_ok=True)

    faults[what] = [Fault(status=busy, headers={"Retry-After": "0"})] * 100
    assert run() == 4
    assert 1 < 100 - len(faults[what]) <= 10

    faults[what] = [Fault(status=final)] * 100
    assert run() == 4
    assert len(faults[what]) == 99


@pytest.mark.parametrize("secure", [False, True], ids=["to another host", "from https to http"])
@pytest.mark.parametrize("from_netrc", [False, True], ids=["of the URL", "of netrc"])
def test_promise_06_an_indexs_credentials_go_nowhere_else(
    place: Workplace, hub: HubServer, published: Published, secure: bool, from_netrc: bool
) -> None:
    """Redirect to another host or from https to http → credentials are never forwarded."""
    certificate = Path(__file__).parent.parent / "lab" / "loopback.pem" if secure else None
    with (
        IndexServer(published.index, certificate=certificate) as first,
        IndexServer(published.index) as other,
    ):
        # From https to http it may be the very same host.
        elsewhere = other.origin if secure else other.origin.replace("127.0.0.1", "localhost")
        for name, path in (("one", "simple/one/"), (published.big.name, f"files/{published.big.name}")):
            first.faults[name] = [Fault(status=302, headers={"Location": f"{elsewhere}/{path}"})]
        if from_netrc:
            netrc = place.folder / "home" / ".netrc"
            netrc.parent.mkdir(exist_ok=True)
            netrc.write_text("machine 127.0.0.1 login user password secret\n")
            netrc.chmod(0o600)
        url = first.url if from_netrc else first.url.replace("//", "//user:secret@")
        # netrc's are for the hub too, if that has this name.
        hub_url = hub.endpoint.replace("127.0.0.1", "localhost")
        place = place.with_variables(PIP_INDEX_URL=url, PIP_TRUSTED_HOST="127.0.0.1", HF_ENDPOINT=hub_url)
        assert place.fetch("small").code == 0
        assert {headers.get("authorization") for _, headers in first.requests} == {"Basic dXNlcjpzZWNyZXQ="}
        assert {path for path, _ in other.requests} >= {"/simple/one/", f"/files/{published.big.name}"}
        assert not [path for path, headers in other.requests if "authorization" in headers]


@pytest.mark.parametrize("secure", [False, True], ids=["to another host", "from https to http"])
def test_promise_06_a_hubs_token_goes_nowhere_else(
    place: Workplace, published: Published, secure: bool
) -> None:
    """Redirect to another host or from https to http → credentials are never forwarded."""
    tls = None
    if secure:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(Path(__file__).parent.parent / "lab" / "loopback.pem")
    with HubServer(published.hub, tls=tls) as hub:
        hub.content_host = "127.0.0.1" if secure else "localhost"
        hub.tokens = hub.repos[REPO].readers = {"hf_secret"}
        hub.repos[REPO].private = True
        place = place.with_variables(
            HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_secret", PIP_TRUSTED_HOST="127.0.0.1"
        )
        for command in ("lock", "fetch"):
            place.succeed(command, place.recipe("small"))
        assert {headers.get("authorization") for *_, headers in hub.requests} == {"Bearer hf_secret"}
        assert hub.content_requests
        assert not [path for _, path, headers in hub.content_requests if "authorization" in headers]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("chunked", [True, False], ids=["without a length", "with its length"])
def test_promise_07_a_body_that_is_too_long_is_left_at_the_locked_size(
    place: Workplace, index: IndexServer, hub: HubServer, published: Published, origin: str, chunked: bool
) -> None:
    """A body longer than the locked size → stop there."""
    file, faults = faults_of(origin, index, hub, published)
    assert place.fetch("small").code == 0
    lose(place, file)
    size = file.stat().st_size
    faults.append(Fault(body=file.read_bytes() + bytes(8_000_000), chunked=chunked))
    # One byte more on the disk, and it would end as a full disk does: with 7.
    ended = fetch_is_refused(place, file, 5, before=partial(largest_file, size))
    assert ended.context["expected"] == f"size {size}"


@pytest.mark.parametrize("what", ["wheel", "weights", "small file"])
def test_promise_08_other_bytes_are_told_with_both_hashes_and_not_stored(
    place: Workplace, index: IndexServer, hub: HubServer, published: Published, what: str
) -> None:
    """Hash mismatch → expected and got, exit 5, nothing stored."""
    file = {"wheel": published.one, "weights": published.weights, "small file": published.config}[what]
    other = bytes(byte ^ 1 for byte in file.read_bytes())
    server: IndexServer | HubServer = index if what == "wheel" else hub
    server.faults[file.name] = [Fault(body=other)]
    ended = fetch_is_refused(place, file, 5)
    assert ended.context["expected"] == f"sha256 {sha256(file.read_bytes())}"
    assert ended.context["got"] == f"sha256 {sha256(other)}"
    assert sha256(other) not in {sha256(path.read_bytes()) for path in files_below(place.root.path).values()}


Edit = Callable[[dict[str, Any]], object]


def package(lock: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(package for package in lock["packages"] if package["name"] == "one")
    return found


def wheel(lock: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = package(lock)["wheels"][0]
    return found


def model(lock: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = lock["tool"]["envbuilder"]["models"][0]
    return found


LOOSE: dict[str, Edit] = {
    "a wheel without hashes": lambda lock: wheel(lock).pop("hashes"),
    "an empty table of hashes": lambda lock: wheel(lock).update(hashes={}),
    "MD5 alone": lambda lock: wheel(lock).update(hashes={"md5": "0" * 32}),
    "SHA-1 alone": lambda lock: wheel(lock).update(hashes={"sha1": "0" * 40}),
    "half a hash": lambda lock: wheel(lock).update(hashes={"sha256": "0" * 32}),
    "a wheel without a size": lambda lock: wheel(lock).pop("size"),
    "a wheel's URL": lambda lock: wheel(lock).update(url="https://files.example.org/one.whl"),
    "a package without a version": lambda lock: package(lock).pop("version"),
    "a folder": lambda lock: (package(lock).pop("wheels"), package(lock).update(directory={"path": "x"})),
    "a branch in git": lambda lock: (
        package(lock).pop("wheels"),
        package(lock)["tool"]["envbuilder"].update(git={"commit": "main", "submodules": {}}),
    ),
    "a branch of a model": lambda lock: model(lock).update(commit="main"),
    "half a commit of a model": lambda lock: model(lock).update(commit="0" * 12),
    "a model's file without a hash": lambda lock: model(lock)["files"][0].pop("sha256"),
    "a model's file with a weak hash": lambda lock: model(lock)["files"][0].update(sha256="0" * 40),
    "a model's file without a size": lambda lock: model(lock)["files"][0].pop("size"),
}


@pytest.mark.parametrize("edit", LOOSE.values(), ids=LOOSE)
def test_promise_09_what_is_not_pinned_is_refused_before_any_socket_opens(
    place: Workplace, edit: Edit
) -> None:
    """A missing or weak hash, an unpinned requirement → refused before any socket opens."""
    assert place.fetch("small", before=no_sockets).code == OPENED_A_SOCKET  # as it is, the lock is good
    lock = tomllib.loads(place.lock("small").read_text(encoding="utf-8"))
    edit(lock)
    place.lock("small").write_text(tomli_w.dumps(lock), encoding="utf-8")
    ended = place.fetch("small", before=no_sockets)
    assert ended.code == 3, ended
    assert "envbuilder lock" in ended.told["remedy"]


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL.replace('"one"', '"one @ https://files.example.org/one-1.0-py3-none-any.whl"'),
        SMALL + 'revision = "main"\n',
        SMALL.replace(
            "[model.tiny]", '[build.one.git]\nurl = "https://example.org/x"\ncommit = "main"\n[model.tiny]'
        ),
    ],
    ids=["a requirement by a URL", "a branch of a model", "a branch in git"],
)
def test_promise_09_a_recipe_that_pins_nothing_is_refused_before_any_socket_opens(
    place: Workplace, recipe: str
) -> None:
    """A missing or weak hash, an unpinned requirement → refused before any socket opens."""
    assert place.run("lock", place.recipe("small"), before=no_sockets).code == OPENED_A_SOCKET
    place.add("small", recipe)
    assert place.run("lock", place.recipe("small"), before=no_sockets).code == 3
    assert place.fetch("small", before=no_sockets).code == 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o640)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.chmod(0o640)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["files/one-1.0-py3-none-any.whl", "models/tiny/model.safetensors"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_promise_10_damage_in_the_store_is_found_listed_and_repaired(
    place: Workplace, published: Published, name: str, damage: Callable[[Path], None]
) -> None:
    """Bit flip or truncation in the store → found on open; `bundle verify` lists it, `fetch` repairs it."""
    assert place.fetch("small").code == 0
    stored = place.root.store / sha256(published.served[name].read_bytes())
    damage(stored)
    ended = place.run("bundle", "verify", "small")
    assert (ended.code, list(ended.context)) == (5, [name])
    assert place.succeed("fetch", place.recipe("small"))["transferred_files"] == 1
    is_whole(place, published)

    damage(stored)
    shutil.rmtree(place.root.bundle("small"))  # now it is the store that is asked
    assert place.succeed("fetch", place.recipe("small"))["transferred_files"] == 1
    is_whole(place, published)


@pytest.mark.parametrize("what", ["wheel", "weights", "tool"])
def test_promise_11_a_full_disk_is_told_with_path_and_bytes_and_leaves_no_partial(
    place: Workplace, published: Published, what: str
) -> None:
    """Disk full → typed error with the path and the bytes needed, no partial left."""
    assert place.fetch("small").code == 0
    bundle = place.root.bundle("small")
    (tool,) = (bundle / "tool").iterdir()
    lacking = {"wheel": published.big, "weights": published.weights, "tool": tool}[what]
    size = lacking.stat().st_size
    lose(place, lacking)
    ended = place.fetch("small", before=partial(largest_file, size // 2))
    assert ended.code == 7, ended
    assert ended.context["bytes needed"] == str(size)
    assert Path(ended.context["file"]).is_relative_to(place.root.path)
    assert not (bundle / "bundle.json").exists()
    assert not [path for path in place.root.path.rglob("*") if path.suffix in (".part", ".new")]
    assert place.fetch("small").code == 0
    is_whole(place, published)


@pytest.fixture
def read_only(place: Workplace) -> Iterator[Workplace]:
    """A workplace with both bundles, of which nobody may write anything."""
    for name in ("small", "source"):
        assert place.fetch(name).code == 0
    paths = sorted([place.root.path, *place.root.path.rglob("*")])
    modes = {path: path.stat().st_mode for path in paths}
    in_cache = {path for path in paths if path == place.root.path or path.is_relative_to(place.root.cache)}
    for path in set(paths) - in_cache:
        path.chmod(modes[path] & ~0o222)
    # The files have changed in that, so they are read once more, and that is noted.
    for name in ("small", "source"):
        assert place.fetch(name).code == 0
    for path in in_cache:
        if path.exists():
            path.chmod(modes[path] & ~0o222)
    yield place
    for path in paths:
        path.chmod(modes[path])


def test_promise_12_a_read_only_bundle_serves_without_a_write(
    read_only: Workplace, index: IndexServer, hub: HubServer
) -> None:
    """Read-only bundle → hits work with no write at all."""
    place = read_only
    index.requests.clear()
    hub.requests.clear()

    def everything() -> dict[Path, tuple[int, ...]]:
        # Root may write whatever the mode says: this tells it.
        return state([place.root.path, *place.root.path.rglob("*")])

    before = everything()
    for name in ("small", "source"):
        assert place.succeed("fetch", place.recipe(name))["transferred_files"] == 0
        place.succeed("bundle", "verify", name)
        place.succeed("bundle", "sbom", name)
        place.succeed("bundle", "pack", name, "--output", place.folder / f"{name}.tar")
    place.succeed("bundle", "diff", "small", "source")
    assert everything() == before

    place.root.path.chmod(0o750)  # for the wheelhouse and the env
    (place.root.path / "cache").chmod(0o750)
    given = [path for name in ("bundles", "store") for path in (place.root.path / name).rglob("*")]
    before = state(given)
    place.succeed("compile", place.recipe("source"))
    assert state(given) == before
    assert index.requests == []
    assert hub.requests == []


@pytest.mark.parametrize("umask", [0o000, 0o077], ids=["umask 000", "umask 077"])
@pytest.mark.parametrize("parent", [0o2750, 0o2770], ids=["a user's folder", "a group's folder"])
def test_promise_13_modes_are_fixed_whatever_the_umask(place: Workplace, umask: int, parent: int) -> None:
    """umask 000 and 077 → fixed modes (published files 0440 or 0640, folders 2750 or 2770, group
    inherited)."""
    place.root.path.mkdir()
    if os.getuid() == 0:
        os.chown(place.root.path, -1, 61_000)  # a group that nobody need have
    place.root.path.chmod(parent)
    assert place.fetch("small", before=partial(os.umask, umask)).code == 0
    locked = {sha256(path.read_bytes()) for path in files_below(place.root.store).values()}
    for path in place.root.path.rglob("*"):
        found = path.stat()
        of_lock = path.is_file() and sha256(path.read_bytes()) in locked
        expected = parent if path.is_dir() else 0o440 if of_lock else 0o640
        assert (oct(stat.S_IMODE(found.st_mode)), found.st_gid) == (
            oct(expected),
            place.root.path.stat().st_gid,
        ), path


@pytest.mark.parametrize(
    "folder", ["store", "store/partial", "bundles", "bundles/small", "bundles/small/files"]
)
def test_promise_13_what_everybody_may_write_into_is_refused(place: Workplace, folder: str) -> None:
    """umask 000 and 077 → world-writable → refused."""
    assert place.fetch("small").code == 0
    (place.root.path / folder).chmod(0o2777)
    (place.root.bundle("small") / "recipe.toml").unlink()
    for words in (["fetch", place.recipe("small")], ["bundle", "verify", "small"]):
        if words[0] == "fetch" or folder.startswith("bundles"):
            ended = place.run(*words)
            assert ended.code == 7, ended
            assert ended.told["remedy"] == f"chmod o-w {place.root.path / folder}"


def test_promise_13_what_a_group_may_write_into_is_hashed_again_on_use(place: Workplace) -> None:
    """umask 000 and 077 → group-writable by the site's shared group → allowed, every byte hashed again on
    use."""
    place.root.path.mkdir()
    place.root.path.chmod(0o2770)
    for command in ("fetch", "compile", "install"):
        place.succeed(command, place.recipe("source"))
    wheel = place.root.bundle("source") / "files/one-1.0-py3-none-any.whl"
    content = wheel.read_bytes().replace(b"__version__", b"__VERSION__", 1)
    wheel.unlink()
    wheel.write_bytes(content)
    ended = place.run("install", place.recipe("source"), "--reinstall")
    assert (ended.code, ended.context["file"]) == (5, str(wheel))


GUESSED = "guessed"


def guessed_names() -> None:
    """The first name that is tried for a temporary file is one that somebody has guessed."""
    others = tempfile._RandomNameSequence()  # type: ignore[attr-defined]
    tempfile._get_candidate_names = lambda: chain([GUESSED], others)  # type: ignore[attr-defined]
    setattr(envbuilder.fetch.files, "token_hex", lambda _: GUESSED)  # noqa: B010 - it is no export of it


def planted(place: Workplace) -> dict[str, list[Path]]:
    """Where the links lie, by kind."""
    root, bundle = place.root, place.root.bundle("small")
    lock = parse_lock("small", place.lock("small").read_text(encoding="utf-8"))
    locked = [file for entry in lock.pylock.packages for file in entry.wheels or ()]
    digests = [file.hashes["sha256"] for file in locked] + [
        file.sha256 for model in lock.models for file in model.files
    ]
    final = [
        *(bundle / "files" / file.filename for file in locked),
        *(bundle / "models/tiny" / file.name for model in lock.models for file in model.files),
        *(bundle / name for name in ("bundle.json", "recipe.toml", "start.py", place.lock("small").name)),
        root.cache / "fetch/small.json",
    ]
    return {
        "temporary": [
            *(root.store / "partial" / f"{digest}.{GUESSED}.part" for digest in digests),
            *(path.with_name(f".{path.name}.{GUESSED}.new") for path in (*final, place.lock("small"))),
            *(folder / f".{GUESSED}.new" for folder in (bundle / "files", bundle / "models/tiny")),
        ],
        "final": [*final, *(root.store / digest for digest in digests), place.lock("small")],
    }


@pytest.mark.parametrize("kind", ["temporary", "final"])
def test_promise_14_a_planted_link_leaves_its_target_untouched(
    place: Workplace, published: Published, kind: str
) -> None:
    """A symlink planted at a temporary or lock path → its target untouched."""
    target = place.folder / "precious"
    target.write_text("years of work")
    links = planted(place)[kind]
    place.lock("small").unlink()
    before = state([target])
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    for command in ("lock", "fetch"):
        place.succeed(command, place.recipe("small"), before=guessed_names if kind == "temporary" else int)
        assert state([target]) == before
    is_whole(place, published)
    assert all(not link.is_symlink() for link in links if kind == "final")


@pytest.mark.parametrize("folder", ["bundles/small", "bundles/small/files", "store", "store/partial"])
def test_promise_14_a_planted_link_to_a_folder_leaves_what_is_in_it_untouched(
    place: Workplace, folder: str
) -> None:
    """A symlink planted at a temporary or lock path → its target untouched."""
    target = place.folder / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("years of work")
    before = state([target / "precious"])
    link = place.root.path / folder
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    ended = place.fetch("small")
    assert ended.code in (0, 5, 7), ended
    assert state([target / "precious"]) == before
    if ended.code == 0:
        verify_bundle(place.root, "small", Quiet())
