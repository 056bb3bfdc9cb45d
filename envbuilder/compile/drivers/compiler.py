"""Stands in for a compiler in a build: asks the compile service what to do, and does it.

A build calls this program wherever it would call nvcc or the host compiler. It decides nothing: it sends its
command line to the service (`compile/units/service.py`, in envbuilder's own process) and then runs what that
says, in the sandbox, as the build would have. So the build can reach neither the object cache nor the
scheduler, and the service never writes where the build could have planted a link.

Standalone, standard library only: `python -I -S compiler.py SOCKET TOOL REAL ARGUMENT…`, where SOCKET is the
service's socket, TOOL is nvcc, c++ or cc, and REAL is the compiler that it stands for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

FRAME = struct.Struct(">II")
"""Lengths in bytes of the JSON text and of the raw bytes that make up one message."""
INSIDE = "ENVBUILDER_COMPILING"
"""Set for what a driver runs: nvcc's own calls of the host compiler go straight to it."""
TOLD = (
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "SOURCE_DATE_EPOCH",
)
"""Variables that change what a compiler makes."""


class Connection:
    """Messages to and from the service: a JSON object and raw bytes each."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any], content: bytes = b"") -> None:
        text = json.dumps(message).encode()
        with self._sending:
            self._stream.sendall(FRAME.pack(len(text), len(content)) + text + content)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """EOFError where the other side is gone."""
        text, content = FRAME.unpack(self._exactly(FRAME.size))
        message: dict[str, Any] = json.loads(self._exactly(text))
        return message, self._exactly(content)

    def close(self) -> None:
        # Shutting down wakes a thread that waits in `receive`; closing alone does not.
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._stream.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def connect(path: str) -> Connection:
    """The service at the socket `path`, however long the path is: a socket's own may have 107 bytes."""
    stream = socket.socket(socket.AF_UNIX)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        stream.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
    return Connection(stream)


class Driver:
    """One call of a compiler."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._children: set[int] = set()
        self._starting = threading.Lock()
        """Held while a child is started, so that none is missed when all are ended."""

    def serve(self) -> int:
        """Does what the service says, until it says with which status to end."""
        while True:
            order, content = self._connection.receive()
            what = order["do"]
            if what == "run":
                threading.Thread(target=self._run, args=(order,), daemon=True).start()
            elif what == "read":
                self._answer(order, *self._read(order["path"]))
            elif what == "write":
                self._answer(order, self._write(order["path"], content))
            elif what == "remove":
                for path in order["paths"]:
                    with contextlib.suppress(OSError):
                        os.remove(path)
                self._answer(order, None)
            elif what == "print":
                stream = sys.stdout if order["stream"] == "stdout" else sys.stderr
                stream.buffer.write(content)
                stream.flush()
                self._answer(order, None)
            elif what == "become":
                self._connection.close()
                os.execv(order["argv"][0], order["argv"])
            elif what == "exit":
                return int(order["status"])

    def end_children(self) -> None:
        with self._starting:
            for child in list(self._children):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)

    def _answer(self, order: dict[str, Any], error: str | None, content: bytes = b"") -> None:
        self._connection.send({"id": order["id"], "error": error}, content)

    def _run(self, order: dict[str, Any]) -> None:
        """Runs a command; answers with its status, what it took, and what it printed."""
        began = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                with self._starting:
                    child = subprocess.Popen(
                        order["argv"],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env={**os.environ, INSIDE: "1"},
                        # Of its own, so that it can be ended with all that it started.
                        start_new_session=True,
                    )
                    self._children.add(child.pid)
            except OSError as error:
                self._answer(order, f"{order['argv'][0]}: {error.strerror}")
                return
            # wait4, because it alone gives this child's resources with those of all that it started.
            _, status, used = os.wait4(child.pid, 0)
            self._children.discard(child.pid)
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            printed, complained = out.read(), err.read()
        answer = {
            "id": order["id"],
            "error": None,
            "status": child.returncode,
            "seconds": time.monotonic() - began,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_rss_bytes": used.ru_maxrss * 1024,
            "stdout_bytes": len(printed),
        }
        self._connection.send(answer, printed + complained)

    def _read(self, path: str) -> tuple[str | None, bytes]:
        try:
            with open(path, "rb") as file:
                return None, file.read()
        except OSError as error:
            return f"{path}: {error.strerror}", b""

    def _write(self, path: str, content: bytes) -> str | None:
        try:
            with open(path, "wb") as file:
                file.write(content)
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None


def main(argv: Sequence[str]) -> int:
    """Asks the service at argv[0] what to do for compiler argv[2]; ends as the compiler would have."""
    path, tool, real, *arguments = argv
    if INSIDE in os.environ:
        os.execv(real, [real, *arguments])
    try:
        connection = connect(path)
    except OSError as error:
        print(f"envbuilder: the compile service does not answer ({error}): {path}", file=sys.stderr)
        return 1
    driver = Driver(connection)

    def give_up(received: int, _: object) -> None:
        driver.end_children()
        signal.signal(received, signal.SIG_DFL)
        os.kill(os.getpid(), received)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, give_up)
    connection.send(
        {
            "tool": tool,
            "real": real,
            "arguments": arguments,
            "cwd": os.getcwd(),
            "env": {name: os.environ[name] for name in TOLD if name in os.environ},
        }
    )
    try:
        return driver.serve()
    except (EOFError, OSError):
        print("envbuilder: the compile service has gone away", file=sys.stderr)
        return 1
    finally:
        driver.end_children()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
