"""A package index and a hub on loopback, in a process of its own, that send files with sendfile(2).

It costs next to nothing, so that the clients are what is measured: `python -m benchmarks.server FOLDER`
prints its port. It speaks PEP 503, PEP 691 and PEP 658, the hub's requests (a revision's files, one file),
HTTP/1.1 with keep-alive, and single ranges.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from benchmarks.closure import COMMIT, VERSION, sha256

_JSON = "application/vnd.pypi.simple.v1+json"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/simple/([^/]+)/?", path):
            self.page(match[1])
        elif match := re.fullmatch(r"/files/([^/]+)\.metadata", path):
            with zipfile.ZipFile(self.folder / match[1]) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
                self.answer(archive.read(name), "text/plain")
        elif match := re.fullmatch(r"/files/([^/]+)", path):
            self.file(self.folder / match[1])
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/revision/.+", path):
            names = [file.name for file in self.listing()]
            siblings = [{"rfilename": name} for name in names]
            self.answer(
                json.dumps({"id": "o/m", "sha": COMMIT, "siblings": siblings}).encode(), "application/json"
            )
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/.+", path):
            self.answer(
                json.dumps([self.tree_entry(file) for file in self.listing()]).encode(), "application/json"
            )
        elif match := re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path):
            self.file(self.folder / match[1])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def listing(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors"))

    def tree_entry(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        lfs = {"oid": sha256(file), "size": size, "pointerSize": 134}
        return {"type": "file", "oid": sha256(file)[:40], "size": size, "path": file.name, "lfs": lfs}

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def page(self, project: str) -> None:
        wheels = sorted(self.folder.glob(f"{project.replace('-', '_')}-*.whl"))
        if _JSON in self.headers.get("Accept", ""):
            files = [
                {
                    "filename": wheel.name,
                    "url": f"../../files/{wheel.name}",
                    "hashes": {"sha256": sha256(wheel)},
                    "size": wheel.stat().st_size,
                    "core-metadata": True,
                }
                for wheel in wheels
            ]
            page = {"meta": {"api-version": "1.1"}, "name": project, "versions": [VERSION], "files": files}
            self.answer(json.dumps(page).encode(), _JSON)
        else:
            links = [f'<a href="../../files/{w.name}#sha256={sha256(w)}">{w.name}</a>\n' for w in wheels]
            self.answer(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode(), "text/html")

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, end = 0, size - 1
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or end), end)
        self.send_response(206 if wanted else 200)
        etag = hashlib.sha256(path.name.encode()).hexdigest() if path.suffix == ".whl" else sha256(path)
        for key, value in {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(end - start + 1),
            "Accept-Ranges": "bytes",
            "ETag": f'"{etag}"',
            "X-Repo-Commit": COMMIT,
            **({"Content-Range": f"bytes {start}-{end}/{size}"} if wanted else {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        with path.open("rb") as source:
            while start <= end:
                start += os.sendfile(self.connection.fileno(), source.fileno(), start, end - start + 1)


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The origin, "http://127.0.0.1:PORT", of a server of `folder` that runs in its own process meanwhile."""
    command = [sys.executable, "-m", "benchmarks.server", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


def main() -> None:
    _Handler.folder = Path(sys.argv[1])
    server = _Server(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
