"""Doctor's findings as people read them: counted, by theme, and which to mend first. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from envbuilder.model import Finding

Verdict = Literal["failed", "warning", "ok", "skipped"]
_COUNTED: dict[Verdict, str] = {"failed": "failed", "warning": "warnings", "ok": "ok", "skipped": "skipped"}
"""Verdict → its word after a number; worst first."""
_ACRONYMS = frozenset({"gpu"})
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[^\t\n -\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def counts(findings: Iterable[Finding]) -> dict[Verdict, int]:
    """Verdict → how many, worst first; verdicts that none has too."""
    found = Counter(finding.verdict for finding in findings)
    return {verdict: found[verdict] for verdict in _COUNTED}


def counted(findings: Iterable[Finding]) -> str:
    """E.g. "1 failed, 2 warnings, 25 ok"; what there is none of is left out."""
    words = [
        f"{count} {'warning' if (verdict, count) == ('warning', 1) else _COUNTED[verdict]}"
        for verdict, count in counts(findings).items()
        if count
    ]
    return ", ".join(words) or "nothing was checked"


def theme_title(check: str) -> str:
    """The heading over the checks of this one's theme: "Storage" for "storage.free-space"."""
    theme = check.partition(".")[0]
    return theme.upper() if theme in _ACRONYMS else theme.capitalize()


def by_theme(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Heading → its findings, both in the order of the checks."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(theme_title(finding.check), []).append(finding)
    return groups


def skipped_by_reason(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Reason → the ids of the checks that were skipped for it."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict == "skipped":
            reasons.setdefault(finding.summary, []).append(finding.check)
    return reasons


def not_well(findings: Iterable[Finding]) -> list[Finding]:
    """What failed, then what is a warning, each in the order of the checks: later ones often follow from
    earlier ones, so the first is what to mend first."""
    return sorted(
        (finding for finding in findings if finding.verdict in ("failed", "warning")),
        key=lambda finding: finding.verdict != "failed",
    )


def printable(text: str) -> str:
    """`text` without colours, and with U+FFFD for what would steer a terminal or has no place in a page."""
    return _CONTROL.sub("\ufffd", _COLOURS.sub("", text.replace("\r\n", "\n")))
