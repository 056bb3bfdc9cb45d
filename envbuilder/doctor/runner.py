"""Runs the checks, each on its own: one that fails doesn't keep the others from being run."""

from __future__ import annotations

from envbuilder.doctor.check import Check, Outcome, skipped
from envbuilder.doctor.checks import binaries, env, gpu, platform, storage, toolchain
from envbuilder.doctor.subject import Subject
from envbuilder.errors import EnvbuilderError, UsageError
from envbuilder.lock import SourceLock
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter

CHECKS: tuple[Check, ...] = (
    *platform.CHECKS,
    *storage.CHECKS,
    *toolchain.CHECKS,
    *env.CHECKS,
    *binaries.CHECKS,
    *gpu.CHECKS,
)


def run_checks(
    recipe: Recipe | None,
    *,
    root: Root,
    lock: SourceLock | None,
    only: frozenset[str] = frozenset(),
    reporter: Reporter,
) -> tuple[Finding, ...]:
    """One finding for each check, in the order of CHECKS; `only` these ids, where any are given.

    Raises UsageError for an id that no check has.
    """
    if unknown := only - {check.id for check in CHECKS}:
        raise UsageError(
            f"There is no check {', '.join(sorted(unknown))}.",
            remedy="envbuilder doctor --list",
            context={"got": ", ".join(sorted(unknown))},
        )
    subject = Subject(recipe, root, lock)
    chosen = [check for check in CHECKS if not only or check.id in only]
    return tuple(_run(check, subject, reporter) for check in chosen)


def _run(check: Check, subject: Subject, reporter: Reporter) -> Finding:
    try:
        outcome = _unmet(check, subject)
        if outcome is None:
            reporter.stage(f"checking {check.title}")
            outcome = check.run(subject, reporter)
    except EnvbuilderError as error:
        evidence = tuple(f"{key}: {value}" for key, value in error.context.items())
        outcome = Outcome("failed", error.message, evidence, error.remedy)
    return outcome.finding(check.id)


def _unmet(check: Check, subject: Subject) -> Outcome | None:
    if "recipe" in check.needs and subject.recipe is None:
        return skipped("No recipe was given.")
    if "env" in check.needs and subject.env is None:
        return skipped(f"Nothing is installed yet: envbuilder install {subject.recipe_file}")
    if "gpu" in check.needs and not subject.gpus.devices:
        return skipped(subject.gpus.absence)
    return None
