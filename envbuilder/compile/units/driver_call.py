"""The service's end of a connection to a compiler driver: what it can have done inside the sandbox."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from envbuilder.compile.drivers.compiler import Connection


class DriverError(Exception):
    """The driver could not do what it was asked; the text says why."""


class DriverGoneError(DriverError):
    """The driver is gone: its build has ended or was killed."""

    def __init__(self) -> None:
        super().__init__("the compiler's driver is gone")


@dataclass(frozen=True)
class Ran:
    """A compiler that has run."""

    status: int
    """Exit status; a negative one is the signal that ended it."""
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    """Of its largest process."""
    stdout: bytes
    stderr: bytes

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether it, or a compiler that it ran, was killed, as the kernel does when memory is out."""
        return self.status in (-9, 137) or (
            self.status != 0 and any(word in self.stderr for word in (b"Killed", b"out of memory"))
        )


class DriverCall:
    """One call of a compiler, whose driver waits for orders. Orders may be given from several threads."""

    def __init__(self, connection: Connection) -> None:
        """Reads what the driver says of itself; EOFError where it says nothing."""
        self._connection = connection
        told, _ = connection.receive()
        self.tool: str = told["tool"]
        self.real: str = told["real"]
        self.arguments: list[str] = told["arguments"]
        self.cwd: str = told["cwd"]
        self.env: dict[str, str] = told["env"]
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[tuple[dict[str, Any], bytes]]] = {}
        self._lock = threading.Lock()
        self._gone = False
        threading.Thread(target=self._receive, daemon=True).start()

    def run(self, argv: Sequence[str]) -> Ran:
        """Runs `argv` where the call was made."""
        answer, output = self._order({"do": "run", "argv": list(argv)})
        split = answer["stdout_bytes"]
        return Ran(
            status=answer["status"],
            seconds=answer["seconds"],
            cpu_seconds=answer["cpu_seconds"],
            peak_rss_bytes=answer["peak_rss_bytes"],
            stdout=output[:split],
            stderr=output[split:],
        )

    def read(self, path: str) -> bytes:
        return self._order({"do": "read", "path": self.absolute(path)})[1]

    def write(self, path: str, content: bytes) -> None:
        self._order({"do": "write", "path": self.absolute(path)}, content)

    def remove(self, paths: Sequence[str]) -> None:
        self._order({"do": "remove", "paths": [self.absolute(path) for path in paths]})

    def show(self, stream: Literal["stdout", "stderr"], content: bytes) -> None:
        """Prints `content` as the compiler would have."""
        if content:
            self._order({"do": "print", "stream": stream}, content)

    def become(self, argv: Sequence[str]) -> None:
        """Puts `argv` into the driver's place. The connection ends."""
        self._tell({"do": "become", "argv": list(argv)})

    def exit(self, status: int) -> None:
        """Ends the driver as a compiler that ended with `status`. The connection ends."""
        self._tell({"do": "exit", "status": status if status >= 0 else 128 - status})

    def absolute(self, path: str) -> str:
        """`path` as the driver sees it, from the folder that it was called in."""
        return os.path.normpath(Path(self.cwd, path))

    def close(self) -> None:
        self._connection.close()

    def _tell(self, order: dict[str, Any]) -> None:
        with suppress(OSError):
            self._connection.send(order)

    def _order(self, order: dict[str, Any], content: bytes = b"") -> tuple[dict[str, Any], bytes]:
        number = next(self._numbers)
        future: Future[tuple[dict[str, Any], bytes]] = Future()
        with self._lock:
            if self._gone:
                raise DriverGoneError
            self._waiting[number] = future
        try:
            self._connection.send({**order, "id": number}, content)
        except OSError as error:
            raise DriverGoneError from error
        answer, output = future.result()
        if answer.get("error"):
            raise DriverError(answer["error"])
        return answer, output

    def _receive(self) -> None:
        with suppress(EOFError, OSError, ValueError, KeyError):
            while True:
                answer, output = self._connection.receive()
                with self._lock:
                    future = self._waiting.pop(answer["id"])
                future.set_result((answer, output))
        with self._lock:
            self._gone = True
            waiting = list(self._waiting.values())
        for future in waiting:
            future.set_exception(DriverGoneError())


def listen(path: Path) -> socket.socket:
    """A socket at `path`, however long the path is (a socket's own may have 107 bytes)."""
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    listener.listen(512)
    return listener
