"""Explains the log of a build or a job that failed, by the known failures of signatures.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.model import Finding

_LAST_LINES = 10


@dataclass(frozen=True, slots=True)
class Signature:
    """One known failure; signatures.toml says what the fields hold."""

    id: str
    pattern: str
    cause: str
    remedy: str
    seen: str
    survivable: bool = False


@cache
def signatures() -> tuple[Signature, ...]:
    """The table."""
    text = files("envbuilder.doctor").joinpath("signatures.toml").read_text(encoding="utf-8")
    return tuple(Signature(**entry) for entry in tomllib.loads(text)["signature"])


def explain_log(path: Path) -> tuple[Finding, ...]:
    """What went wrong in the log `path`: the first cause first, then what else is known in it.

    A failure that no signature knows gives one warning with the log's last lines. InputError where the log
    can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"The log {path} can't be read: {error.strerror}.",
            remedy="envbuilder doctor --log FILE, with the log that the failed command named",
            context={"file": path},
        ) from error
    return explain_text(text) or (_unknown(text),)


def explain_text(text: str) -> tuple[Finding, ...]:
    """The known failures in `text`: what stops a run before what it can survive, then in the log's order."""
    found = [
        (signature.survivable, match.start(), signature)
        for signature in signatures()
        if (match := re.search(signature.pattern, text))
    ]
    ordered = sorted(found, key=lambda item: item[:2])
    return tuple(_finding(signature, text, at) for _, at, signature in ordered)


def remedy_for(text: str, recipe_file: str) -> str | None:
    """The remedy of the first known failure in `text`, for the recipe in this file."""
    remedy = next((finding.remedy for finding in explain_text(text)), None)
    return remedy and remedy.replace("RECIPE", recipe_file)


def _finding(signature: Signature, text: str, at: int) -> Finding:
    number = text.count("\n", 0, at) + 1
    line = text.split("\n")[number - 1].strip()
    return Finding(
        check=f"log.{signature.id}",
        verdict="warning" if signature.survivable else "failed",
        summary=signature.cause,
        evidence=(f"line {number}: {line}", f"seen: {signature.seen}"),
        remedy=signature.remedy,
    )


def _unknown(text: str) -> Finding:
    last = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return Finding(
        check="log.unknown",
        verdict="warning",
        summary="No known failure is in this log; its last lines may tell.",
        evidence=tuple(last),
        remedy="Look for the first line with error or Error: later ones are often its consequences.",
    )
