"""The model of a training config: its files, tokenizer, template, and the memory that it takes."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
