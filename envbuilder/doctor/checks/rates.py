"""How fast a GPU multiplies and copies, against what its kind is known for."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
