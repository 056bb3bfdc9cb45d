"""A package index on loopback that serves a folder of files, and misbehaves when told to.

It speaks PEP 503 (HTML), PEP 691 (JSON), PEP 658 (metadata beside wheels), and HTTP ranges with ETags.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import ssl
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from email.parser import BytesParser
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import httpx
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

_JSON = "application/vnd.pypi.simple.v1+json"


def loopback_client(auth: tuple[str, str] | None = None) -> httpx.Client:
    """A client for servers on loopback: no proxy, and no time spent on reading certificates."""
    return httpx.Client(auth=auth, verify=False, trust_env=False)


@dataclass(frozen=True)
class Fault:
    """How to answer one request for a file, other than rightly."""

    status: int | None = None
    """Answer with this status and no body."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers beside the right ones, or in their place."""
    body: bytes | None = None
    """Serve these bytes as if they were the file."""
    etag: str | None = None
    ignore_range: bool = False
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send so many bytes of the body, then nothing until the server closes."""
    chunked: bool = False
    """Send the body chunked, without a Content-Length."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        # A client that was killed, stopped reading, or has no trust, is what some tests are about.
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class IndexServer:
    """Serves the wheels and sdists lying in `folder`; a context manager.

    faults: file or project name → faults for the coming requests of that file or page, first to last; then
        it's served rightly. Pages, and metadata files, know `status`, `headers` and `body`.
    announced_sha256: file name → what index pages say in place of the true hash (None: they say none).
    announced_size: the same for sizes, JSON only.
    html_only: answer with PEP 503 pages whatever the client accepts.
    yanked: names of the files that the index pages call yanked (PEP 592).
    core_metadata: whether pages tell, with its hash, of the METADATA that lies beside each wheel (PEP 658).
    requires_python: file name → a specifier for the index pages; otherwise from the wheel's metadata.
    certificate: a PEM file with certificate and key: then it speaks https.
    requests: every request so far: its path and its headers, with lower-case names.
    """

    def __init__(self, folder: Path, *, certificate: Path | None = None) -> None:
        self.folder = folder
        self._scheme = "http" if certificate is None else "https"
        self.faults: dict[str, list[Fault]] = {}
        self.announced_sha256: dict[str, str | None] = {}
        self.announced_size: dict[str, int | None] = {}
        self.html_only = False
        self.core_metadata = True
        self.yanked: set[str] = set()
        self.requires_python: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            # The handshake is for the thread of the connection: a client that breaks it off stops no other.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def origin(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        """The index: ".../simple"."""
        return f"{self.origin}/simple"

    def file_url(self, filename: str) -> str:
        return f"{self.origin}/files/{filename}"

    def file_requests(self) -> list[str]:
        """The names of the files asked for so far, in order (metadata files aside)."""
        names = [path.removeprefix("/files/") for path, _ in self.requests if path.startswith("/files/")]
        return [name for name in names if not name.endswith(".metadata")]

    def __enter__(self) -> IndexServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def listing(self) -> dict[str, list[Path]]:
        """Normalised project name → its files."""
        projects: dict[str, list[Path]] = {}
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(".whl"):
                name: str = parse_wheel_filename(path.name)[0]
            elif path.name.endswith((".tar.gz", ".zip")):
                name = parse_sdist_filename(path.name)[0]
            else:
                continue
            projects.setdefault(name, []).append(path)
        return projects

    def sha256(self, path: Path) -> str | None:
        return self.announced_sha256.get(path.name, _sha256(path, path.stat().st_mtime_ns))

    def size(self, path: Path) -> int | None:
        return self.announced_size.get(path.name, path.stat().st_size)

    def python(self, path: Path) -> str | None:
        if path.name in self.requires_python:
            return self.requires_python[path.name]
        metadata = wheel_metadata(path)
        if metadata is None:
            return None
        header = BytesParser().parsebytes(metadata, headersonly=True)["Requires-Python"]
        return None if header is None else str(header)


@lru_cache
def _sha256(path: Path, _mtime: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel_metadata(path: Path) -> bytes | None:
    """METADATA of the wheel `path`; None for other files."""
    if path.suffix != ".whl":
        return None
    with zipfile.ZipFile(path) as archive:
        return next(
            (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None
        )


def _handler(index: IndexServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            index.requests.append((path, {key.lower(): value for key, value in self.headers.items()}))
            if match := re.fullmatch(r"/simple/(?:([^/]+)/?)?", path):
                self.page(match[1])
            elif match := re.fullmatch(r"/files/([^/]+)\.metadata", path):
                self.metadata(index.folder / match[1])
            elif match := re.fullmatch(r"/files/([^/]+)", path):
                self.file(index.folder / match[1])
            else:
                self.answer(404)

        do_HEAD = do_GET

        def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def page(self, name: str | None) -> None:
            projects = index.listing()
            as_json = _JSON in self.headers.get("Accept", "") and not index.html_only
            if name is not None and index.faults.get(name):
                fault = index.faults[name].pop(0)
                self.answer(fault.status or 200, fault.headers, fault.body or b"")
            elif name is not None and canonicalize_name(name) not in projects:
                self.answer(404)
            elif as_json:
                self.answer(200, {"Content-Type": _JSON}, json.dumps(self.json_page(name, projects)).encode())
            else:
                body = "".join(self.html_links(name, projects))
                text = f"<!DOCTYPE html><html><body>\n{body}</body></html>"
                self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, text.encode())

        def json_page(self, name: str | None, projects: dict[str, list[Path]]) -> dict[str, object]:
            meta = {"api-version": "1.1"}
            if name is None:
                return {"meta": meta, "projects": [{"name": project} for project in projects]}
            paths = projects[canonicalize_name(name)]
            versions = sorted({str(_version(path)) for path in paths})
            return {
                "meta": meta,
                "name": canonicalize_name(name),
                "versions": versions,
                "files": [self.json_file(path) for path in paths],
            }

        def json_file(self, path: Path) -> dict[str, object]:
            sha256, size, python = index.sha256(path), index.size(path), index.python(path)
            entry: dict[str, object] = {"filename": path.name, "url": f"../../files/{path.name}"}
            entry["hashes"] = {"sha256": sha256} if sha256 else {}
            entry |= {"size": size} if size is not None else {}
            entry |= {"requires-python": python} if python else {}
            entry |= {"yanked": True} if path.name in index.yanked else {}
            if index.core_metadata and (metadata := wheel_metadata(path)):
                entry["core-metadata"] = {"sha256": hashlib.sha256(metadata).hexdigest()}
            return entry

        def html_links(self, name: str | None, projects: dict[str, list[Path]]) -> list[str]:
            if name is None:
                return [f'<a href="{project}/">{project}</a><br>\n' for project in projects]
            links = []
            for path in projects[canonicalize_name(name)]:
                sha256, python = index.sha256(path), index.python(path)
                fragment = f"#sha256={sha256}" if sha256 else ""
                attribute = f' data-requires-python="{html.escape(python)}"' if python else ""
                attribute += " data-yanked" if path.name in index.yanked else ""
                if index.core_metadata and (metadata := wheel_metadata(path)):
                    attribute += f' data-core-metadata="sha256={hashlib.sha256(metadata).hexdigest()}"'
                links.append(f'<a href="../../files/{path.name}{fragment}"{attribute}>{path.name}</a><br>\n')
            return links

        def metadata(self, wheel: Path) -> None:
            metadata = wheel_metadata(wheel) if wheel.exists() else None
            if faults := index.faults.get(f"{wheel.name}.metadata"):
                fault = faults.pop(0)
                self.answer(fault.status or 200, fault.headers, fault.body or b"")
                return
            self.answer(404 if metadata is None else 200, None, metadata or b"")

        def file(self, path: Path) -> None:
            faults = index.faults.get(path.name, [])
            fault = faults.pop(0) if faults else Fault()
            if fault.status is not None:
                self.answer(fault.status, fault.headers)
                return
            if not path.exists():
                self.answer(404)
                return
            body = path.read_bytes() if fault.body is None else fault.body
            etag = fault.etag or f'"{hashlib.sha256(body).hexdigest()[:16]}"'
            headers = {"Content-Type": "application/octet-stream", "ETag": etag, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            status = 200
            if wanted and not fault.ignore_range and self.headers.get("If-Range", etag) == etag:
                start, end = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
                if start >= len(body):
                    self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
                    return
                status = 206
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                body = body[start : end + 1]
            self.send(status, {**headers, **fault.headers}, body, fault)

        def send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
            self.send_response(status)
            length = {"Transfer-Encoding": "chunked"} if fault.chunked else {"Content-Length": str(len(body))}
            for key, value in {**length, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault.chunked:
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            elif fault.cut_after is not None:
                self.wfile.write(body[: fault.cut_after])
                self.close_connection = True
            elif fault.stall_after is not None:
                self.wfile.write(body[: fault.stall_after])
                self.wfile.flush()
                index.closing.wait()
                self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler


def _version(path: Path) -> object:
    parse = parse_wheel_filename if path.name.endswith(".whl") else parse_sdist_filename
    return parse(path.name)[1]
