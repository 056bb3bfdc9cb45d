"""Slurm, as far as this user can ask it: account, partition, QoS, and what is queued."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
