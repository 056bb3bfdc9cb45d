"""Goes through a log once, keeping little: where each known failure is first seen, on each rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from envbuilder.doctor.log_lines import Block, Line, has_task_labels, lines_of
from envbuilder.doctor.log_torchrun import ROOT_CAUSE, RootCause
from envbuilder.doctor.log_traces import TELLING_WORDS, TRACEBACK, PythonError, Telling, TraceReader
from envbuilder.doctor.signatures import LINES_AFTER, Signature, signatures

LINES_BEFORE = 3
SPEAKERS_AT_MOST = 4096
"""More ranks than this (a log of nonsense) are taken for one."""
_TAIL_CHARS = 4 * 1024
"""Of a block in which nothing is looked for: what may stand before something in the next."""


@dataclass(frozen=True)
class Hit:
    """A known failure at its first line on one rank, with the lines around it of the same rank."""

    signature: Signature
    line: Line
    before: tuple[Line, ...]
    after: tuple[Line, ...]


@dataclass
class Scan:
    """What the log holds."""

    lines: int = 0
    hits: dict[tuple[str, str], Hit] = field(default_factory=dict)
    """By signature and speaker."""
    errors: list[PythonError] = field(default_factory=list)
    """The last exception of each rank, in the log's order."""
    telling: Telling = field(default_factory=Telling)
    roots: list[RootCause] = field(default_factory=list)


def scan_log(blocks: Iterable[Block]) -> Scan:
    """Reads all of `blocks`, each once."""
    scanner = _Scanner()
    for block in blocks:
        scanner.read(block)
    return scanner.finish()


@dataclass
class _Candidate:
    """A line with a signature's mark, until the lines after it are there."""

    signature: Signature
    line: Line
    before: tuple[Line, ...]
    after: list[Line] = field(default_factory=list)

    @property
    def window(self) -> str:
        return "\n".join(line.text for line in (self.line, *self.after))


@dataclass
class _Speaker:
    """One rank, as far as its lines have been read."""

    before: deque[Line] = field(default_factory=lambda: deque(maxlen=LINES_BEFORE))
    candidates: list[_Candidate] = field(default_factory=list)
    traces: TraceReader = field(default_factory=TraceReader)
    root: RootCause | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether its next line is needed, whatever it says."""
        return bool(self.candidates) or self.traces.is_reading or self.root is not None


class _Scanner:
    def __init__(self) -> None:
        self._scan = Scan()
        self._speakers: dict[str, _Speaker] = {}
        self._labelled: bool | None = None

    def read(self, block: Block) -> None:
        if self._labelled is None:
            self._labelled = has_task_labels(block)
        text = block.text
        marks = [(mark, each) for each in signatures() for mark in each.marks if mark in text]
        tells = any(word in text for word in TELLING_WORDS)
        self._scan.lines = block.first + text.count("\n")
        if not (marks or tells or TRACEBACK in text or ROOT_CAUSE in text) and not any(
            speaker.is_waiting for speaker in self._speakers.values()
        ):
            # Most of a long log: only what may stand before something is kept of it.
            tail = text[-_TAIL_CHARS:]
            block, marks = Block(self._scan.lines - tail.count("\n"), tail), []
        for line in lines_of(block, labelled=self._labelled):
            self._read_line(line, marks, tells)

    def finish(self) -> Scan:
        for speaker in self._speakers.values():
            for candidate in speaker.candidates:
                self._judge(candidate)
            if speaker.root is not None:
                self._scan.roots.append(speaker.root)
        errors = (speaker.traces.last for speaker in self._speakers.values())
        self._scan.errors = sorted((error for error in errors if error), key=lambda error: error.line.number)
        return self._scan

    def _read_line(self, line: Line, marks: list[tuple[str, Signature]], tells: bool) -> None:
        speaker = self._speaker(line.speaker)
        self._go_on(speaker, line)
        for mark, signature in marks:
            if mark in line.text and (signature.id, line.speaker) not in self._scan.hits:
                speaker.candidates.append(_Candidate(signature, line, tuple(speaker.before)))
        speaker.traces.read(line)
        if tells:
            self._scan.telling.read(line)
        if ROOT_CAUSE in line.text:
            speaker.root = RootCause(line)
        speaker.before.append(line)

    def _go_on(self, speaker: _Speaker, line: Line) -> None:
        if speaker.root is not None and not speaker.root.read(line):
            self._scan.roots.append(speaker.root)
            speaker.root = None
        for candidate in speaker.candidates:
            candidate.after.append(line)
        while speaker.candidates and len(speaker.candidates[0].after) >= LINES_AFTER:
            self._judge(speaker.candidates.pop(0))

    def _judge(self, candidate: _Candidate) -> None:
        signature, line = candidate.signature, candidate.line
        if signature.fits(candidate.window):
            hit = Hit(signature, line, candidate.before, tuple(candidate.after))
            self._scan.hits.setdefault((signature.id, line.speaker), hit)

    def _speaker(self, name: str) -> _Speaker:
        if name not in self._speakers and len(self._speakers) >= SPEAKERS_AT_MOST:
            name = ""
        if name not in self._speakers:
            self._speakers[name] = _Speaker()
        return self._speakers[name]
