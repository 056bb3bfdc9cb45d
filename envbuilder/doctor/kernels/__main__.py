"""Compiled kernels against a float64 reference, forward and backward, on the GPU.

A standalone folder: standard library and torch alone, run by the environment's own interpreter as
`python kernels causal-conv1d mamba-ssm`, so that it meets exactly what training will meet. It prints one line
of JSON, with one result for each case, of the output or gradient that is worst:
`{"device": …, "results": [{"kernel", "case", "quantity", "error", "tolerance", "problem"}]}`.

Every suite runs in a process of its own for each dtype, some of them at once: Triton compiles and tunes for
minutes, on one core each; and a kernel that breaks its process off leaves the other suites' results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

SUITES = {
    # The slowest first.
    "mamba-ssm": (
        "chunked_cases.fused",
        "chunked_cases.fused_packed",
        "chunked_cases.with_states",
        "chunked_cases.packed",
        "chunked_cases.alone",
        "scan_cases.real",
        "scan_cases.imaginary",
        "scan_cases.mixer",
        "scan_cases.step",
        "scan_cases.norms",
    ),
    "causal-conv1d": ("convolution_cases.training", "convolution_cases.continued"),
}
"""Package → its suites, as MODULE.FUNCTION of this folder."""
DTYPES = ("bfloat16", "float32", "float16")
MOST_AT_ONCE = 8


def run_suite(suite: str, dtype: str) -> dict[str, Any]:
    """One suite in this process."""
    import importlib

    import torch
    from kernel_harness import run_cases

    module, function = suite.split(".")
    cases = partial(getattr(importlib.import_module(module), function), getattr(torch, dtype))
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "results": list(run_cases(suite, cases, device)),
    }


def run_apart(suite: str, dtype: str) -> dict[str, Any]:
    """One suite in a process of its own."""
    words = [sys.executable, str(Path(__file__).parent), "--suite", suite, "--dtype", dtype]
    ended = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = ended.stdout.strip().splitlines()
    answer = next((line for line in reversed(lines) if line.startswith('{"device"')), None)
    if ended.returncode == 0 and answer is not None:
        return dict(json.loads(answer))
    last = lines[-1] if lines else "no last words"
    result = {"kernel": suite, "case": dtype, "quantity": None, "error": None, "tolerance": None}
    return {"device": None, "results": [{**result, "problem": f"ended with {ended.returncode}: {last}"}]}


def main() -> None:
    """Runs the suites of the packages that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("packages", nargs="*", choices=[*SUITES, []])
    parser.add_argument("--one-at-a-time", action="store_true", help="for GPUs that take one process")
    parser.add_argument("--suite")
    parser.add_argument("--dtype", choices=DTYPES, help="this one alone")
    options = parser.parse_args()
    if options.suite:
        print(json.dumps(run_suite(options.suite, options.dtype)))
        return
    dtypes = (options.dtype,) if options.dtype else DTYPES
    chosen = [(suite, dtype) for name in options.packages for suite in SUITES[name] for dtype in dtypes]
    cores = len(os.sched_getaffinity(0))
    at_once = 1 if options.one_at_a_time else max(1, min(MOST_AT_ONCE, cores // 2))
    with ThreadPoolExecutor(at_once) as pool:
        reports = list(pool.map(lambda pair: run_apart(*pair), chosen))
    device = next((report["device"] for report in reports if report["device"]), None)
    print(json.dumps({"device": device, "results": [r for report in reports for r in report["results"]]}))


if __name__ == "__main__":
    main()
