"""Compiled kernels against a float64 reference, forward and backward, on the GPU.

A standalone folder: standard library and torch alone, run by the environment's own interpreter as
`python kernels causal-conv1d mamba-ssm`, so that it meets exactly what training will meet. It prints one line
of JSON, with one result for each case, of the output or gradient that is worst:
`{"device": …, "results": [{"kernel", "case", "quantity", "error", "tolerance", "problem"}]}`; or, where the
driver shows no GPU to run them on, why: `{"absence": …}`.

Triton's kernels run in the smallest of their configurations, which fits any GPU. `--tuned` lets Triton try
all and take the fastest, as training does: ten times as much to compile.

Suites run in processes of their own, some at once: Triton compiles on one core, and a kernel that breaks its
process off leaves the other suites' results.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
        "scan_cases.norms",
        "scan_cases.step",
        "scan_cases.real",
        "scan_cases.imaginary",
        "scan_cases.mixer",
    ),
    "causal-conv1d": ("convolution_cases.training", "convolution_cases.continued"),
}
"""Package → its suites, as MODULE.FUNCTION of this folder."""
COMPILING = {suite for suite in SUITES["mamba-ssm"] if suite.startswith("chunked_cases.")} | {
    "scan_cases.step",
    "scan_cases.norms",
}
"""Suites of kernels in Triton, which compiles them at their first use."""
DTYPES = ("bfloat16", "float32", "float16")
MOST_AT_ONCE = 8
"""Each process takes about 2 GB of the GPU's memory, most of it for poison."""

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE of the driver's interface."""


def absence() -> str | None:
    """Why the driver has no GPU for this process; None where it has, or torch must say what is wrong."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0) != NO_DEVICE:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "the driver has none" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}"


def run_suite(suite: str, dtypes: Sequence[str], *, tuned: bool) -> dict[str, Any]:
    """One suite in this process."""
    import importlib

    import torch
    from kernel_harness import run_cases, without_tuning

    module, function = suite.split(".")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    if not tuned:
        without_tuning()
    results = []
    for dtype in dtypes:
        cases = partial(getattr(importlib.import_module(module), function), getattr(torch, dtype))
        results += run_cases(suite, cases, device)
    return {"device": torch.cuda.get_device_name(device), "results": results}


def run_apart(suite: str, dtypes: Sequence[str], *, tuned: bool) -> dict[str, Any]:
    """One suite in a process of its own."""
    words = [sys.executable, "-P", str(Path(__file__).parent), "--suite", suite, "--dtypes", *dtypes]
    words += ["--tuned"] if tuned else []
    ended = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = ended.stdout.strip().splitlines()
    answer = next((line for line in reversed(lines) if line.startswith('{"device"')), None)
    if ended.returncode == 0 and answer is not None:
        return dict(json.loads(answer))
    last = lines[-1] if lines else "no last words"
    result = {"kernel": suite, "case": ", ".join(dtypes), "quantity": None, "error": None, "tolerance": None}
    return {"device": None, "results": [{**result, "problem": f"ended with {ended.returncode}: {last}"}]}


def shared_out(suites: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """What one process runs each: a suite that compiles, in one dtype; another, in all of them."""
    for suite in suites:
        yield from ((suite, [dtype]) for dtype in dtypes) if suite in COMPILING else [(suite, dtypes)]


def main() -> None:
    """Runs the suites of the packages that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("packages", nargs="*", choices=[*SUITES, []])
    parser.add_argument("--one-at-a-time", action="store_true", help="for GPUs that take one process")
    parser.add_argument("--tuned", action="store_true", help="let Triton tune its kernels, as training does")
    parser.add_argument("--suite", help="this one alone, in this process")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options = parser.parse_args()
    if options.suite:
        print(json.dumps(run_suite(options.suite, options.dtypes, tuned=options.tuned)))
        return
    if why := absence():
        print(json.dumps({"absence": why}))
        return
    chosen = [pair for name in options.packages for pair in shared_out(SUITES[name], options.dtypes)]
    at_once = 1 if options.one_at_a_time else min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(at_once) as pool:
        reports = list(pool.map(lambda pair: run_apart(*pair, tuned=options.tuned), chosen))
    device = next((report["device"] for report in reports if report["device"]), None)
    print(json.dumps({"device": device, "results": [r for report in reports for r in report["results"]]}))


if __name__ == "__main__":
    main()
