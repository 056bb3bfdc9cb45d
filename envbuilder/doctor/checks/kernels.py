"""What the compiled kernels compute on the GPU, and which of them transformers will use."""

from __future__ import annotations

from envbuilder.doctor.check import Check

CHECKS: tuple[Check, ...] = ()
