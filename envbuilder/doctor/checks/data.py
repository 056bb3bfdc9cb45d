"""A training config's data: faulty lines, lengths, and how many tokens are trained."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
