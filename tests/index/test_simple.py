"""Indexes on loopback, in both of their languages."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import httpx
import pytest

import envbuilder.index.asking
from envbuilder.errors import NetworkError
from envbuilder.index import Index
from tests.lab.index_server import Fault, IndexServer
from tests.lab.packages import make_wheel


@pytest.fixture
def index(server: IndexServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setattr(envbuilder.index.asking, "_FIRST_PAUSE", 0.0)
    return Index("default", server.url, client, retries=2)


@pytest.mark.parametrize("html_only", [False, True])
def test_files_have_url_hashes_requires_python_and_yanked_in_both_languages(
    server: IndexServer, index: Index, html_only: bool
) -> None:
    server.html_only = html_only
    old = make_wheel(server.folder, "Some.Thing", "1.0")
    new = make_wheel(server.folder, "Some.Thing", "2.0")
    server.requires_python[new.name] = ">=3.12"
    server.yanked.add(old.name)

    files = {file.filename: file for file in index.files("some_thing")}

    assert set(files) == {old.name, new.name}
    assert files[new.name].url == server.file_url(new.name)
    assert files[new.name].sha256 == hashlib.sha256(new.read_bytes()).hexdigest()
    assert files[new.name].size == (None if html_only else new.stat().st_size)
    assert (files[new.name].requires_python, files[old.name].requires_python) == (">=3.12", None)
    assert (files[new.name].yanked, files[old.name].yanked) == (False, True)
    assert files[new.name].metadata_sha256 == hashlib.sha256(metadata_in(new)).hexdigest()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            "application/vnd.pypi.simple.v1+json",
            '{"meta": {"api-version": "1.0"}, "files": [{"filename": "thing-1-py3-none-any.whl",'
            ' "url": "x", "hashes": {}, "dist-info-metadata": {"sha256": "ab12"}}]}',
        ),
        ("text/html", '<a href="thing-1-py3-none-any.whl" data-dist-info-metadata="sha256=ab12">x</a>'),
    ],
    ids=["json", "html"],
)
def test_metadata_is_known_under_its_older_name_too(
    server: IndexServer, index: Index, kind: str, body: str
) -> None:
    server.faults["thing"] = [Fault(headers={"Content-Type": kind}, body=body.encode())]

    assert index.files("thing")[0].metadata_sha256 == "ab12"


def test_a_size_that_the_listing_lacks_is_asked_of_the_server(server: IndexServer, index: Index) -> None:
    server.html_only = True
    wheel = make_wheel(server.folder, "thing", "1.0")

    assert index.complete(index.files("thing")[0]).size == wheel.stat().st_size


def test_a_file_without_a_hash_is_refused(server: IndexServer, index: Index) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    server.announced_sha256[wheel.name] = None

    with pytest.raises(NetworkError, match="no sha256"):
        index.complete(index.files("thing")[0])


def test_each_package_is_asked_for_once(server: IndexServer, index: Index) -> None:
    make_wheel(server.folder, "thing", "1.0")

    assert index.files("thing") == index.files("Thing")
    assert [path for path, _ in server.requests] == ["/simple/thing/"]


def test_a_busy_index_is_asked_again_as_often_as_it_may_be(server: IndexServer, index: Index) -> None:
    make_wheel(server.folder, "thing", "1.0")
    server.faults["thing"] = [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"})]

    assert len(index.files("thing")) == 1

    server.faults["other"] = [Fault(status=503)] * 4
    with pytest.raises(NetworkError, match="other: status 503"):
        index.files("other")
    assert len(server.faults["other"]) == 1


def test_an_unknown_package_is_asked_for_once_and_named(server: IndexServer, index: Index) -> None:
    with pytest.raises(NetworkError, match="nothing-here: status 404") as caught:
        index.files("nothing-here")

    assert "ENVBUILDER_INDEX_DEFAULT_URL" in caught.value.remedy
    assert index.offers("nothing-here") == ()
    assert len(server.requests) == 1


def test_an_answer_that_is_no_indexs_is_a_network_error(server: IndexServer, index: Index) -> None:
    server.faults["thing"] = [
        Fault(headers={"Content-Type": "application/vnd.pypi.simple.v1+json"}, body=b'{"meta": 1')
    ]

    with pytest.raises(NetworkError, match="no package index's"):
        index.files("thing")


def test_an_answer_without_end_is_given_up(server: IndexServer, index: Index) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    server.faults[f"{wheel.name}.metadata"] = [Fault(body=b"x" * (5 << 20))]

    with pytest.raises(NetworkError, match="more than"):
        index.metadata(index.files("thing")[0])


def test_files_on_the_indexs_own_host_carry_its_credentials(
    server: IndexServer, client: httpx.Client
) -> None:
    make_wheel(server.folder, "thing", "1.0")

    (file,) = Index("default", server.url.replace("http://", "http://user:secret@"), client).files("thing")

    assert file.url.startswith("http://user:secret@127.0.0.1")


def test_an_error_never_shows_credentials(client: httpx.Client) -> None:
    with pytest.raises(NetworkError) as caught:
        Index("default", "http://user:secret@127.0.0.1:9/simple", client, retries=0).files("thing")

    assert "secret" not in str(caught.value.to_json())


def test_metadata_is_read_from_beside_the_wheel(server: IndexServer, index: Index) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")

    assert index.metadata(index.files("thing")[0]) == metadata_in(wheel)
    assert server.file_requests() == []


@pytest.mark.parametrize("how", ["untold", "wrong", "missing"])
def test_metadata_comes_from_the_wheel_itself_where_there_is_none_to_believe_beside_it(
    server: IndexServer, index: Index, how: str
) -> None:
    # Its METADATA comes first, where a look at its end doesn't meet it.
    wheel = make_wheel(server.folder, "thing", "1.0", files={"big.bin": b"\x00" * (1 << 20)})
    first = metadata_in(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing-1.0.dist-info/METADATA", first)
        archive.writestr("big.bin", b"\x00" * (1 << 20))
    server.core_metadata = how != "untold"
    server.faults[f"{wheel.name}.metadata"] = [Fault(status=404 if how == "missing" else 200, body=b"other")]

    assert index.metadata(index.files("thing")[0]) == first
    ranges = [headers["range"] for path, headers in server.requests if path.endswith(".whl")]
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges]
    assert sum(end - start + 1 for start, end in asked) < wheel.stat().st_size / 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(status=404),
        Fault(headers={"Content-Range": "bytes 0-9/10"}),
    ],
    ids=["no ranges", "missing", "another range"],
)
def test_metadata_that_can_not_be_read_is_none(server: IndexServer, index: Index, fault: Fault) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    server.core_metadata = False
    server.faults[wheel.name] = [fault] * 3

    assert index.metadata(index.files("thing")[0]) is None


def test_a_wheel_that_is_no_archive_or_whose_metadata_is_a_bomb_has_no_metadata(
    server: IndexServer, index: Index
) -> None:
    server.core_metadata = False
    (server.folder / "junk-1.0-py3-none-any.whl").write_bytes(b"no archive" * 100)
    with zipfile.ZipFile(server.folder / "bomb-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb-1.0.dist-info/METADATA", b"x" * (64 << 20))
    server.requires_python = dict.fromkeys(("junk-1.0-py3-none-any.whl", "bomb-1.0-py3-none-any.whl"), "")

    assert index.metadata(index.files("junk")[0]) is None
    assert index.metadata(index.files("bomb")[0]) is None


def metadata_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("/METADATA"))
