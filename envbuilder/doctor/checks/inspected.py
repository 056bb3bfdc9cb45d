"""What the checks of a training config share: each reads one part of what the env's trainer found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from envbuilder.doctor.check import Need, Outcome, skipped
from envbuilder.doctor.inspecting import TIMEOUT_S
from envbuilder.doctor.subject import Subject
from envbuilder.report import Reporter

Parts = Mapping[str, Any]
NEEDS: tuple[Need, ...] = ("recipe", "env", "config")
MARK = "Put {% generation %} … {% endgeneration %} around the assistant's text in the chat template"
LIMIT_S = 2 * TIMEOUT_S + 10
_TOLD_BY = {"config": "model.config", "tokenizer": "model.tokenizer"}
"""The part that the first check reads, and its id: it alone tells why there is nothing to read."""


def reads(
    part: str, *, without: str, files: bool = False
) -> Callable[[Callable[[Subject, Parts], Outcome]], Callable[[Subject, Reporter], Outcome]]:
    """A check of `part`: skipped with the reason `without` where the trainer found no such part, failed where
    the part is an error. `files`: of the quick half."""

    def wrap(check: Callable[[Subject, Parts], Outcome]) -> Callable[[Subject, Reporter], Outcome]:
        @wraps(check)
        def run(subject: Subject, reporter: Reporter) -> Outcome:
            if subject.recipe and not subject.recipe.trainer:
                return skipped("The recipe leaves the trainer out of the env.")
            found = subject.config_files
            told_by = "config"
            if not found.problem and not found.error_of("config") and not files:
                found, told_by = subject.inspected, "tokenizer"
            for problem in (found.problem, found.error_of("config")):
                if problem and part == told_by:
                    raise problem
                if problem:
                    return skipped(f"The trainer can't look into the config: see {_TOLD_BY[told_by]}.")
            if problem := found.error_of(part):
                raise problem
            return check(subject, found.parts) if part in found.parts else skipped(without)

        return run

    return wrap
