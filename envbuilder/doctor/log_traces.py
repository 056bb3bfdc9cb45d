"""What in a log tells of a failure that no signature knows: tracebacks, and lines that speak of errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from envbuilder.doctor.log_lines import Line

TRACEBACK = "Traceback (most recent call last)"
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
TELLING_WORDS = ("rror", "RROR", "atal", "FATAL", "CRITICAL", "undefined reference", "core dumped", *CHAINED)
"""What lines without any of these say is not looked at."""

_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>.+))?')
_EXCEPTION = re.compile(r"\s*[A-Za-z_][\w.]*(?::|\s*$)")
_LIBRARY = re.compile(r"site-packages|dist-packages|/lib/python3|<frozen |<string>")
_COMPILER = re.compile(
    r"^\s*\S+?(?::\d+){1,2}: (?:fatal )?error: |^\s*\S+\(\d+\): (?:catastrophic )?error\b"
    r"|^\s*(?:nvcc|ptxas|cicc)\b.*\b(?:fatal|error)\s*:|\bundefined reference to |^\s*CMake Error\b"
)
_FAILURE = re.compile(
    r"(?:^|[\s\]>])(?:fatal(?: error)?|error|Error|Fatal|FATAL|ERROR|CRITICAL|Fatal Python error)\s*:"
    r"\s+(?![-+]?[\d.])\S|\[(?:ERROR|FATAL|CRITICAL)\]|\bcore dumped\b"
)
_NO_FAILURE = re.compile(r"^\s*\d* \| |Warning:|WARNING")
"""A compiler's quotation of the source, and warnings."""
_TRACE_LINES_AT_MOST = 2000
_TELLING_AT_MOST = 3


@dataclass(frozen=True)
class PythonError:
    """A traceback's exception."""

    line: Line
    frame: str
    """The innermost frame of the user's own code, as FILE:LINE, in FUNCTION; empty where there is none."""
    origin: PythonError | None = None
    """The one that it was raised from."""


@dataclass
class _Trace:
    """A traceback that is being read."""

    indent: int
    own: str = ""
    innermost: str = ""
    length: int = 0


@dataclass
class TraceReader:
    """Puts one rank's tracebacks together."""

    last: PythonError | None = None
    _open: _Trace | None = None
    _chained: bool = False

    @property
    def is_reading(self) -> bool:
        """Whether it is in the middle of a traceback."""
        return self._open is not None

    def read(self, line: Line) -> None:
        """Takes the rank's next line."""
        if TRACEBACK in line.text:
            self._open = _Trace(indent=_indent(line.text))
        elif self._open is not None:
            self._read_frame(self._open, line)
        elif any(words in line.text for words in CHAINED):
            self._chained = True

    def _read_frame(self, trace: _Trace, line: Line) -> None:
        trace.length += 1
        if _indent(line.text) > trace.indent:
            if match := _FRAME.match(line.text):
                trace.innermost = f"{match['file']}:{match['line']}, in {match['function'] or '<module>'}"
                trace.own = trace.own if _LIBRARY.search(match["file"]) else trace.innermost
            if trace.length > _TRACE_LINES_AT_MOST:
                self._open = None
            return
        self._open = None
        if _EXCEPTION.match(line.text):
            origin = replace(self.last, origin=None) if self.last and self._chained else None
            self.last = PythonError(line, trace.own or trace.innermost, origin)
        self._chained = False


@dataclass
class Telling:
    """The first lines that speak of a failure: a compiler's before any other."""

    compiler: list[Line] = field(default_factory=list)
    other: list[Line] = field(default_factory=list)

    def read(self, line: Line) -> None:
        """Keeps the line where it tells and enough aren't kept already."""
        if not any(word in line.text for word in TELLING_WORDS):
            return
        if len(self.compiler) < _TELLING_AT_MOST and _COMPILER.search(line.text):
            self.compiler.append(line)
        elif (
            len(self.other) < _TELLING_AT_MOST
            and _FAILURE.search(line.text)
            and not _NO_FAILURE.search(line.text)
        ):
            self.other.append(line)

    def without(self, is_known: Callable[[str], object]) -> Telling:
        """Those whose text is nothing that is known."""
        compiler, other = (
            [line for line in lines if not is_known(line.text)] for lines in (self.compiler, self.other)
        )
        return Telling(compiler, other)


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())
