"""Which kernels the mamba layers run on, and the import errors of those that are missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PACKAGES = ("causal_conv1d", "mamba_ssm")
FUSED_SCAN = ("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined")


@dataclass(frozen=True)
class MambaKernels:
    """The fused training kernel, or why there is none."""

    fused_scan: Callable[..., Any] | None
    missing: dict[str, str]
    """Package → the import error."""


def find_mamba_kernels(device: str) -> MambaKernels:
    """Imports the kernels for `device`. Call it before transformers' model code is imported.

    On a CPU the packages are hidden from transformers: their kernels are for GPUs, and transformers calls
    them wherever they can be imported.
    """
    if device == "cpu":
        for package in PACKAGES:
            sys.modules[package] = None  # type: ignore[assignment]  # the documented way to forbid an import
        return MambaKernels(None, {})
    missing = {}
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except Exception as problem:  # a broken extension module raises more than ImportError
            missing[package] = f"{type(problem).__name__}: {problem}"
    if missing:
        return MambaKernels(None, missing)
    module, function = FUSED_SCAN
    try:
        return MambaKernels(getattr(importlib.import_module(module), function), {})
    except Exception as problem:
        return MambaKernels(None, {"mamba_ssm": f"{type(problem).__name__}: {problem}"})
