"""Several indexes as one, on loopback: what a recipe's `[index]` binds comes from its index alone.

Resolvers know one index for all packages, or several of which each may answer for any package. Here each
package has one origin, required directly or not, for both resolvers. Only listings pass through; files and
metadata stay where they are, and the hashes are the origins' own.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from packaging.utils import canonicalize_name

from envbuilder.errors import EnvbuilderError
from envbuilder.index import DEFAULT_INDEX, Index, IndexFile

_JSON = "application/vnd.pypi.simple.v1+json"


class CombinedIndex(ThreadingHTTPServer):
    """Serves the listings of `indexes`; `bindings`: package → its index, where that is not `default`."""

    daemon_threads = True

    def __init__(self, indexes: Mapping[str, Index], bindings: Mapping[str, str]) -> None:
        self._indexes, self._bindings = indexes, bindings
        # Listings may carry credentials in their URLs, and loopback is open to every user of the machine.
        self._secret = secrets.token_urlsafe()
        self.failure: EnvbuilderError | None = None
        """The first failure of an index, which a resolver could tell less of."""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self._secret}/simple"

    def answer(self, path: str) -> tuple[int, bytes]:
        """The status and the body for a request of `path`."""
        match = re.fullmatch(rf"/{re.escape(self._secret)}/simple/([\w.-]+)/?", path, re.ASCII)
        if match is None:
            return 404, b""
        name = canonicalize_name(match[1])
        try:
            files = self._indexes[self._bindings.get(name, DEFAULT_INDEX)].offers(name)
        except EnvbuilderError as error:
            self.failure = self.failure or error
            # No 5xx: the index has been asked often enough.
            return 400, b""
        return (200, _listing(name, files)) if files else (404, b"")

    def handle_error(self, request: object, client_address: object) -> None:
        # A resolver that is stopped breaks its connections off.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def open_combined_index(indexes: Mapping[str, Index], bindings: Mapping[str, str]) -> Iterator[CombinedIndex]:
    """Serves them until the block is left."""
    with CombinedIndex(indexes, bindings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written one after the other.
    disable_nagle_algorithm = True
    server: CombinedIndex

    def do_GET(self) -> None:
        status, body = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", _JSON)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _listing(name: str, files: tuple[IndexFile, ...]) -> bytes:
    """A PEP 691 answer."""
    return json.dumps(
        {"meta": {"api-version": "1.0"}, "name": name, "files": [_entry(file) for file in files]}
    ).encode()


def _entry(file: IndexFile) -> dict[str, object]:
    optional = {
        "requires-python": file.requires_python,
        "size": file.size,
        "core-metadata": {"sha256": file.metadata_sha256} if file.metadata_sha256 else None,
    }
    return {
        "filename": file.filename,
        "url": file.url,
        "hashes": {"sha256": file.sha256} if file.sha256 else {},
        "yanked": file.yanked,
        **{key: value for key, value in optional.items() if value is not None},
    }
