"""Whether ranks find each other, and whether NCCL and gloo add up right."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
