"""What sharding the base costs, seen from one of several processes, on a single GPU: the others are played.

    python -m benchmarks.sharded --processes 2 --batch 4 --link 370
    python -m benchmarks.sharded --processes 4 --gpu-memory-gib 61 --link 230 --lanes alone,in-place,auto
    python -m benchmarks.sharded --tiny                          a tiny model on the CPU: tries the script

See `benchmarks/training/played.py` for how, and what it leaves out: so this says where the time goes and what
a change is worth, and `benchmarks/train.py --gpus` what several GPUs really do. Each lane is a process of its
own, turn by turn; shown is which part of a single process's rate is kept.

alone       the whole base, nothing shared
fsdp2       every block shared, gathered by FSDP2, each asked for one block ahead
in-place    every block shared, gathered where it is computed with
auto        the same, as the trainer plans it in the memory there is: blocks that fit are kept whole
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.train import CONFIGS, Failed, Table, turn
from benchmarks.training.work import Work

LANES = {
    "alone": (),
    "fsdp2": ("distributed.whole_blocks=0", "distributed.gathering=fsdp2"),
    "in-place": ("distributed.whole_blocks=0",),
    "auto": (),
}


def lane(work: Work, name: str, given: argparse.Namespace) -> Work:
    """The work of one lane."""
    if name == "alone":
        return work
    limit = (f"distributed.gpu_memory_gib={given.gpu_memory_gib}",) if given.gpu_memory_gib else ()
    played = (f"processes={given.processes}", f"link={given.link}", f"held={given.held}")
    return replace(
        work,
        contestant="played",
        overrides=(*work.overrides, "distributed.placement=shard", *LANES[name], *limit),
        options=played,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--link", type=float, default=370, help="GB/s that each process receives")
    parser.add_argument("--held", type=int, default=24, help="multiprocessors that gathering holds")
    parser.add_argument("--gpu-memory-gib", type=float)
    parser.add_argument("--adapters", choices=["dense", "experts"], default="dense")
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="sequences of one process in a step")
    parser.add_argument("--warmup", type=int, default=4, help="steps, the first one included")
    parser.add_argument("--steps", type=int, default=6, help="timed, in each turn")
    parser.add_argument("--lanes", default=",".join(LANES))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = CONFIGS / ("quickstart.yaml" if given.tiny else "nemotron3-nano-true-size.yaml")
    work = Work(
        config=config.resolve(),
        contestant="ours",
        adapters=given.adapters,
        seq_length=64 if given.tiny else given.seq_length,
        batch=given.batch,
        checkpointing=given.checkpointing == "on",
        warmup=given.warmup,
        steps=given.steps,
        deadline=2**33,
        overrides=tuple(given.overrides),
    )
    print(f"{given}; {time.strftime('%F')}", flush=True)
    table = Table()
    for name in given.lanes.split(","):
        try:
            table.add(name, turn(lane(work, name, given)))
        except Failed as problem:
            print(f"{name} failed:\n{problem}", flush=True)
            continue
        if name != "alone" and "alone" in table.turns:
            kept = table.rate(name) / given.processes / table.rate("alone")
            print(f"  {name}: {kept:.1%} of {given.processes} times one process's rate", flush=True)
    if not table.turns:
        return 1
    print(table)
    if given.out:
        table.write(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
