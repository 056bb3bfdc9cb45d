"""Says what is wrong, proves it, and gives the command that mends it.

A `Check` looks at one thing of a `Subject` and gives an `Outcome`; the checks lie one theme to a file under
`checks/`. `run_checks` turns outcomes into the `Finding`s that the cli shows; `explain_log` makes findings of
the log of a build or a job that failed.
"""

from __future__ import annotations

from envbuilder.doctor.former_runs import expected_seconds
from envbuilder.doctor.log_explained import explain_log
from envbuilder.doctor.runner import CHECKS, choose_checks, run_checks
from envbuilder.doctor.subject import Subject

__all__ = ["CHECKS", "Subject", "choose_checks", "expected_seconds", "explain_log", "run_checks"]
