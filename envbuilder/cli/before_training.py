"""What `train --sbatch` and `sweep` look at before they submit: what would fail must not wait in a queue."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.cli.app import Options
from envbuilder.doctor import Subject, choose_checks, expected_seconds, run_checks
from envbuilder.env_image import find_image
from envbuilder.errors import DoctorError, EnvbuilderError
from envbuilder.model import Finding
from envbuilder.own_program import own_command
from envbuilder.site import Site
from envbuilder.slurm.verdict import OWN_ERRORS

# Of doctor's checks: what lets a training job fail that a login node can see.
_CHECKS = (
    "model.config",
    "model.lock",
    "model.weights",
    "model.tokenizer",
    "model.layers",
    "model.memory",
    "model.steps",
    "data.lines",
)


@dataclass(frozen=True)
class Looked:
    """What was found out of a training that may begin."""

    memory: str
    """What is to be said of the memory that it takes."""
    expected_s: float | None
    """What it takes, its start too, by a former run's speed. None where none tells, and in an image."""


def look_before_training(
    opts: Options, config: Path, recipe_name: str, site_name: str, site: Site, overrides: Sequence[str]
) -> Looked:
    """DoctorError where what the login node can see of model, data and memory lets the job fail."""
    own = Path("recipes") / f"{recipe_name}.toml"
    recipe = own if own.is_file() else opts.root.bundle(recipe_name) / "recipe.toml"
    subject = opts.session(recipe).subject(site=site, config=config, overrides=tuple(overrides))
    is_image = subject.env is None and find_image(opts.root, recipe_name) is not None
    findings = (
        _found_in_image(opts, recipe, config, site_name, overrides)
        if is_image
        else run_checks(subject, opts.reporter, choose_checks(_CHECKS))
    )
    _tell(opts, subject, findings)
    memory = next((one.summary for one in findings if one.check == "model.memory"), "unknown")
    return Looked(memory, None if is_image else expected_seconds(subject))


def _found_in_image(
    opts: Options, recipe: Path, config: Path, site_name: str, overrides: Sequence[str]
) -> tuple[Finding, ...]:
    """The same of an env that is an image: `doctor` sees into it, in a process of its own.

    Raises what keeps it from that: another image than was installed, a node that has no means to read any.
    """
    opts.reporter.stage("looking at the model, the data and the memory, in the env's image")
    words = ["--root", str(opts.root.path), "--json", "--quiet"]
    words += ["doctor", str(recipe), "--config", str(config), "--site", site_name]
    words += [word for override in overrides for word in ("--set", override)]
    words += [word for check in _CHECKS for word in ("--only", check)]
    done = subprocess.run(own_command(*words), stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
        if done.returncode in (0, DoctorError.exit_code):
            return tuple(map(Finding.model_validate, answer["findings"]))
        kind = OWN_ERRORS[done.returncode]
        raise kind(answer["message"], remedy=answer["remedy"], context=answer["context"])
    except (ValueError, KeyError) as problem:
        raise EnvbuilderError(
            f"doctor ended with exit code {done.returncode} when it was to look into the env's image.",
            remedy=f"envbuilder doctor {recipe} --config {config}",
            context={"command": shlex.join(done.args)},
        ) from problem


def _tell(opts: Options, subject: Subject, findings: Sequence[Finding]) -> None:
    """DoctorError for the first check that failed; says what else its user should know."""
    told: set[str] = set()
    for finding in findings:
        if finding.verdict == "failed":
            raise DoctorError(
                finding.summary,
                remedy=finding.remedy or f"envbuilder doctor {subject.recipe_file} --config {subject.config}",
                context={"check": finding.check, "evidence": "\n" + "\n".join(finding.evidence)},
            )
        if finding.verdict == "warning":
            opts.reporter.warn(f"{finding.summary} {finding.remedy or ''}".strip())
        elif finding.check in ("model.memory", "model.steps") and finding.summary not in told:
            told.add(finding.summary)  # one reason may be that of several which were left out
            opts.reporter.note(finding.summary)
