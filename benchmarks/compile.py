"""CPU seconds of causal-conv1d's build, ours and stock, on one machine.

    python -m benchmarks.compile SOURCE RECEIPT... [--jobs N]

SOURCE is the unpacked sdist of causal-conv1d 1.7.0; RECEIPT is the receipt.json of our build of it, whose
units' CPU seconds are summed. Stock is what its setup.py asks of nvcc, measured now: each CUDA unit whole,
for each of its nine architectures at a time, N at once, and summed; and the host unit, from our receipt.
(One call for nine architectures would parse the host side once and not nine times: 5 to 10 s of each unit.)
Run by an interpreter that has torch, with nvcc on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = ("75", "80", "87", "90", "100", "103", "110", "120", "121")
UNITS = ("causal_conv1d_bwd.cu", "causal_conv1d_fwd.cu", "causal_conv1d_update.cu")
# setup.py's own, and those that torch adds.
FLAGS = (
    "-c -O3 -std=c++17 -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ "
    "-U__CUDA_NO_BFLOAT16_OPERATORS__ -U__CUDA_NO_BFLOAT16_CONVERSIONS__ -U__CUDA_NO_BFLOAT162_OPERATORS__ "
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__ --expt-relaxed-constexpr --expt-extended-lambda --use_fast_math "
    "--ptxas-options=-v -lineinfo -Xcompiler -fPIC"
)


def cpu_seconds(source: Path, unit: str, architecture: str, folder: str) -> float:
    """User and system time of nvcc and all that it runs."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent / "include"
    includes = [source / "csrc", torch, torch / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    command: Sequence[str] = [
        "nvcc",
        *FLAGS.split(),
        *(f"-I{path}" for path in includes),
        *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
        str(source / "csrc" / unit),
        *("-o", f"{folder}/{unit}.{architecture}.o"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"nvcc failed for {unit}, {architecture}"
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("receipts", type=Path, nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    receipts = [json.loads(path.read_text()) for path in given.receipts]
    receipt = next(receipt for receipt in receipts if receipt["package"] == "causal-conv1d")
    assert not any(unit["cached"] for unit in receipt["units"]), "the receipt is of a build from the cache"
    ours = sum(unit["cpu_seconds"] for unit in receipt["units"])
    host = sum(unit["cpu_seconds"] for unit in receipt["units"] if not unit["architectures_kept"])
    stock = host
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        # The longest first.
        todo = [(unit, architecture) for unit in UNITS for architecture in ARCHITECTURES]
        for (unit, architecture), seconds in zip(
            todo, pool.map(lambda one: cpu_seconds(given.source, *one, folder), todo), strict=True
        ):
            print(f"stock {unit} sm_{architecture}: {seconds:.1f} CPU s", flush=True)
            stock += seconds
    print(f"{os.cpu_count()} cores, {platform.release()}, {given.jobs} at once")
    print(f"ours {ours:.0f} CPU s, stock {stock:.0f}: stock / ours = {stock / ours:.1f}")


if __name__ == "__main__":
    main()
