"""Runs the checks side by side, each on its own: one that fails or hangs keeps no other from being run."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue

from envbuilder.doctor.check import Check, Outcome, failed, skipped
from envbuilder.doctor.checks import (
    binaries,
    bundle,
    data,
    distributed,
    env,
    filesystem,
    gpu,
    kernels,
    libraries,
    limits,
    model,
    modules,
    network,
    platform,
    purging,
    rates,
    slurm,
    storage,
    toolchain,
    variables,
    versions,
)
from envbuilder.doctor.subject import Subject
from envbuilder.errors import EnvbuilderError, UsageError
from envbuilder.model import Finding
from envbuilder.report import Reporter

CHECKS: tuple[Check, ...] = (
    *platform.CHECKS,
    *limits.CHECKS,
    *storage.CHECKS,
    *filesystem.CHECKS,
    *purging.CHECKS,
    *toolchain.CHECKS,
    *variables.CHECKS,
    *bundle.CHECKS,
    *env.CHECKS,
    *modules.CHECKS,
    *libraries.CHECKS,
    *binaries.CHECKS,
    *gpu.CHECKS,
    *kernels.CHECKS,
    *rates.CHECKS,
    *distributed.CHECKS,
    *network.CHECKS,
    *slurm.CHECKS,
    *versions.CHECKS,
    *model.CHECKS,
    *data.CHECKS,
)
_SIDE_BY_SIDE = 8
"""Quick checks that run at once: most of them wait for a program or a disk."""
_SLOW_START_S = 2.0
"""A check that takes longer is named as under way."""


def choose_checks(
    only: Iterable[str] = (), *, quick: bool = False, asked: Iterable[str] = ()
) -> tuple[Check, ...]:
    """The checks to run, in the order of CHECKS.

    `only` these, by id or theme, where any are given; where `quick`, without those that work on the GPU or
    hash all files; and those in `asked` that are run only where they are asked for. Raises UsageError for
    a name that is neither an id nor a theme.
    """
    named, wanted = frozenset(only), frozenset(asked)
    there = {check.id for check in CHECKS} | {check.theme for check in CHECKS}
    if unknown := (named | wanted) - there:
        raise UsageError(
            f"There is no check {', '.join(sorted(unknown))}.",
            remedy="envbuilder doctor --list",
            context={"got": ", ".join(sorted(unknown))},
        )

    def is_chosen(check: Check) -> bool:
        if check.id in named | wanted:
            return True
        if check.cost == "asked" or (quick and check.cost != "quick"):
            return False
        return not named or check.theme in named

    return tuple(filter(is_chosen, CHECKS))


def run_checks(
    subject: Subject, reporter: Reporter, checks: tuple[Check, ...] | None = None
) -> tuple[Finding, ...]:
    """One finding for each of `checks` (without: all that need not be asked for), in their order."""
    chosen = choose_checks() if checks is None else checks
    ended: SimpleQueue[Finding] = SimpleQueue()
    lanes: dict[str, SimpleQueue[Check]] = {}
    # What may take longest first, so that the rest is done beside it.
    for check in sorted(chosen, key=lambda check: -check.limit_s):
        lanes.setdefault(_lane(check), SimpleQueue()).put(check)
    for cost, lane in lanes.items():
        for _ in range(_SIDE_BY_SIDE if cost == "quick" else 1):
            # Daemons: what never answers must not keep the command from ending.
            threading.Thread(target=_work_through, args=(lane, ended, subject, reporter), daemon=True).start()
    reporter.stage(f"checking {len(chosen)} things")
    findings: dict[str, Finding] = {}
    for count in range(1, len(chosen) + 1):
        finding = ended.get()
        findings[finding.check] = finding
        reporter.progress("checks", count, len(chosen), "checks")
    return tuple(findings[check.id] for check in chosen)


def _lane(check: Check) -> str:
    """What `check` is run among: what costs the same, as to who disturbs whom."""
    if check.cost != "asked":
        return check.cost
    return "gpu" if "gpu" in check.needs else "quick"


def _work_through(
    lane: SimpleQueue[Check], ended: SimpleQueue[Finding], subject: Subject, reporter: Reporter
) -> None:
    with suppress(Empty):
        while True:
            check = lane.get_nowait()
            ended.put(_run_within_limit(check, subject, reporter).finding(check.id))


def _run_within_limit(check: Check, subject: Subject, reporter: Reporter) -> Outcome:
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(_run(check, subject, reporter)), name=check.id, daemon=True
    )
    thread.start()
    thread.join(min(_SLOW_START_S, check.limit_s))
    if thread.is_alive():
        reporter.note(f"checking {check.title}")
        thread.join(max(0.0, check.limit_s - _SLOW_START_S))
    if outcomes:
        return outcomes[0]
    return failed(
        f"Looking at {check.title} gave no answer within {check.limit_s:.0f} s.",
        remedy=f"See whether it hangs by itself: envbuilder doctor {subject.recipe_file} --only {check.id}; "
        "a disk or a server that doesn't answer is for the administrators",
    )


def _run(check: Check, subject: Subject, reporter: Reporter) -> Outcome:
    try:
        return _unmet(check, subject) or check.run(subject, reporter)
    except EnvbuilderError as error:
        evidence = tuple(f"{key}: {value}" for key, value in error.context.items())
        return Outcome("failed", error.message, evidence, error.remedy)
    except Exception as error:  # a defect in one check must not lose what the others found
        return failed(
            f"The check itself broke off: {type(error).__name__}: {error}",
            *traceback.format_exc().strip().splitlines()[-6:],
            remedy=f"Report it with: envbuilder doctor {subject.recipe_file} --only {check.id} "
            "--report doctor.html",
        )


def _unmet(check: Check, subject: Subject) -> Outcome | None:
    for need in check.needs:
        if reason := _reason_without(need, subject):
            return skipped(reason)
    return None


def _reason_without(need: str, subject: Subject) -> str | None:
    """Why the checks that need this are skipped; None where it is there."""
    there, otherwise = _ANSWERS[need](subject)
    return None if there else otherwise


_ANSWERS: dict[str, Callable[[Subject], tuple[bool, str]]] = {
    "recipe": lambda subject: (subject.recipe is not None, "No recipe was given."),
    "env": lambda subject: (subject.env is not None, subject.env_absence),
    "bundle": lambda subject: (
        subject.has_bundle,
        f"Nothing is fetched yet: envbuilder fetch {subject.recipe_file}",
    ),
    "gpu": lambda subject: (bool(subject.gpus.devices), subject.gpus.absence),
    "gpus": lambda subject: (
        len(subject.gpus.devices) > 1,
        "There is one GPU here." if subject.gpus.devices else subject.gpus.absence,
    ),
    "site": lambda subject: (subject.site is not None, "No site was given (--site NAME)."),
    "config": lambda subject: (subject.config is not None, "No training config was given (--config FILE)."),
    "slurm": lambda subject: (subject.has_slurm, "Slurm's commands are not on this machine."),
    "addresses": lambda subject: (
        limits.torch_fits(),
        "torch's libraries don't fit into this shell's limit of virtual memory (ulimit -v): look again in a "
        "job.",
    ),
}
"""What a check may need → whether it is there, and what is said where it isn't."""
