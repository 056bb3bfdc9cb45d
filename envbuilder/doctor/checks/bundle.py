"""The bundle and the wheelhouse, byte for byte against the lock and the receipts."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
