"""Starts ranks on this machine that find each other and add up, and says how far each of them came.

A standalone script: standard library and torch alone, run by the environment's own interpreter as
`python ranks.py --backend nccl` (one rank a GPU) or `--backend gloo --world 2`. What hangs is given up after
`--limit` seconds, and named. It prints one line of JSON: `{"world", "ranks": [{"rank", "stage", "error",
"rendezvous_s", "wrong": [dtype, …], "bus_gbs"}]}`, where `stage` is "done" for a rank that came to its end.

The bus bandwidth of an all-reduce among n ranks is 2·(n-1)/n times bytes over time, as nccl-tests has it: it
is what each link carries, whatever n.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

ELEMENTS = 1000
_CALLS = 10


def work(rank: int, options: argparse.Namespace, port: int, told: Connection) -> None:
    """What one rank does; it tells after each stage how far it is."""
    state: dict[str, Any] = {"rank": rank, "stage": "starting", "error": None, "wrong": []}
    if rank == options.absent:
        time.sleep(2 * options.limit)
    try:
        _stages(state, options, port, told)
    except Exception as error:
        state["error"] = f"{type(error).__name__}: {error}"
    told.send(state)
    told.close()
    # Without destroy_process_group, which waits for ranks that may hang.
    os._exit(0)


def _stages(state: dict[str, Any], options: argparse.Namespace, port: int, told: Connection) -> None:
    def enter(stage: str) -> None:
        state["stage"] = stage
        told.send(dict(state))

    rank = state["rank"]
    device = torch.device("cpu") if options.backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    enter("rendezvous")
    started = time.perf_counter()
    dist.init_process_group(
        options.backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=options.world,
        timeout=timedelta(seconds=options.limit),
    )
    dist.barrier(device_ids=[rank] if device.type == "cuda" else None)
    state["rendezvous_s"] = time.perf_counter() - started
    for dtype in (torch.float32, torch.bfloat16):
        enter(f"all-reduce of {str(dtype).removeprefix('torch.')}")
        if not _adds_up(rank, options, device, dtype):
            state["wrong"].append(str(dtype).removeprefix("torch."))
    enter("measuring")
    state["bus_gbs"] = _bus_bandwidth(options, device)
    state["stage"] = "done"


def _adds_up(rank: int, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the sum is right: small whole numbers, exact in any dtype and any order."""
    pattern = torch.arange(ELEMENTS, device=device) % 5
    mine = (pattern + rank + (1 if rank == options.poison else 0)).to(dtype)
    dist.all_reduce(mine)
    expected = pattern * options.world + options.world * (options.world - 1) // 2
    return bool(torch.equal(mine.long(), expected.long()))


def _bus_bandwidth(options: argparse.Namespace, device: torch.device) -> float:
    tensor = torch.zeros(options.bytes // 2, dtype=torch.bfloat16, device=device)
    seconds = 0.0
    for calls in (2, _CALLS):  # the first for warming up
        _wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor)
        _wait(device)
        seconds = (time.perf_counter() - started) / calls
    return float(2 * (options.world - 1) / options.world * options.bytes / seconds / 1e9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def follow(options: argparse.Namespace, port: int) -> list[dict[str, Any]]:
    """Starts the ranks and returns the last that each of them told, within the limit."""
    # Forked: torch is imported once. Nothing here may have touched CUDA before.
    context = multiprocessing.get_context("fork")
    ends, ranks = [], []
    for rank in range(options.world):
        end, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(rank, options, port, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(end)
        ranks.append(process)
    deadline = time.monotonic() + options.limit
    last = [_last_of(rank, end, deadline) for rank, end in enumerate(ends)]
    for process in ranks:
        process.kill()
    return last


def _last_of(rank: int, end: Connection, deadline: float) -> dict[str, Any]:
    state: dict[str, Any] = {"rank": rank, "stage": "starting", "error": None, "wrong": []}
    try:
        while end.poll(max(0.0, deadline - time.monotonic())):
            state = end.recv()
    except EOFError:
        if state["stage"] != "done" and state["error"] is None:
            state["error"] = "the process ended without a word"
        return state
    return {**state, "error": state["error"] or "no answer: it hangs"}


def main() -> None:
    """Reads the arguments, starts the ranks and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("nccl", "gloo"), required=True)
    parser.add_argument("--world", type=int, default=0, help="ranks; 0 for one a GPU")
    parser.add_argument("--bytes", type=int, default=2**28, help="that are added up to measure")
    parser.add_argument("--limit", type=float, default=120, help="seconds")
    parser.add_argument("--poison", type=int, default=-1, help="a rank that adds wrong numbers, for tests")
    parser.add_argument("--absent", type=int, default=-1, help="a rank that never comes, for tests")
    options = parser.parse_args()
    # By NVML: CUDA itself must not be initialised before the fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    options.world = options.world or torch.cuda.device_count()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = follow(options, port) if options.world else []
    sys.stdout.write(json.dumps({"world": options.world, "ranks": ranks}) + "\n")


if __name__ == "__main__":
    main()
