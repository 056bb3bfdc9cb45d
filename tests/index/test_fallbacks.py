"""A locked file that its index lacks: pip's find-links and extra indexes may have it. The hash decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from envbuilder.errors import IntegrityError, NetworkError
from envbuilder.index import Index, open_client, open_indexes
from envbuilder.lock import LockedFile
from tests.lab.index_server import Fault, IndexServer
from tests.lab.packages import make_sdist, make_wheel

Open = Callable[..., Index]


@pytest.fixture
def opened(own_settings: Path, monkeypatch: pytest.MonkeyPatch, server: IndexServer) -> Iterator[Open]:
    """opened(find_links=…, extra_index_url=…) → the default index with these settings of pip's."""
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with open_client() as client:

        def opened(**settings: object) -> Index:
            for option, value in settings.items():
                monkeypatch.setenv(f"PIP_{option.upper()}", str(value))
            return open_indexes(["default"], client)["default"]

        yield opened


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[IndexServer]:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with IndexServer(folder) as server:
        yield server


def locked(path: Path) -> LockedFile:
    package, version = path.name.split("-")[:2]
    return LockedFile(
        package,
        version.removesuffix(".tar.gz"),
        path.name,
        path.stat().st_size,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "default",
        is_sdist=path.name.endswith(".tar.gz"),
    )


def test_the_index_itself_comes_first(server: IndexServer, opened: Open, elsewhere: IndexServer) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    make_wheel(elsewhere.folder, "thing", "1.0")

    offer = opened(extra_index_url=elsewhere.url, find_links=elsewhere.folder).offer_of(locked(wheel))

    assert (offer.url, offer.path) == (server.file_url(wheel.name), None)
    assert elsewhere.requests == []


@pytest.mark.parametrize(("what", "announce"), [("sha256", "announced_sha256"), ("size", "announced_size")])
def test_other_bytes_under_that_name_in_the_index_are_refused_whatever_is_elsewhere(
    server: IndexServer, opened: Open, tmp_path: Path, what: str, announce: str
) -> None:
    wheel = make_wheel(server.folder, "thing", "1.0")
    getattr(server, announce)[wheel.name] = "0" * 64 if what == "sha256" else 5

    with pytest.raises(IntegrityError, match="announces another") as caught:
        opened(find_links=server.folder).offer_of(locked(wheel))

    assert caught.value.context["got"].startswith(what)


@pytest.mark.parametrize("status", [404, 403])
def test_what_the_index_lacks_is_taken_from_an_extra_index_if_the_hash_is_the_locked_one(
    server: IndexServer, opened: Open, elsewhere: IndexServer, tmp_path: Path, status: int
) -> None:
    server.faults["thing"] = [Fault(status=status)]
    wheel = make_wheel(elsewhere.folder, "thing", "1.0")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    make_wheel(wrong, "thing", "1.0", files={"thing.py": "other"})
    with IndexServer(wrong) as first:
        offer = opened(extra_index_url=f"{first.url} {elsewhere.url}").offer_of(locked(wheel))

    assert offer.url == elsewhere.file_url(wheel.name)


@pytest.mark.parametrize("form", ["folder", "file url", "file", "page", "remote page"])
def test_what_the_index_lacks_is_taken_from_find_links_in_all_their_forms(
    server: IndexServer, opened: Open, elsewhere: IndexServer, tmp_path: Path, form: str
) -> None:
    make_wheel(server.folder, "thing", "2.0")  # the index knows the package, but not this file
    folder = tmp_path / "links and more"
    folder.mkdir()
    sdist = make_sdist(folder, "thing", "1.0")
    page = tmp_path / "links.html"
    page.write_text(f'<a href="{folder.as_uri()}/{sdist.name}">thing</a>')
    make_sdist(elsewhere.folder, "thing", "1.0")
    elsewhere.html_only = True
    places = {
        # Spaces part the entries of pip's list.
        "folder": elsewhere.folder,
        "file url": folder.as_uri(),
        "file": sdist.as_uri(),
        "page": page,
        "remote page": f"{elsewhere.url}/thing/",
    }

    offer = opened(find_links=f"/nonexistent {places[form]}").offer_of(locked(sdist))

    if form == "remote page":
        assert (offer.url, offer.path) == (elsewhere.file_url(sdist.name), None)
    else:
        assert offer.path is not None
        assert offer.path.read_bytes() == sdist.read_bytes()


def test_a_local_file_with_other_bytes_is_passed_over(
    server: IndexServer, opened: Open, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("other", "same-size", "right")]
    for folder in folders:
        folder.mkdir()
    right = make_wheel(folders[2], "thing", "1.0")
    (folders[0] / right.name).write_bytes(b"other")
    (folders[1] / right.name).write_bytes(b"\x00" * right.stat().st_size)

    offer = opened(find_links=" ".join(map(str, folders))).offer_of(locked(right))

    assert offer.path == right


def test_what_nobody_has_is_named_together_with_a_place_that_failed(
    server: IndexServer, opened: Open, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path, "thing", "1.0")

    with pytest.raises(NetworkError, match=r"default has no thing-1\.0") as caught:
        opened(extra_index_url="http://user:secret@127.0.0.1:9/simple").offer_of(locked(wheel))

    assert "extra-index-url 1" in caught.value.context["also"]
    assert "secret" not in str(caught.value.to_json())


@pytest.mark.parametrize("place", ["http://user:secret@127.0.0.1:9/links.html", "broken", "http://[x"])
def test_find_links_that_can_not_be_read_are_named(
    server: IndexServer, opened: Open, tmp_path: Path, place: str
) -> None:
    wheel = make_wheel(tmp_path, "thing", "1.0")
    (tmp_path / "broken.html").write_text('<a href="//[broken">thing</a>')
    place = str(tmp_path / "broken.html") if place == "broken" else place

    with pytest.raises(NetworkError, match=r"has no thing-1\.0") as caught:
        opened(find_links=place).offer_of(locked(wheel))

    assert "find-links" in caught.value.context["also"]
    assert "secret" not in str(caught.value.to_json())


def test_an_index_that_fails_is_not_replaced(
    server: IndexServer, opened: Open, elsewhere: IndexServer
) -> None:
    wheel = make_wheel(elsewhere.folder, "thing", "1.0")
    server.faults["thing"] = [Fault(status=500)]

    with pytest.raises(NetworkError, match="status 500"):
        opened(find_links=elsewhere.folder).offer_of(locked(wheel))


def test_only_the_default_index_falls_back(
    server: IndexServer, opened: Open, elsewhere: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(elsewhere.folder, "thing", "1.0")
    opened(find_links=elsewhere.folder, extra_index_url=elsewhere.url)
    monkeypatch.setenv("ENVBUILDER_INDEX_SITE_URL", server.url)

    with open_client() as client, pytest.raises(NetworkError, match="The index site has no"):
        open_indexes(["site"], client)["site"].offer_of(locked(wheel))
