"""A model hub on loopback: the answers that huggingface_hub asks for, redirects, ranges, and faults to order.

Two servers, as with a real hub: one knows the repositories and gives small files itself; large ones it
redirects to the other, which has another host name and asks for no token. Files are sent with sendfile(2).
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.lab.index_server import Fault

_LFS_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".model"}
)
_LFS_SIZE = 10_000_000
"""Bytes from which on a file is kept in LFS, whatever its name."""


@dataclass(frozen=True)
class HubFile:
    """One file of a commit."""

    path: Path
    size: int
    blob_id: str
    """Its git object, or that of the LFS pointer in its place."""
    lfs_sha256: str | None


@dataclass
class HubRepo:
    """One repository."""

    commits: dict[str, Mapping[str, HubFile]] = field(default_factory=dict)
    """Commit → its files by name; the last one is the newest of `main`."""
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """The tokens that may read it, where it is private or gated."""


class HubServer:
    """Serves model repositories; a context manager. Each `folder`/OWNER/NAME is one from the start.

    repos: "owner/name" → the repository.
    tokens: those that the hub knows at all.
    faults: file's name in its repository, or "owner/name" for what the API says of a repository → faults for
        the coming requests, first to last; then it's served rightly.
    content_host: the host name of the server of large files; "127.0.0.1" is the hub's own.
    requests, content_requests: what each of the two servers was asked so far: method, path, and headers with
        lower-case names.
    """

    def __init__(self, folder: Path, *, tls: ssl.SSLContext | None = None) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.tokens: set[str] = set()
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.content_requests: list[tuple[str, str, dict[str, str]]] = []
        self.contents: dict[str, tuple[str, Path]] = {}
        """sha256 of a large file → its name and where it lies."""
        self.content_host = "localhost"
        self.closing = threading.Event()
        self._tls = tls is not None
        self._hub = _Server(("127.0.0.1", 0), _hub_handler(self))
        if tls is not None:
            self._hub.socket = tls.wrap_socket(self._hub.socket, server_side=True)
        self._content = _Server(("127.0.0.1", 0), _content_handler(self))
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            for server in (self._hub, self._content)
        ]
        for repo in sorted(folder.glob("*/*/")):
            self.publish(f"{repo.parent.name}/{repo.name}", repo)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must say."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._hub.server_port}"

    @property
    def content_origin(self) -> str:
        """The other host, with the large files."""
        return f"http://{self.content_host}:{self._content.server_port}"

    def publish(self, repo: str, folder: Path) -> str:
        """The files in `folder`, which must stay as they are, become the newest commit of `repo`: its id."""
        files = {
            str(path.relative_to(folder)): _hub_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        listing = "".join(f"{file.blob_id} {name}\n" for name, file in files.items())
        commit = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
        known = self.repos.setdefault(repo, HubRepo())
        known.commits.pop(commit, None)
        known.commits[commit] = files
        for name, file in files.items():
            if file.lfs_sha256:
                self.contents[file.lfs_sha256] = (name, file.path)
        return commit

    def fault(self, name: str) -> Fault:
        """The next one for `name`."""
        faults = self.faults.get(name, [])
        return faults.pop(0) if faults else Fault()

    def __enter__(self) -> HubServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        for server in (self._hub, self._content):
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that was killed, stopped reading, or doesn't trust the certificate is what tests are about.
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _hub_file(path: Path) -> HubFile:
    size = path.stat().st_size
    if path.suffix in _LFS_SUFFIXES or size >= _LFS_SIZE:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        pointer = f"version 1\noid sha256:{sha256}\nsize {size}\n".encode()
        return HubFile(path, size, _blob_id(pointer), sha256)
    return HubFile(path, size, _blob_id(path.read_bytes()), None)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def _card(files: Mapping[str, HubFile]) -> object:
    """The YAML at the top of README.md."""
    if "README.md" not in files:
        return None
    match = re.match(r"---\n(.*?\n)---\n", files["README.md"].path.read_text(), re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    seen: list[tuple[str, str, dict[str, str]]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.seen.append((self.command, unquote(path), headers))
        self.route(path)

    do_HEAD = do_GET

    def route(self, path: str) -> None:
        raise NotImplementedError

    def answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message})

    def send_file(self, path: Path, headers: dict[str, str], fault: Fault) -> None:
        """All of a file, or the range that is asked for, as `fault` wants it."""
        if fault.status is not None:
            self.answer(fault.status, fault.headers)
            return
        size = path.stat().st_size if fault.body is None else len(fault.body)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if fault.etag:
            headers["ETag"] = fault.etag
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end, status = 0, size - 1, 200
        if (
            wanted
            and not fault.ignore_range
            and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]
        ):
            start, end, status = int(wanted[1]), min(int(wanted[2] or size), size - 1), 206
            if start >= size:
                self.answer(416, {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        count = end - start + 1
        length = {"Transfer-Encoding": "chunked"} if fault.chunked else {"Content-Length": str(count)}
        self.send_response(status)
        for key, value in {**length, **headers, **fault.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.chunked:
            self.wfile.write(b"%x\r\n" % count)
        sent = next((part for part in (fault.cut_after, fault.stall_after) if part is not None), count)
        if fault.body is not None:
            self.wfile.write(fault.body[start : start + sent])
        elif sent:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, sent)
        if fault.chunked:
            self.wfile.write(b"\r\n0\r\n\r\n")
        if fault.stall_after is not None:
            self.hub.closing.wait()
        if sent < count:
            self.close_connection = True


def _content_handler(hub_server: HubServer) -> type[_Handler]:
    class Handler(_Handler):
        hub = hub_server
        seen = hub_server.content_requests

        def route(self, path: str) -> None:
            sha256 = path.rpartition("/")[2]
            if sha256 not in self.hub.contents:
                self.answer(403)
                return
            name, file = self.hub.contents[sha256]
            self.send_file(file, {"ETag": f'"{sha256}"'}, self.hub.fault(name))

    return Handler


def _hub_handler(hub_server: HubServer) -> type[_Handler]:
    class Handler(_Handler):
        hub = hub_server
        seen = hub_server.requests

        def route(self, path: str) -> None:
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if api:
                self.api(unquote(api[1]), api[2] or "revision", unquote(api[3] or "main"))
            elif file:
                self.resolve(unquote(file[1]), unquote(file[2]), unquote(file[3]))
            else:
                self.refuse(404)

        def token(self) -> str | None:
            return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

        def commit(self, repo: str, revision: str) -> str | None:
            """The commit that is meant; None when the request has been answered with a refusal."""
            token, known = self.token(), self.hub.repos.get(repo)
            if token is not None and token not in self.hub.tokens:
                self.refuse(401, message="Invalid credentials in Authorization header")
            elif known is None or (known.private and token not in known.readers):
                # As the real one: it doesn't tell strangers what exists.
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif revision == "main":
                return list(known.commits)[-1]
            elif revision in known.commits:
                return revision
            else:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def api(self, repo: str, kind: str, revision: str) -> None:
            commit = self.commit(repo, revision)
            if commit is None:
                return
            fault = self.hub.fault(repo)
            if fault.status is not None:
                self.answer(fault.status, fault.headers)
                return
            files = self.hub.repos[repo].commits[commit]
            told = self.info(repo, commit, files) if kind == "revision" else _tree(files)
            body = json.dumps(told).encode() if fault.body is None else fault.body
            self.answer(200, {"Content-Type": "application/json; charset=utf-8"}, body)

        def info(self, repo: str, commit: str, files: Mapping[str, HubFile]) -> object:
            known = self.hub.repos[repo]
            blobs = parse_qs(urlsplit(self.path).query).get("blobs", ["false"])[0].lower() in ("true", "1")
            return {
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit,
                "private": known.private,
                "gated": "manual" if known.gated else False,
                "disabled": False,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "cardData": _card(files),
                "siblings": [
                    {"rfilename": name, **(_blob(file) if blobs else {})} for name, file in files.items()
                ],
            }

        def resolve(self, repo: str, revision: str, name: str) -> None:
            commit = self.commit(repo, revision)
            if commit is None:
                return
            known = self.hub.repos[repo]
            file = known.commits[commit].get(name)
            if known.gated and self.token() not in known.readers:
                self.refuse(
                    403 if self.token() else 401, "GatedRepo", f"Access to model {repo} is restricted."
                )
            elif file is None:
                self.refuse(404, "EntryNotFound", "Entry not found")
            elif file.lfs_sha256 is None:
                headers = {"ETag": f'"{file.blob_id}"', "X-Repo-Commit": commit}
                self.send_file(file.path, headers, self.hub.fault(name))
            else:
                headers = {
                    "Location": f"{self.hub.content_origin}/repos/{quote(repo)}/{file.lfs_sha256}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{file.lfs_sha256}"',
                    "X-Linked-Size": str(file.size),
                }
                self.answer(302, headers)

    return Handler


def _blob(file: HubFile) -> dict[str, object]:
    blob: dict[str, object] = {"size": file.size, "blobId": file.blob_id}
    if file.lfs_sha256:
        blob["lfs"] = {"sha256": file.lfs_sha256, "size": file.size, "pointerSize": 130}
    return blob


def _tree(files: Mapping[str, HubFile]) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": name,
            "size": file.size,
            "oid": file.blob_id,
            **(
                {"lfs": {"oid": file.lfs_sha256, "size": file.size, "pointerSize": 130}}
                if file.lfs_sha256
                else {}
            ),
        }
        for name, file in files.items()
    ]
