"""Our trainer beside transformers with PEFT and NeMo Automodel: same model, data and adapters, turn by turn.

    python -m benchmarks.train                                   ours and PEFT, batch 1, LoRA on dense layers
    python -m benchmarks.train --adapters experts --batch 4 --contestants ours,peft,nemo
    python -m benchmarks.train --profile --batch 4 --out profile.json       where our step's time goes
    python -m benchmarks.train --gpus 2 --placements replicate,shard        ours on one GPU and on two
    python -m benchmarks.train --tiny                            a tiny model on the CPU: tries the script

Run by the Python of an env with torch, transformers, peft and the compiled mamba kernels, on a GPU node; no
network is needed. The model has its true size and random weights, made on the GPU by the same rules from the
same seed; the data are the same random tokens. Each contestant's turn is a process of its own: it prepares
the model, takes its warm-up steps and then the timed ones. Turns alternate for --rounds. Given are the median
of all timed steps of all rounds, the peak of allocated GPU memory, and the first losses, which show that the
same thing is computed.

ours           this project's trainer: its own preparation and its own step, base in bf16, adapters in fp32
peft           transformers and PEFT as they come, in a plain loop: base in bf16, adapters in fp32
peft-autocast  the same under torch.autocast(bf16), as transformers' Trainer runs it with bf16=True
nemo           NeMo Automodel's own model, LoRA, loss and backend settings; adapters in bf16, its default.
               On a GPU only. What it needs beside the env, such as another transformers, may lie in a folder
               of its own (--nemo-site)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.training.work import Measured, Work

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "recipes/train"
GIB = 2**30
GRACE_SECONDS = 20
"""For a step that was begun before the deadline, and for reading the result."""


class Failed(Exception):
    """A contestant ended without a result; the text is the end of what it said."""


def turn(work: Work, gpus: int = 1, site: Path | None = None) -> Measured:
    """One contestant's turn in processes of its own, with the packages of `site` before the env's.

    Raises Failed.
    """
    before = [str(site.resolve())] if site else []
    path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work.write(folder / "work.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command = [
            sys.executable,
            *(launcher if gpus > 1 else []),
            *("-m", "benchmarks.training", str(folder / "work.json"), str(folder / "result.json")),
        ]
        with (folder / "log").open("w+b") as log:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(work.deadline + GRACE_SECONDS - time.time())
            except BaseException as problem:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(problem, subprocess.TimeoutExpired):
                    raise
            said = (folder / "log").read_text(errors="replace")
        if work.profile and process.returncode == 0:
            print(said, flush=True)
        if not (folder / "result.json").exists():
            raise Failed(said[-3000:] or f"exit code {process.returncode}")
        return Measured.read(folder / "result.json")


def line(name: str, measured: Measured) -> str:
    """One turn's, as soon as it is over."""
    return (
        f"{name:<28}{1e3 * measured.median_seconds:>10.1f} ms {measured.tokens_per_second:>9,.0f} tokens/s "
        f"{measured.peak_bytes / GIB:>7.1f} GiB, first step {measured.first_step_seconds:.1f} s, prepared in "
        f"{measured.prepare_seconds:.1f} s; loss {' '.join(f'{loss:.4f}' for loss in measured.losses[:3])}"
    )


class Table:
    """All turns by name, and what is printed of them at the end."""

    def __init__(self) -> None:
        self.turns: dict[str, list[Measured]] = {}

    def add(self, name: str, measured: Measured) -> None:
        self.turns.setdefault(name, []).append(measured)
        print(line(name, measured), flush=True)

    def rate(self, name: str) -> float:
        """Tokens per second by the median of all timed steps."""
        turns = self.turns[name]
        return turns[0].tokens_per_step / statistics.median([s for t in turns for s in t.step_seconds])

    def __str__(self) -> str:
        first = next(iter(self.turns))
        rows = [
            f"\n{'':<28}{'tokens/s':>10}{'min':>9}{'max':>9}{'peak GiB':>10}{'reserved':>10}{'first s':>9}"
            f"{'trained':>13}  {first} / it"
        ]
        for name, turns in self.turns.items():
            rates = [t.tokens_per_step / s for t in turns for s in t.step_seconds]
            rows.append(
                f"{name:<28}{self.rate(name):>10,.0f}{min(rates):>9,.0f}{max(rates):>9,.0f}"
                f"{max(t.peak_bytes for t in turns) / GIB:>10.1f}"
                f"{max(t.reserved_bytes for t in turns) / GIB:>10.1f}{turns[0].first_step_seconds:>9.1f}"
                f"{turns[0].trainable:>13,}  {self.rate(first) / self.rate(name):.2f}"
            )
        rows.append("")
        for name, turns in self.turns.items():
            rows.append(f"{name}: {turns[0].precision}; {'; '.join(turns[0].notes)}")
            rows.append(
                f"  losses {' '.join(f'{loss:.4f}' for loss in turns[0].losses[:6])}; {turns[0].versions}"
            )
        rows.append(f"machine: {list(self.turns.values())[-1][0].machine}")
        return "\n".join(rows)

    def write(self, file: Path) -> None:
        """Every turn as JSON."""
        turns = {name: [asdict(turn) for turn in turns] for name, turns in self.turns.items()}
        file.write_text(json.dumps(turns, indent=1) + "\n")


def compare(
    work: Work, contestants: list[str], rounds: int, table: Table, nemo_site: Path | None = None
) -> None:
    """Turn by turn until the rounds are over or the deadline is too near for another turn."""
    took: dict[str, float] = {}
    failed: set[str] = set()
    for _ in range(rounds):
        for name in contestants:
            if name in failed:
                continue
            if time.time() + took.get(name, 0) > work.deadline:
                print(f"{name}: left out, the budget is used up", flush=True)
                continue
            begin = time.time()
            try:
                site = nemo_site if name == "nemo" else None
                table.add(name, turn(replace(work, contestant=name), site=site))
            except Failed as problem:
                failed.add(name)
                print(f"{name} failed:\n{problem}", flush=True)
            took[name] = time.time() - begin


def scale(work: Work, gpus: int, placements: list[str], memory: float | None, table: Table) -> None:
    """Ours on one GPU and on so many, and how much of the speed is kept."""
    limit = () if memory is None else (f"distributed.gpu_memory_gib={memory}",)
    alone = "1 GPU"
    try:
        table.add(alone, turn(work))
    except Failed as problem:
        print(f"{alone} failed:\n{problem}", flush=True)
    for placement in placements:
        name = f"{gpus} GPUs, {placement}"
        overrides = (*work.overrides, f"distributed.placement={placement}", *limit)
        try:
            table.add(name, turn(replace(work, overrides=overrides), gpus))
        except Failed as problem:
            print(f"{name} failed:\n{problem}", flush=True)
            continue
        if alone in table.turns:
            kept = table.rate(name) / (gpus * table.rate(alone))
            print(f"  {name}: {kept:.1%} of {gpus} times one GPU's rate", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contestants", default="ours,peft")
    parser.add_argument("--config", type=Path, default=CONFIGS / "nemotron3-nano-true-size.yaml")
    parser.add_argument("--adapters", choices=["dense", "experts"], default="dense")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="sequences of one process in a step")
    parser.add_argument("--checkpointing", choices=["on", "off"], default="on")
    parser.add_argument("--warmup", type=int, default=2, help="steps, the first one included")
    parser.add_argument("--steps", type=int, default=8, help="timed, in each round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--option", dest="options", action="append", default=[], help="for nemo, see its module"
    )
    parser.add_argument("--nemo-site", type=Path, metavar="FOLDER", help="packages for nemo alone")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--profile", action="store_true", help="of two steps of ours, or of the one contestant"
    )
    parser.add_argument("--gpus", type=int, default=1, help="ours alone, on one GPU and on so many")
    parser.add_argument("--placements", default="replicate,shard", help="with --gpus")
    parser.add_argument("--gpu-memory-gib", type=float, help="with --gpus: no more of each GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    given = parser.parse_args()
    if given.tiny:
        given.config, given.seq_length = CONFIGS / "quickstart.yaml", min(given.seq_length, 64)
    if given.profile and given.out is None:
        parser.error("--profile needs --out")
    return given


def main() -> int:
    given = arguments()
    contestants = given.contestants.split(",")
    work = Work(
        config=given.config.resolve(),
        contestant="ours",
        adapters=given.adapters,
        seq_length=given.seq_length,
        batch=given.batch,
        checkpointing=given.checkpointing == "on",
        warmup=given.warmup,
        steps=given.steps,
        deadline=min(time.time() + given.budget_seconds, 2**33),
        overrides=tuple(given.overrides),
        options=tuple(given.options),
    )
    print(
        f"{given.config.stem}: LoRA on {given.adapters}, {given.batch} x {given.seq_length} tokens, "
        f"activation checkpointing {given.checkpointing}; {given.warmup} + {given.steps} steps",
        flush=True,
    )
    table = Table()
    if given.profile:
        only = contestants[0]
        compare(replace(work, profile=given.out.resolve()), [only], 1, table, given.nemo_site)
    elif given.gpus > 1:
        scale(work, given.gpus, given.placements.split(","), given.gpu_memory_gib, table)
    else:
        compare(work, contestants, given.rounds, table, given.nemo_site)
    if not table.turns:
        return 1
    print(table)
    if given.out and not given.profile:
        table.write(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
