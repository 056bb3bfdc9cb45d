"""One training in several jobs beside the same training in one: are the losses equal, what did stopping cost?

    python -m benchmarks.stitched --jobs 3 --steps 45                 the true-size model on one GPU
    python -m benchmarks.stitched --gpus 4 --gpu-memory-gib 61        sharded, each process held to 61 GiB
    python -m benchmarks.stitched --processes 4 --gpu-memory-gib 61   the same on fewer GPUs, very slowly
    python -m benchmarks.stitched --tiny                              a tiny model on the CPU

Run by the Python of an env, on a GPU node; no network is needed. Each job is the trainer as the tool starts
it, alone or under torchrun, and is told to stop by RUN/stop when it has taken its share of the steps. Given
are the steps whose losses differ and by how much, and of each job the seconds from its start to its first
step and from the request to stop to its end. Exits with 1 if a loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "recipes/train"
STOPPED = 75
GIB = 2**30


class Failed(Exception):
    """A job ended in another way than it was to; the text is the end of what it said."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and by how many processes."""

    config: Path
    overrides: tuple[str, ...]
    processes: int
    share_gpus: bool
    """More processes than GPUs: see `benchmarks.training.shared_gpus`."""

    def command(self, run: Path) -> list[str]:
        """One job of the run in the folder `run`."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        program = ["benchmarks.training.shared_gpus", "trainer"] if self.share_gpus else ["trainer"]
        sets = [word for override in self.overrides for word in ("--set", override)]
        alone = self.processes == 1
        start = [] if alone else launcher
        return [sys.executable, *start, "-m", *program, str(self.config), "--run-dir", str(run), *sets]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The whole lines of that kind in the run's metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@contextmanager
def job(plan: Plan, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A job that has been started; killed at the end if it still runs."""
    run.mkdir(exist_ok=True)
    with (run / "log").open("ab") as log:
        process = subprocess.Popen(
            plan.command(run), cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(plan: Plan, run: Path, until: int | None = None) -> str:
    """One job of the run, to the end or told to stop after the step `until`; how long its parts took.

    Raises Failed.
    """
    began, asked, before = time.time(), None, len(records(run, "step"))
    with job(plan, run) as process:
        while process.poll() is None:
            if until is not None and asked is None and len(records(run, "step")) >= until:
                asked = time.time()
                (run / "stop").touch()
            time.sleep(0.05)
    outcome = run / "outcome.json"
    told = json.loads(outcome.read_text()) if outcome.exists() else {"exit_code": None}
    if told["exit_code"] != (0 if until is None else STOPPED):
        raise Failed((run / "log").read_text(errors="replace")[-3000:])
    steps = records(run, "step")
    first = steps[before]["time"] - began
    ended = "" if asked is None else f", ended {time.time() - asked:.1f} s after it was told to stop"
    return f"steps {steps[before]['step']} to {steps[-1]['step']}: first after {first:.1f} s{ended}"


def figures(run: Path) -> str:
    """Rate, memory and checkpoints of a run."""
    steps, saved = records(run, "step"), records(run, "checkpoint")
    rates = sorted(step["tokens_per_second"] for step in steps[2:] or steps)
    said = f"{rates[len(rates) // 2]:,.0f} tokens/s, {max(s['memory_bytes'] for s in steps) / GIB:.1f} GiB"
    if saved:
        longest = max(one["held_up_seconds"] for one in saved)
        said += f"; {len(saved)} checkpoints of {saved[-1]['bytes'] / 1e6:.0f} MB"
        said += f", which held training up for {longest:.3f} s at most"
    return said


def compare(whole: Sequence[float], stitched: Sequence[float]) -> str | None:
    """None where all losses are the same numbers, else where and how far they differ."""
    if len(whole) != len(stitched):
        return f"{len(whole)} steps in one job, {len(stitched)} in several"
    apart = [(step, abs(a - b)) for step, (a, b) in enumerate(zip(whole, stitched, strict=True), 1) if a != b]
    if not apart:
        return None
    step, most = max(apart, key=lambda pair: pair[1])
    first = apart[0][0]
    return (
        f"{len(apart)} of {len(whole)} losses differ, first in step {first}, most in step {step}: {most:.2g}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIGS / "nemotron3-nano-true-size.yaml")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=45, help="of the whole training")
    parser.add_argument("--gpus", type=int, default=1, help="with a process on each")
    parser.add_argument("--processes", type=int, help="more than there are GPUs")
    parser.add_argument("--gpu-memory-gib", type=float, help="no more of a GPU for each process")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--any-order", action="store_true", help="without `deterministic: true`")
    parser.add_argument("--alone", action="store_true", help="no job beside them that trains all at once")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args()


def plan_of(given: argparse.Namespace) -> Plan:
    limit = [] if given.gpu_memory_gib is None else [f"distributed.gpu_memory_gib={given.gpu_memory_gib}"]
    processes = given.processes or given.gpus
    overrides = (
        f"step_scheduler.max_steps={given.steps}",
        f"step_scheduler.global_batch_size={processes}",
        "step_scheduler.local_batch_size=1",
        "checkpoint.enabled=true",
        f"deterministic={str(not given.any_order).lower()}",
        *limit,
        *given.overrides,
    )
    config = CONFIGS / "quickstart.yaml" if given.tiny else given.config
    return Plan(config.resolve(), overrides, processes, share_gpus=given.processes is not None)


def main() -> int:
    given = arguments()
    plan = plan_of(given)
    with tempfile.TemporaryDirectory() as name:
        whole, stitched = Path(name, "whole"), Path(name, "stitched")
        try:
            for number in range(1, given.jobs + 1):
                until = None if number == given.jobs else given.steps * number // given.jobs
                print(f"job {number} of {given.jobs}, {train(plan, stitched, until)}", flush=True)
            print(f"  {figures(stitched)}", flush=True)
            if given.alone:
                return 0
            print(f"all in one job, {train(plan, whole)}\n  {figures(whole)}", flush=True)
        except Failed as problem:
            print(problem)
            return 1
        losses = [[step["loss"] for step in records(run, "step")] for run in (whole, stitched)]
        print(f"losses of the one job: {' '.join(f'{loss:.6f}' for loss in losses[0])}")
        problem = compare(*losses)
        print(problem or f"all {given.steps} losses are the same numbers")
        return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
