"""Variables and modules of the shell that get between the env and its libraries."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
