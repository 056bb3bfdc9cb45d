"""One file over HTTP: resumed, retried, bounded, hashed on the way.

httpx speaks to the server, with its proxies, certificates, redirects and credentials. The body of a large
file is then read from the socket itself into one buffer: through httpx each byte costs several copies more,
and a processor does little but copy.

The hash is the judge. Within one run a changed ETag tells early that the server's file is another one; what
an earlier run left is gone on from without (many indexes send no ETag), and if the whole turns out wrong, it
is fetched again from its first byte.

Ranges after RFC 9110 (§13.1.5 If-Range, §14.4 Content-Range), Retry-After after §10.2.3.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

import httpx

from envbuilder.atomic import writing
from envbuilder.errors import IntegrityError, NetworkError
from envbuilder.urls import shown

CHUNK = 1 << 20
"""Bytes that are received, or read back, hashed and written at once."""
_LARGE = 1 << 20
"""Bytes of a body from which it is read from the socket. Its connection can't be used again afterwards."""
_PUSHED = 1 << 25
"""Bytes after which the disk is set to work, so that the fsync at the end has little left to wait for."""
_MOMENT = 0.1
"""Seconds after which what has come is written, whether it is a whole chunk or not."""
_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry in a row that brought nothing new; after the last one it is given up."""
_LONGEST_PAUSE = 60.0
"""Seconds of a Retry-After that are honoured."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may mend."""


class _TryAgain(Exception):
    """A failure that another request may mend."""

    def __init__(self, reason: str, *, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def download(
    client: httpx.Client,
    url: str,
    *,
    sha256: str,
    size: int,
    part: Path,
    on_bytes: Callable[[int], None],
) -> None:
    """Fills `part` with the `size` bytes at `url` that have `sha256`, going on from what it holds.

    `part` must be this process's own. `on_bytes` is told how many bytes more are there (fewer, when it has
    to begin again), and 0 while waiting; what it raises stops the download. Raises NetworkError, and
    IntegrityError if the server has other bytes; `part` is then to be thrown away. After anything else it
    can be resumed.
    """
    with writing(part, size), _open(part) as file:
        _Download(client, url, sha256, size, file, on_bytes).run()


def _open(part: Path) -> BinaryIO:
    # O_NOFOLLOW: a link planted under this name must not lead to another file.
    return os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")


class _Download:
    def __init__(
        self,
        client: httpx.Client,
        url: str,
        sha256: str,
        size: int,
        file: BinaryIO,
        on_bytes: Callable[[int], None],
    ) -> None:
        self.client, self.url, self.sha256, self.size = client, url, sha256, size
        self.file, self.on_bytes = file, on_bytes
        self.hash = hashlib.sha256()
        self.offset = 0
        """Bytes in the file, all of them in `hash`."""
        self.pieced = False
        """Whether they come from more than one answer."""
        self.etag: str | None = None
        """Of the file that this run is receiving, where the server says it."""
        self.direct = True
        """Whether large bodies are read from the socket."""
        self.pushed = 0
        """Bytes that the disk has been told to write."""

    def run(self) -> None:
        self.take_up()
        self.fill()
        if self.hash.hexdigest() != self.sha256 and self.pieced:
            # The pieces may be of two files, or torn by a crash: only one whole answer is a verdict.
            self.begin_again()
            self.direct = False
            self.fill()
        if self.hash.hexdigest() != self.sha256:
            raise self.refusal("sha256", self.sha256, self.hash.hexdigest())
        self.file.flush()

    def take_up(self) -> None:
        """Hashes what an earlier run left."""
        if os.fstat(self.file.fileno()).st_size > self.size:
            self.begin_again()
        while chunk := self.file.read(CHUNK):
            self.count(chunk)
        self.pushed = self.offset
        self.pieced = self.offset > 0

    def begin_again(self) -> None:
        self.on_bytes(-self.offset)
        self.file.seek(0)
        self.file.truncate()
        self.hash = hashlib.sha256()
        self.offset = 0
        self.pushed = 0
        self.pieced = False
        self.etag = None

    def fill(self) -> None:
        """Requests until the file has its full size, or nothing new came for len(_PAUSES) retries."""
        furthest, failures = self.offset, 0
        while self.offset < self.size:
            try:
                self.request()
            except (_TryAgain, httpx.TransportError) as error:
                if isinstance(error, httpx.UnsupportedProtocol):
                    raise self.failure(str(error)) from error
                failures = 0 if self.offset > furthest else failures + 1
                furthest = max(furthest, self.offset)
                if failures > len(_PAUSES):
                    raise self.failure(f"{error} ({failures} tries)") from error
                retry_after = error.retry_after if isinstance(error, _TryAgain) else None
                self.wait(_seconds(retry_after, _PAUSES[max(failures - 1, 0)]))
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self.failure(str(error)) from error

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.on_bytes(0)
            time.sleep(min(left, 0.2))

    def request(self) -> None:
        # identity: a server that compresses on the way would send bytes that the lock does not name.
        headers = {"Accept-Encoding": "identity"}
        if self.offset:
            headers["Range"] = f"bytes={self.offset}-"
        if self.offset and self.etag:
            headers["If-Range"] = self.etag
        with self.client.stream("GET", self.url, headers=headers, follow_redirects=True) as response:
            self.check(response)
            self.etag = _strong(response.headers.get("ETag", self.etag or ""))
            self.receive(response)
        if self.offset < self.size:
            raise _TryAgain(f"the server stopped after {self.offset:,} of {self.size:,} bytes")

    def receive(self, response: httpx.Response) -> None:
        connection = self.connection(response)
        chunks = response.iter_raw()  # kept until the end: without it httpx closes the connection
        for chunk in chunks:
            self.append(chunk)
            if connection is not None:
                break  # what httpx had read together with the headers; it holds no more
        if connection is not None:
            self.receive_from(connection)

    def receive_from(self, connection: socket.socket) -> None:
        """Receives and writes in this thread, while another one hashes what came before."""
        buffers = [memoryview(bytearray(CHUNK)) for _ in range(2)]
        with ThreadPoolExecutor(1) as hasher:
            hashed: Future[None] | None = None
            while self.offset < self.size:
                buffers.reverse()
                # No further than the body: what follows it would be the next answer.
                chunk, ended = _receive(connection, buffers[0][: self.size - self.offset])
                self.write(chunk)
                if hashed is not None:
                    hashed.result()
                hashed = hasher.submit(self.hash.update, chunk)
                self.tell(len(chunk))
                if ended:
                    raise _TryAgain(ended)

    def connection(self, response: httpx.Response) -> socket.socket | None:
        """The socket, where the rest of the body is all that comes through it, as it is."""
        left = self.size - self.offset
        if not self.direct or left < _LARGE or response.headers.get("Content-Length") != str(left):
            return None
        stream = response.extensions.get("network_stream")
        if stream is None or not response.http_version.startswith("HTTP/1"):
            return None
        # TLS inside TLS (a proxy spoken to over TLS): what that socket gives is still encrypted.
        if isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject):
            return None
        found = stream.get_extra_info("socket")
        return found if isinstance(found, socket.socket) else None

    def check(self, response: httpx.Response) -> None:
        """Makes sure that the body goes on where the file ends."""
        if response.status_code == 206:
            if not self.goes_on(response):
                self.begin_again()
                raise _TryAgain("the server answered with another range, or another file, than asked for")
            self.pieced = True
            return
        if response.status_code == 416:
            self.begin_again()
            raise _TryAgain("the server has no such range")
        if response.status_code in _BUSY:
            raise _TryAgain(
                f"the server answered {response.status_code}", retry_after=response.headers.get("Retry-After")
            )
        if response.status_code != 200:
            raise self.failure(f"the server answered {response.status_code} {response.reason_phrase}".strip())
        self.begin_again()
        announced = response.headers.get("Content-Length", str(self.size))
        if announced != str(self.size):
            raise self.refusal("size", self.size, announced)

    def goes_on(self, response: httpx.Response) -> bool:
        wanted = rf"bytes {self.offset}-{self.size - 1}/(?:{self.size}|\*)"
        same_file = self.etag is None or response.headers.get("ETag", self.etag) == self.etag
        return (
            self.offset > 0
            and same_file
            and re.fullmatch(wanted, response.headers.get("Content-Range", "")) is not None
        )

    def append(self, chunk: bytes) -> None:
        if self.offset + len(chunk) > self.size:
            raise self.refusal("size", self.size, f"more than {self.size}")
        self.write(chunk)
        self.count(chunk)

    def write(self, chunk: bytes | memoryview) -> None:
        self.file.write(chunk)
        written = self.offset + len(chunk)
        if written - self.pushed >= _PUSHED:
            # What is not on the disk yet can't be dropped: the kernel begins to write it, and doesn't wait.
            os.posix_fadvise(self.file.fileno(), self.pushed, written - self.pushed, os.POSIX_FADV_DONTNEED)
            self.pushed = written

    def count(self, chunk: bytes) -> None:
        self.hash.update(chunk)
        self.tell(len(chunk))

    def tell(self, more: int) -> None:
        self.offset += more
        self.on_bytes(more)

    def failure(self, reason: str) -> NetworkError:
        return NetworkError(
            f"{shown(self.url)} could not be fetched: {reason.rstrip('.')}.",
            remedy="Check the network, the proxy and the index's URL (pip config list), then run the same "
            "command again: it goes on from what it has.",
            context={"url": shown(self.url)},
        )

    def refusal(self, what: str, expected: object, got: object) -> IntegrityError:
        return IntegrityError(
            f"The server's {shown(self.url).rpartition('/')[2]} is not the file that the lock names: "
            f"its {what} differs.",
            remedy="Find out why this index has another file of that name; if the new file is wanted: "
            "envbuilder lock RECIPE",
            context={"url": shown(self.url), "expected": f"{what} {expected}", "got": f"{what} {got}"},
        )


def _receive(connection: socket.socket, buffer: memoryview) -> tuple[memoryview, str | None]:
    """Fills `buffer`, or what a moment brings of it; and why there will be no more, if so."""
    count, until = 0, time.monotonic() + _MOMENT
    while count < len(buffer):
        try:
            more = connection.recv_into(buffer[count:])
        except OSError as error:
            return buffer[:count], str(error) or type(error).__name__
        if more == 0:
            return buffer[:count], "the server closed the connection"
        count += more
        if time.monotonic() > until:
            break
    return buffer[:count], None


def _strong(etag: str) -> str | None:
    """`etag` if it is a strong one, the kind that vouches for equal bytes; RFC 9110 §8.8.3, ASCII only."""
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else None


def _seconds(retry_after: str | None, otherwise: float) -> float:
    """What a Retry-After header asks for, in seconds or as a date."""
    if retry_after is None:
        return otherwise
    if retry_after.isdecimal():
        return min(float(retry_after), _LONGEST_PAUSE)
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return otherwise
    if moment.tzinfo is None:
        return otherwise
    return min(max((moment - datetime.now(timezone.utc)).total_seconds(), 0.0), _LONGEST_PAUSE)
