"""How fast each GPU multiplies and copies, and whether GPUs copy rightly between each other.

A standalone script: standard library and torch alone, run by the environment's own interpreter as
`python rates.py`. It prints one line of JSON:
`{"gpus": [{"index", "name", "dtype", "tflops", "copy_gbs", "host_gbs", "wrong"}], "peers": [{"source",
"target", "access", "gbs", "wrong"}], "problem"}`, with the problem null, or why CUDA has no GPU to measure.
TFLOP/s count 2·n³ for a product of two n·n matrices; copies in GB/s, those within a GPU counted twice, for it
reads and writes. `--device cpu` with small sizes is for tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3
_BATCH = 5
"""Calls between two looks at the clock."""
_PARTIAL_SUMS = 8.0
"""What rounded partial sums may add to a row's sum; a block that is left out changes it by hundreds."""


def seconds_each(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Time of one `call`, of as many as fit into `seconds`."""
    for _ in range(_WARM_UP):
        call()
    calls, spent = 0, 0.0
    while spent < seconds:
        spent += _timed(call, device)
        calls += _BATCH
    return spent / calls


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(_BATCH):
            call()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_BATCH):
            call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(device: torch.device, size: int, copy_bytes: int, seconds: float) -> dict[str, Any]:
    """The rates of one GPU; `wrong` where its product is not what it must be."""
    # bfloat16 needs compute capability 8.0: before it, it is done in software.
    dtype = torch.bfloat16 if _has_bfloat16(device) else torch.float16
    left = torch.randint(-1, 2, (size, size), device=device).to(dtype)
    right = torch.randint(-1, 2, (size, size), device=device).to(dtype)
    product = left @ right
    wrong = _is_wrong(product, left, right)
    each = seconds_each(lambda: torch.matmul(left, right, out=product), device, seconds)
    source, target = (torch.zeros(copy_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.zeros(copy_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copied = seconds_each(lambda: target.copy_(source), device, seconds)
    carried = seconds_each(lambda: target.copy_(host, non_blocking=True), device, seconds)
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "tflops": 2 * size**3 / each / 1e12,
        "copy_gbs": 2 * copy_bytes / copied / 1e9,
        "host_gbs": copy_bytes / carried / 1e9,
        "wrong": wrong,
    }


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" or bool(torch.cuda.get_device_capability(device) >= (8, 0))


def _is_wrong(product: Tensor, left: Tensor, right: Tensor) -> bool:
    """Holds the product of whole numbers against its exact row sums (Freivalds 1977).

    Whole numbers up to 256 are exact in bfloat16 too; what is larger may be rounded.
    """
    exact = left.double() @ right.double().sum(dim=1)
    got = product.double()
    rounding = torch.where(got.abs() > 256, got.abs() * 2.0**-8, 0.0).sum(dim=1) + _PARTIAL_SUMS
    return bool(((got.sum(dim=1) - exact).abs() > rounding).any())


def measure_peers(devices: list[torch.device], copy_bytes: int) -> list[dict[str, Any]]:
    """A copy from every GPU to every other: some machines deliver other bytes than were sent."""
    return [_measure_pair(source, target, copy_bytes) for source, target in permutations(devices, 2)]


def _measure_pair(source: torch.device, target: torch.device, copy_bytes: int) -> dict[str, Any]:
    sent = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=source)
    got = torch.zeros(copy_bytes, dtype=torch.uint8, device=target)
    each = seconds_each(lambda: got.copy_(sent), source, 0.05)
    access = source.type == "cuda" and torch.cuda.can_device_access_peer(source, target)
    return {
        "source": source.index,
        "target": target.index,
        "access": access,
        "gbs": copy_bytes / each / 1e9,
        "wrong": not torch.equal(got.cpu(), sent.cpu()),
    }


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices")
    parser.add_argument("--copy-bytes", type=int, default=2**30)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    options = parser.parse_args()
    if options.device == "cuda":
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the latter of a torch that is built without CUDA
            sys.stdout.write(json.dumps({"gpus": [], "peers": [], "problem": str(error)}) + "\n")
            return
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [torch.device("cpu", 0)]
    gpus = []
    for device in devices:
        rates = measure(device, options.size, options.copy_bytes, options.seconds)
        gpus.append({"index": device.index, **rates})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    peers = measure_peers(devices, options.copy_bytes // 4)
    sys.stdout.write(json.dumps({"gpus": gpus, "peers": peers, "problem": None}) + "\n")


if __name__ == "__main__":
    main()
