"""The compile service: answers the compiler drivers of one build, over a socket in its private folder."""

from __future__ import annotations

import socket
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from envbuilder.compile.drivers.compiler import Connection
from envbuilder.compile.units.command_line import Unit, read_command
from envbuilder.compile.units.driver_call import DriverCall, DriverError, DriverGoneError, listen
from envbuilder.compile.units.scope import Scope
from envbuilder.compile.units.unit_compiler import UnitCompiler
from envbuilder.errors import EnvbuilderError, StoppedError

_LARGEST_RESPONSE_FILE = 4 << 20
"""Bytes."""
STOPPED = 75
"""Exit status of a driver whose compiler was not started because the build is being stopped."""


class CompileService:
    """Serves from `__enter__` to `__exit__`; each call of a compiler in a thread of its own."""

    def __init__(self, path: Path, scope: Scope, compiler: UnitCompiler, log: Path) -> None:
        self._path = path
        self._scope = scope
        self._compiler = compiler
        self._log = log
        self._calls: set[DriverCall] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> CompileService:
        self._listener = listen(self._path)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for call in calls:
            call.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        try:
            call = DriverCall(Connection(stream))
        except (EOFError, OSError, ValueError, KeyError):
            stream.close()  # whoever this is, it is no driver
            return
        with self._lock:
            if self._closed:
                call.close()
                return
            self._calls.add(call)
        try:
            self._answer(call)
        except (DriverGoneError, OSError):
            pass  # its build has ended
        except DriverError as error:
            with suppress(DriverGoneError):
                call.show("stderr", f"envbuilder: {error}\n".encode())
            call.exit(1)
        except Exception:
            # The driver must not wait for ever, and whoever reads the log must see why.
            self._note(traceback.format_exc())
            call.exit(1)
        finally:
            with self._lock:
                self._calls.discard(call)
            call.close()

    def _answer(self, call: DriverCall) -> None:
        command = read_command(
            "nvcc" if call.tool == "nvcc" else "c++",
            call.arguments,
            wanted=self._scope.wanted,
            ptx=self._scope.ptx,
            response_file=lambda name: self._response_file(call, name),
        )
        if not isinstance(command, Unit):
            call.become([call.real, *command.arguments])
            return
        try:
            call.exit(self._compiler.compile(call, command))
        except StoppedError:
            call.exit(STOPPED)
        except EnvbuilderError as error:
            call.show("stderr", f"envbuilder: {error.message}\n".encode())
            call.exit(1)

    def _response_file(self, call: DriverCall, name: str) -> str | None:
        try:
            text = call.read(name)
        except DriverError:
            return None
        return text.decode("utf-8", "replace") if len(text) <= _LARGEST_RESPONSE_FILE else None

    def _note(self, text: str) -> None:
        with self._lock, self._log.open("a", encoding="utf-8") as file:
            file.write(text)
