"""What a check is, and what it can find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from envbuilder.doctor.subject import Subject
from envbuilder.model import Finding
from envbuilder.report import Reporter

Need = Literal["recipe", "env", "bundle", "gpu", "gpus", "site", "config", "slurm", "addresses"]
"""What a check can't do without: a recipe, an env that is installed, a bundle that is fetched, a GPU, several
GPUs, a site, a training config, Slurm's commands, addresses enough to map torch's libraries."""
Cost = Literal["quick", "rehash", "gpu", "asked"]
"""`quick`: seconds at most. `rehash`: reads all bytes. `gpu`: works on the GPU, or loads torch into processes
of its own; one at a time, so that none disturbs another. `asked`: run only where it is asked for by name."""


@dataclass(frozen=True)
class Outcome:
    """What one check found; `ok`, `warning`, `failed` and `skipped` make one."""

    verdict: Literal["ok", "warning", "failed", "skipped"]
    summary: str
    """One sentence."""
    evidence: tuple[str, ...] = ()
    remedy: str | None = None

    def finding(self, check: str) -> Finding:
        """This outcome as the finding of the check of that id."""
        return Finding(
            check=check,
            verdict=self.verdict,
            summary=self.summary,
            evidence=self.evidence,
            remedy=self.remedy,
        )


def ok(summary: str, *evidence: str) -> Outcome:
    """All is as it should be."""
    return Outcome("ok", summary, evidence)


def warning(summary: str, *evidence: str, remedy: str) -> Outcome:
    """Works, but the user should look at it."""
    return Outcome("warning", summary, evidence, remedy)


def failed(summary: str, *evidence: str, remedy: str) -> Outcome:
    """Does not work, or can't be relied on."""
    return Outcome("failed", summary, evidence, remedy)


def skipped(reason: str) -> Outcome:
    """Not looked at, for this reason."""
    return Outcome("skipped", reason)


@dataclass(frozen=True)
class Check:
    """One thing that doctor looks at."""

    id: str
    """THEME.THING, stable: scripts select by it."""
    title: str
    looks_at: str
    run: Callable[[Subject, Reporter], Outcome]
    """May raise EnvbuilderError, which is a failure with that error's message and remedy. Called in a thread
    of its own, beside other checks."""
    needs: tuple[Need, ...] = ()
    """Where one of these is missing, the check is skipped, with the reason."""
    cost: Cost = "quick"
    limit_s: float = 30
    """Seconds after which it is given up: a disk or a server that never answers must not hold up the rest."""

    @property
    def theme(self) -> str:
        """What comes before the dot."""
        return self.id.partition(".")[0]
