"""What this user and this job may use: memory, processes, open files; and the clock and the locale."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
