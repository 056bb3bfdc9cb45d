"""Whether the bundled trainer trains with what the env holds."""

from __future__ import annotations

from envbuilder.doctor.check import Check, Outcome, ok
from envbuilder.doctor.subject import Subject
from envbuilder.report import Reporter
from envbuilder.trainer_versions import check_trains, oldest_versions


def check_versions(subject: Subject, reporter: Reporter) -> Outcome:
    """The env's versions against the oldest that the trainer takes; `train` refuses what fails here."""
    check_trains(subject.receipt)
    return ok(
        "The trainer trains with the env's versions.",
        *(f"{bound.package} {bound.version} or newer: {bound.reason}" for bound in oldest_versions()),
    )


CHECKS = (
    Check(
        "model.versions",
        "the trainer's libraries",
        "the env's transformers, mamba-ssm and peft against the oldest that the trainer takes",
        check_versions,
        needs=("recipe", "env", "config"),
    ),
)
