"""Downloads from a real server on loopback that misbehaves as servers and proxies do."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

import envbuilder.download
from envbuilder.download import download
from envbuilder.errors import EnvbuilderError, IntegrityError, MismatchError, NetworkError
from tests.lab.index_server import Fault, IndexServer, loopback_client

NAME = "thing-1.0-py3-none-any.whl"
BODY = bytes(range(251)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
ETAG = f'"{SHA256[:16]}"'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IndexServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(BODY)
    with IndexServer(folder) as server:
        yield server


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with loopback_client() as client:
        yield client


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "part"


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envbuilder.download, "_PAUSES", (0.0, 0.0, 0.0))


def get(server: IndexServer, client: httpx.Client, part: Path) -> list[int]:
    told: list[int] = []
    download(client, server.file_url(NAME), sha256=SHA256, size=len(BODY), part=part, on_bytes=told.append)
    assert part.read_bytes() == BODY
    assert sum(told) == len(BODY)
    return told


def refused(
    server: IndexServer, client: httpx.Client, part: Path, kind: type[EnvbuilderError]
) -> EnvbuilderError:
    with pytest.raises(kind) as caught:
        get(server, client, part)
    return caught.value


def ranges(server: IndexServer) -> list[str | None]:
    return [headers.get("range") for _, headers in server.requests]


def test_a_file_arrives_in_one_request(server: IndexServer, client: httpx.Client, part: Path) -> None:
    get(server, client, part)
    assert ranges(server) == [None]
    assert server.requests[0][1]["accept-encoding"] == "identity"


def test_an_interrupted_download_goes_on_where_it_stopped(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(BODY[:1000])
    get(server, client, part)
    assert ranges(server) == ["bytes=1000-"]


def test_a_whole_partial_file_needs_no_request(server: IndexServer, client: httpx.Client, part: Path) -> None:
    part.write_bytes(BODY)
    get(server, client, part)
    assert server.requests == []


def test_a_lost_connection_is_taken_up_again(server: IndexServer, client: httpx.Client, part: Path) -> None:
    server.faults[NAME] = [Fault(cut_after=100_000), Fault(cut_after=50_000)]
    get(server, client, part)
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert [headers.get("if-range") for _, headers in server.requests] == [None, ETAG, ETAG]


def test_a_file_that_changes_on_the_server_meanwhile_is_not_spliced(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(body=b"x" * len(BODY), cut_after=100_000)]
    told = get(server, client, part)
    assert -100_000 in told
    assert ranges(server) == [None, "bytes=100000-"]


def test_nor_is_it_where_the_server_sends_no_etag(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    no_etag = {"ETag": ""}
    server.faults[NAME] = [
        Fault(body=b"x" * len(BODY), headers=no_etag, cut_after=100_000),
        Fault(headers=no_etag),
    ]
    get(server, client, part)
    assert ranges(server) == [None, "bytes=100000-", None]


def test_a_file_that_changed_since_an_earlier_run_is_not_spliced(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(b"x" * 1000)
    get(server, client, part)
    assert ranges(server) == ["bytes=1000-", None]


@pytest.mark.parametrize("etag", ['W/"weak"', '"torn', ""])
def test_only_a_strong_etag_is_sent_back(
    server: IndexServer, client: httpx.Client, part: Path, etag: str
) -> None:
    server.faults[NAME] = [Fault(headers={"ETag": etag}, cut_after=1000)]
    get(server, client, part)
    assert "if-range" not in server.requests[1][1]


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"another"'},
        {"Content-Range": f"bytes 999-{len(BODY) - 1}/{len(BODY)}"},
        {"Content-Range": f"bytes 1000-{len(BODY) - 1}/{len(BODY) + 1}"},
        {"Content-Range": "nonsense"},
    ],
    ids=["etag", "start", "total", "nonsense"],
)
@pytest.mark.usefixtures("_impatient")
def test_another_range_than_asked_for_is_not_taken(
    server: IndexServer, client: httpx.Client, part: Path, headers: dict[str, str]
) -> None:
    server.faults[NAME] = [Fault(cut_after=1000), Fault(headers=headers)]
    told = get(server, client, part)
    assert -1000 in told
    assert ranges(server) == [None, "bytes=1000-", None]


def test_a_server_without_ranges_sends_the_whole_file(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(BODY[:1000])
    server.faults[NAME] = [Fault(ignore_range=True)]
    told = get(server, client, part)
    assert told[:2] == [1000, -1000]
    assert ranges(server) == ["bytes=1000-"]


def test_a_partial_file_torn_by_a_crash_is_fetched_whole(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(bytes(1000))
    get(server, client, part)
    assert ranges(server) == ["bytes=1000-", None]


def test_a_partial_file_that_is_too_long_is_fetched_whole(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(BODY + b"more")
    get(server, client, part)
    assert ranges(server) == [None]


def test_other_bytes_of_the_same_length_are_refused(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    wrong = b"?" + BODY[1:]
    server.faults[NAME] = [Fault(body=wrong)]
    error = refused(server, client, part, IntegrityError)
    assert error.exit_code == 5
    assert error.context["expected"] == f"sha256 {SHA256}"
    assert error.context["got"] == f"sha256 {hashlib.sha256(wrong).hexdigest()}"


def test_a_body_that_never_ends_is_left_at_the_locked_size(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(body=BODY + bytes(10_000_000), chunked=True)]
    refused(server, client, part, IntegrityError)
    assert part.stat().st_size <= len(BODY)


def test_an_announced_length_that_differs_is_refused_before_the_body(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(body=b"<html>log in first</html>")]
    error = refused(server, client, part, IntegrityError)
    assert error.context["got"] == "size 25"
    assert part.stat().st_size == 0


@pytest.mark.usefixtures("_impatient")
def test_a_body_that_ends_early_without_saying_so_is_a_network_error(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(body=BODY[:-1], chunked=True, etag='"e"')] * 9
    assert "stopped after" in str(refused(server, client, part, NetworkError))


@pytest.mark.parametrize("retry_after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"], ids=["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(
    server: IndexServer, client: httpx.Client, part: Path, status: int, retry_after: str
) -> None:
    server.faults[NAME] = [Fault(status=status, headers={"Retry-After": retry_after})] * 3
    get(server, client, part)
    assert len(server.requests) == 4


def test_a_server_that_stays_busy_is_given_up_with_its_status(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(status=503, headers={"Retry-After": "0"})] * 50
    error = refused(server, client, part, NetworkError)
    assert "503" in error.message
    assert error.exit_code == 4
    assert len(server.requests) == 6


def test_waiting_for_a_busy_server_can_be_stopped(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    server.faults[NAME] = [Fault(status=503, headers={"Retry-After": "3600"})]

    def stop(more: int) -> None:
        assert more == 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(client, server.file_url(NAME), sha256=SHA256, size=len(BODY), part=part, on_bytes=stop)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_refusal_is_not_asked_again(
    server: IndexServer, client: httpx.Client, part: Path, status: int
) -> None:
    server.faults[NAME] = [Fault(status=status)]
    assert str(status) in refused(server, client, part, NetworkError).message
    assert len(server.requests) == 1


@pytest.mark.usefixtures("_impatient")
def test_a_server_that_is_away_is_a_network_error_without_credentials_in_it(
    server: IndexServer, client: httpx.Client, part: Path
) -> None:
    with IndexServer(server.folder) as gone:
        url = gone.file_url(NAME).replace("//", "//user:secret@")
    with pytest.raises(NetworkError) as caught:
        download(client, url, sha256=SHA256, size=len(BODY), part=part, on_bytes=lambda _: None)
    assert "secret" not in str(caught.value.to_json())


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://127.0.0.1:port/x"])
def test_only_http_is_spoken(client: httpx.Client, part: Path, url: str) -> None:
    with pytest.raises(NetworkError):
        download(client, url, sha256=SHA256, size=len(BODY), part=part, on_bytes=lambda _: None)


def test_credentials_are_not_forwarded_to_another_host(
    server: IndexServer, part: Path, tmp_path: Path
) -> None:
    with IndexServer(server.folder) as other, loopback_client(auth=("user", "secret")) as client:
        server.faults[NAME] = [
            Fault(status=302, headers={"Location": server.file_url(NAME)}),
            Fault(status=302, headers={"Location": other.file_url(NAME)}),
        ]
        get(server, client, part)
        assert ["authorization" in headers for _, headers in server.requests] == [True, True]
        assert ["authorization" in headers for _, headers in other.requests] == [False]


def test_redirects_in_a_circle_end(server: IndexServer, client: httpx.Client, part: Path) -> None:
    server.faults[NAME] = [Fault(status=302, headers={"Location": server.file_url(NAME)})] * 100
    refused(server, client, part, NetworkError)


def test_a_link_planted_at_the_partial_path_leaves_its_target_untouched(
    server: IndexServer, client: httpx.Client, part: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    part.symlink_to(target)
    refused(server, client, part, MismatchError)
    assert target.read_text() == "mine"


LARGE_NAME = "large-1.0-py3-none-any.whl"
LARGE = bytes(range(253)) * 20_000
"""Of a size that is read from the socket itself."""


@pytest.fixture
def large(server: IndexServer) -> IndexServer:
    (server.folder / LARGE_NAME).write_bytes(LARGE)
    return server


def get_large(url: str, client: httpx.Client, part: Path) -> list[int]:
    told: list[int] = []
    digest = hashlib.sha256(LARGE).hexdigest()
    download(client, url, sha256=digest, size=len(LARGE), part=part, on_bytes=told.append)
    assert part.read_bytes() == LARGE
    assert sum(told) == len(LARGE)
    return told


@pytest.fixture
def through_httpx(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the pieces of bodies that httpx gives."""
    pieces: list[int] = []
    iter_raw = httpx.Response.iter_raw

    def counted(response: httpx.Response) -> Iterator[bytes]:
        for chunk in iter_raw(response):
            pieces.append(len(chunk))
            yield chunk

    monkeypatch.setattr(httpx.Response, "iter_raw", counted)
    return pieces


def test_a_large_file_arrives_in_one_request_past_httpx(
    large: IndexServer, client: httpx.Client, part: Path, through_httpx: list[int]
) -> None:
    get_large(large.file_url(LARGE_NAME), client, part)
    assert ranges(large) == [None]
    assert len(through_httpx) == 1


def test_the_next_file_after_a_large_one_arrives(
    large: IndexServer, client: httpx.Client, part: Path, tmp_path: Path
) -> None:
    get_large(large.file_url(LARGE_NAME), client, part)
    get(large, client, tmp_path / "next")
    get_large(large.file_url(LARGE_NAME), client, tmp_path / "again")
    assert ranges(large) == [None, None, None]


def test_a_large_file_is_taken_up_again_where_the_connection_was_lost(
    large: IndexServer, client: httpx.Client, part: Path
) -> None:
    large.faults[LARGE_NAME] = [Fault(cut_after=2_000_000), Fault(cut_after=1_500_000)]
    get_large(large.file_url(LARGE_NAME), client, part)
    assert ranges(large) == [None, "bytes=2000000-", "bytes=3500000-"]


def test_a_large_file_of_another_version_is_not_spliced(
    large: IndexServer, client: httpx.Client, part: Path
) -> None:
    part.write_bytes(b"x" * 2_000_000)
    get_large(large.file_url(LARGE_NAME), client, part)
    assert ranges(large) == ["bytes=2000000-", None]


def test_other_bytes_in_a_large_file_are_refused(
    large: IndexServer, client: httpx.Client, part: Path
) -> None:
    large.faults[LARGE_NAME] = [Fault(body=LARGE[:-1] + b"?")]
    with pytest.raises(IntegrityError):
        get_large(large.file_url(LARGE_NAME), client, part)
    assert ranges(large) == [None]


def test_a_large_body_that_never_ends_is_left_at_the_locked_size(
    large: IndexServer, client: httpx.Client, part: Path
) -> None:
    # It says the right length, and goes on.
    length = {"Content-Length": str(len(LARGE))}
    large.faults[LARGE_NAME] = [Fault(body=LARGE + b"x" * 1_000_000, headers=length)]
    get_large(large.file_url(LARGE_NAME), client, part)
    get(large, client, part.with_name("next"))


def test_a_large_body_without_a_length_arrives(large: IndexServer, client: httpx.Client, part: Path) -> None:
    large.faults[LARGE_NAME] = [Fault(chunked=True)]
    get_large(large.file_url(LARGE_NAME), client, part)


@pytest.mark.usefixtures("_impatient")
def test_a_server_that_falls_silent_in_a_large_body_is_asked_again(large: IndexServer, part: Path) -> None:
    large.faults[LARGE_NAME] = [Fault(stall_after=2_000_000)]
    with httpx.Client(timeout=httpx.Timeout(60, read=3), trust_env=False, verify=False) as client:
        get_large(large.file_url(LARGE_NAME), client, part)
    assert ranges(large) == [None, "bytes=2000000-"]


def test_a_large_file_that_is_stopped_keeps_what_it_has(
    large: IndexServer, client: httpx.Client, part: Path
) -> None:
    def stop(more: int) -> None:
        if part.stat().st_size >= 2_000_000:
            raise KeyboardInterrupt

    digest = hashlib.sha256(LARGE).hexdigest()
    url = large.file_url(LARGE_NAME)
    with pytest.raises(KeyboardInterrupt):
        download(client, url, sha256=digest, size=len(LARGE), part=part, on_bytes=stop)
    kept = part.read_bytes()
    assert len(kept) >= 2_000_000
    assert LARGE.startswith(kept)
    get_large(url, client, part)
    assert ranges(large) == [None, f"bytes={len(kept)}-"]


def test_a_large_file_arrives_over_tls(large: IndexServer, part: Path, through_httpx: list[int]) -> None:
    with tls_in_front_of(large) as port, loopback_client() as client:
        get_large(f"https://127.0.0.1:{port}/files/{LARGE_NAME}", client, part)
    assert ranges(large) == [None]
    assert len(through_httpx) == 1


def test_a_large_file_arrives_through_a_proxy(
    large: IndexServer, part: Path, through_httpx: list[int]
) -> None:
    # httpx asks a proxy for http URLs as it asks a server, but for the whole URL: the index takes both.
    with httpx.Client(proxy=large.origin, trust_env=False, verify=False) as client:
        get_large(f"http://files.example.org/files/{LARGE_NAME}", client, part)
    assert ranges(large) == [None]
    assert len(through_httpx) == 1


@contextmanager
def tls_in_front_of(server: IndexServer) -> Iterator[int]:
    """A port on loopback where `server` is spoken to over TLS, with a certificate that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(__file__).parent / "lab" / "loopback.pem")
    behind = int(server.origin.rpartition(":")[2])

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with (
                context.wrap_socket(client, server_side=True) as outer,
                socket.create_connection(("127.0.0.1", behind)) as inner,
                suppress(OSError),  # a client that has enough
            ):
                # A request is small and comes whole; the server closes after its answer.
                inner.sendall(outer.recv(65536).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                while chunk := inner.recv(65536):
                    outer.sendall(chunk)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
