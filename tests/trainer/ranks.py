"""Real ranks of the trainer that a test can stop and kill, without the seconds that importing torch takes.

A fork server has imported everything; torchrun's part, the store that the ranks meet at, is this process's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trainer.__main__", "trainer.loop", "transformers.models.nemotron_h"])


@dataclass
class Ranks:
    """The processes of one part of a run."""

    run: Path
    processes: list[BaseProcess]

    def wait(self, seconds: float = 600) -> list[int | None]:
        """Their exit codes; None for one that still runs after so long."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for(self, step: int, seconds: float = 600) -> None:
        """Until a record of `step` is in metrics.jsonl."""
        deadline = time.monotonic() + seconds
        while not any(r["kind"] == "step" and r["step"] >= step for r in records(self.run)):
            assert time.monotonic() < deadline, "no such step"
            assert any(process.is_alive() for process in self.processes), "all ended"
            time.sleep(0.01)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def outcome(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.run / "outcome.json").read_text())
        return told


@contextmanager
def ranks(
    config: Path,
    run: Path,
    overrides: Sequence[str],
    *,
    size: int = 2,
    largest_file: int | None = None,
    hangs_at: int | None = None,
) -> Iterator[Ranks]:
    """`size` ranks of the run, killed at the end if they still live.

    Rank 0 can't write files of more than `largest_file` bytes; rank 1 never begins the step `hangs_at`.
    """
    run.mkdir(exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    started = Ranks(run, [])
    try:
        for rank in range(size):
            process = SERVER.Process(
                target=_rank,
                args=(config, run, list(overrides), rank, size, store.port, largest_file, hangs_at),
            )
            process.start()
            started.processes.append(process)
        yield started
    finally:
        started.kill()


def _rank(
    config: Path,
    run: Path,
    overrides: list[str],
    rank: int,
    size: int,
    port: int,
    largest_file: int | None,
    hangs_at: int | None,
) -> None:
    import torch

    from trainer import loop
    from trainer.__main__ import main

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if largest_file is not None and rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if hangs_at is not None and rank == 1:
        step = loop.train_step

        def hanging(run: Any, number: int) -> Any:
            if number == hangs_at:
                time.sleep(1000)
            return step(run, number)

        loop.train_step = hanging
    log = (run / f"rank-{rank}.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.argv = ["trainer", str(config), "--run-dir", str(run)]
    sys.argv += [word for override in overrides for word in ("--set", override)]
    sys.exit(main())


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the line that a kill cut off, or one that is being written
            continue
    return found
