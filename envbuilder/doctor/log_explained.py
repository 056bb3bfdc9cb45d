"""Names the first cause in a log, shows its lines, and says what to type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from envbuilder.doctor.log_lines import Line, read_blocks
from envbuilder.doctor.log_scan import Hit, Scan, scan_log
from envbuilder.doctor.log_torchrun import RootCause
from envbuilder.doctor.log_traces import PythonError, Telling
from envbuilder.doctor.signatures import Signature, known_in, signatures
from envbuilder.errors import InputError
from envbuilder.model import Finding

_SHOWN_CHARS = 240
_RANKS_SHOWN = 8
_CAUSES_SHOWN = 6
_FOLLOWERS_SHOWN = 5
_USAGE = "envbuilder doctor --log FILE, with the log that the failed command named; - is standard input"


def explain_log(name: str) -> tuple[Finding, ...]:
    """What went wrong in the log in the file `name` (`-`: standard input): the first cause first.

    Where no signature knows the failure, one finding says so and shows the most telling lines; where
    nothing in the log speaks of a failure, one that is ok says that. InputError where it can't be read.
    """
    try:
        with _opened(name) as stream:
            scan = scan_log(read_blocks(stream))
    except OSError as error:
        raise InputError(
            f"The log {name} can't be read: {error.strerror}.", remedy=_USAGE, context={"file": name}
        ) from error
    return explain_scan(scan)


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name != "-":
        with Path(name).open("rb") as stream:
            yield stream
    elif sys.stdin is None:
        raise InputError("There is no standard input to read the log from.", remedy=_USAGE)
    else:
        yield sys.stdin.buffer


def explain_scan(scan: Scan) -> tuple[Finding, ...]:
    """The findings: causes, what is unknown, what only follows from something else, what can be survived."""
    if not scan.lines:
        return (
            Finding(check="log.empty", verdict="skipped", summary="The log is empty: nothing to explain."),
        )
    by_kind: dict[str, list[list[Hit]]] = {"cause": [], "symptom": [], "consequence": [], "note": []}
    for hits in _grouped(scan):
        by_kind[hits[0].signature.kind].append(hits)
    first_failed = _first_failed(scan)
    unknown = [error for error in scan.errors if not known_in(error.line.text)]
    unknown.sort(key=lambda error: (error.line.speaker not in first_failed, error.line.number))
    telling = scan.telling.without(known_in)
    followers = by_kind["symptom"] + by_kind["consequence"]
    aside: list[str] = []
    if by_kind["cause"]:
        named = [_failure(hits) for hits in by_kind["cause"][:_CAUSES_SHOWN]]
        aside = [f"also raised: {_error(error)}" for error in unknown[:_RANKS_SHOWN]]
    elif unknown or telling.compiler or (telling.other and not followers):
        named = [_unknown(unknown, telling, has_ended=bool(followers))]
    else:
        named = [_failure(hits) for hits in followers[:1]]
        followers = followers[1:]
    if named:
        named[0] = _with_evidence(named[0], [*aside, *_followed(followers), *_told(scan.roots)])
    notes = [_failure(hits) for hits in by_kind["note"]]
    return (*named, *notes) or (
        Finding(
            check="log.clean",
            verdict="ok",
            summary=f"Nothing in the log's {scan.lines} lines speaks of a failure.",
        ),
    )


def _grouped(scan: Scan) -> list[list[Hit]]:
    """The hits of each signature, by kind and in the order in which to name them.

    What the rank says that torchrun saw fail first comes before other ranks' words: a log's order is that
    of its buffers. Of several signatures in one line, the table's first one counts.
    """
    first_failed = _first_failed(scan)
    lines: set[Line] = set()
    found: dict[Signature, list[Hit]] = {}
    order = {signature: place for place, signature in enumerate(signatures())}
    for hit in sorted(scan.hits.values(), key=lambda hit: (hit.line.number, order[hit.signature])):
        if hit.line not in lines:
            lines.add(hit.line)
            found.setdefault(hit.signature, []).append(hit)

    def importance(hits: list[Hit]) -> tuple[int, bool, int]:
        by_root = any(hit.line.speaker in first_failed for hit in hits)
        return hits[0].signature.rank, not by_root, hits[0].line.number

    return sorted(found.values(), key=importance)


def _first_failed(scan: Scan) -> frozenset[str]:
    return frozenset[str]().union(*(root.speakers for root in scan.roots))


def _failure(hits: list[Hit]) -> Finding:
    first, signature = hits[0], hits[0].signature
    lines = [_quoted(line, " ") for line in first.before]
    lines.append(_quoted(first.line, ">", signature))
    lines += [_quoted(line, " ") for line in first.after]
    if others := [_place(hit.line) for hit in hits[1:]]:
        more = f" and {len(others) - _RANKS_SHOWN} more" if len(others) > _RANKS_SHOWN else ""
        lines.append(f"also: {'; '.join(others[:_RANKS_SHOWN])}{more}")
    return Finding(
        check=f"log.{signature.id}",
        verdict="warning" if signature.kind == "note" else "failed",
        summary=signature.cause,
        evidence=(*lines, f"seen in: {signature.seen}"),
        remedy=signature.remedy,
    )


def _unknown(errors: list[PythonError], telling: Telling, *, has_ended: bool) -> Finding:
    """`has_ended`: something else in the log says that the run ended by a failure."""
    shown = [_error(error) for error in errors[:_RANKS_SHOWN]]
    lines = telling.compiler or telling.other
    shown += [_quoted(line, ">") for line in (telling.compiler if shown else lines)]
    return Finding(
        check="log.unknown",
        verdict="failed" if has_ended else "warning",
        summary="The log speaks of a failure that is not among the known ones; these lines tell most.",
        evidence=tuple(shown),
        remedy="Look there first; what in the environment may be the reason shows: envbuilder doctor RECIPE",
    )


def _error(error: PythonError) -> str:
    cause = f" (from {_quoted(error.origin.line, '').strip()})" if error.origin else ""
    return f"{_quoted(error.line, '>')}  [{error.frame or 'no frame'}]{cause}"


def _followed(followers: list[list[Hit]]) -> list[str]:
    return [
        f"what followed or went before: {hits[0].signature.cause} ({_place(hits[0].line)})"
        for hits in followers[:_FOLLOWERS_SHOWN]
    ]


def _told(roots: list[RootCause]) -> list[str]:
    return [root.summary for root in roots[:_RANKS_SHOWN] if root.fields]


def _with_evidence(finding: Finding, lines: list[str]) -> Finding:
    return finding.model_copy(update={"evidence": (*finding.evidence, *lines)})


def _place(line: Line) -> str:
    return f"line {line.number}, {line.speaker}" if line.speaker else f"line {line.number}"


def _quoted(line: Line, sign: str, signature: Signature | None = None) -> str:
    """The line with its number and rank; of a long one, the part with the signature's mark."""
    text = "".join(char if char.isprintable() else " " for char in line.text).rstrip()
    if len(text) > _SHOWN_CHARS:
        marks = signature.marks if signature else ()
        at = max((text.find(mark) for mark in marks), default=0)
        start = max(0, at - _SHOWN_CHARS // 2)
        text = f"{'…' if start else ''}{text[start : start + _SHOWN_CHARS]}…"
    speaker = f" {line.speaker}" if line.speaker else ""
    return f"{sign} {line.number}{speaker} | {text}"
