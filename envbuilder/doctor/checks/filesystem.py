"""What the disks are that ROOT, HOME and TMPDIR lie on, and how they behave."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
