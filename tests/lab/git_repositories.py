"""Real git repositories, and the servers of such: git's own over HTTP, and a static one."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

_IDENTITY = {
    "GIT_AUTHOR_NAME": "Lab",
    "GIT_AUTHOR_EMAIL": "lab@example.org",
    "GIT_AUTHOR_DATE": "2001-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "Lab",
    "GIT_COMMITTER_EMAIL": "lab@example.org",
    "GIT_COMMITTER_DATE": "2001-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
}
Content = str | bytes | Path | tuple[str, str]
"""A file's content; a Path is a symbolic link's target; ("submodule", COMMIT)."""


def git(*arguments: str | Path, cwd: Path | None = None, stdin: bytes = b"") -> str:
    """What git prints."""
    done = subprocess.run(
        ["git", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **_IDENTITY},
        input=stdin,
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().strip()


def make_repository(path: Path) -> Path:
    """A new bare repository, ready for a static server too."""
    git("init", "--quiet", "--bare", "--initial-branch=main", path)
    return path


def commit(
    repository: Path,
    files: Mapping[str, Content],
    *,
    executable: tuple[str, ...] = (),
    branch: str = "main",
    parent: str | None = None,
) -> str:
    """A commit with exactly `files`, at the tip of `branch`; no work tree is needed."""
    index = {"GIT_INDEX_FILE": str(repository / "lab-index"), "GIT_DIR": str(repository)}
    (repository / "lab-index").unlink(missing_ok=True)
    lines = []
    for name, content in files.items():
        if isinstance(content, tuple):
            lines.append(f"160000 {content[1]}\t{name}")
            continue
        mode = "120000" if isinstance(content, Path) else "100755" if name in executable else "100644"
        data = content if isinstance(content, bytes) else str(content).encode()
        blob = git("--git-dir", repository, "hash-object", "-w", "--stdin", stdin=data)
        lines.append(f"{mode} {blob}\t{name}")
    subprocess.run(
        ["git", "update-index", "--index-info"],
        env={**os.environ, **_IDENTITY, **index},
        input="".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"),
        check=True,
    )
    tree = subprocess.run(
        ["git", "write-tree"], env={**os.environ, **_IDENTITY, **index}, capture_output=True, check=True
    ).stdout.decode()
    parents = ["-p", parent] if parent else []
    made = git("--git-dir", repository, "commit-tree", tree.strip(), "-m", "made", *parents)
    git("--git-dir", repository, "update-ref", f"refs/heads/{branch}", made)
    git("--git-dir", repository, "update-server-info")
    return made


class GitServer:
    """Serves the repositories in `folder`; a context manager.

    smart: through git's own http-backend; else as static files, which knows no shallow fetch.
    login: (user, password) without which it answers 401.
    silent: accepts connections and never answers.
    authorizations: the Authorization header of each request so far.
    """

    def __init__(
        self,
        folder: Path,
        *,
        smart: bool = True,
        login: tuple[str, str] | None = None,
        silent: bool = False,
    ) -> None:
        self.folder = folder
        self.smart = smart
        self.login = login
        self.silent = silent
        self.closing = threading.Event()
        self.authorizations: list[str | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> GitServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(server: GitServer) -> type[BaseHTTPRequestHandler]:
    backend = str(Path(git("--exec-path")) / "git-http-backend")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            authorization = self.headers.get("Authorization")
            server.authorizations.append(authorization)
            if server.silent:
                server.closing.wait()
            elif server.login is not None and authorization != _basic(server.login):
                self.answer(401, {"WWW-Authenticate": 'Basic realm="lab"'}, b"")
            elif server.smart:
                self.cgi()
            else:
                path = server.folder / unquote(urlsplit(self.path).path).lstrip("/")
                if path.is_file():
                    self.answer(200, {}, path.read_bytes())
                else:
                    self.answer(404, {}, b"")

        do_POST = do_GET

        def cgi(self) -> None:
            url = urlsplit(self.path)
            environment = {
                **os.environ,
                **_IDENTITY,
                "GIT_PROJECT_ROOT": str(server.folder),
                "GIT_HTTP_EXPORT_ALL": "1",
                "REQUEST_METHOD": self.command,
                "PATH_INFO": unquote(url.path),
                "QUERY_STRING": url.query,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "HTTP_GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            }
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            done = subprocess.run([backend], env=environment, input=body, capture_output=True, check=True)
            head, _, content = done.stdout.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
            self.answer(int(headers.pop("Status", "200").split()[0]), headers, content)

        def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode()
