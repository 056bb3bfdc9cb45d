"""Our trainer on rows of many lengths, as conversations have: recorded as CUDA graphs or not, packed or not.

    python -m benchmarks.lengths                        the true-size model on one GPU, batch 1
    python -m benchmarks.lengths --tiny                 a tiny model on the CPU: tries the script

Run by the Python of an env, on a GPU node. The conversations are random bytes, their lengths log-normal
around --median tokens. Each lane is the trainer as the tool starts it; given is how many real tokens a second
it trains in the last --timed steps, when the shapes that come often have been seen.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.stitched import CONFIGS, GIB, REPOSITORY, Plan, records

LANES = {
    "rows": ("dataset.packing=false", "distributed.cuda_graphs=false"),
    "rows-recorded": ("dataset.packing=false", "distributed.cuda_graphs=true"),
    "packed": ("dataset.packing=true", "distributed.cuda_graphs=false"),
    "packed-recorded": ("dataset.packing=true", "distributed.cuda_graphs=true"),
}


def write_conversations(file: Path, count: int, median: int, longest: int) -> None:
    """One a line; a byte is a token, and an answer is two thirds of its conversation."""
    drawn = random.Random(1)
    with file.open("w") as lines:
        for _ in range(count):
            length = min(longest, max(16, int(drawn.lognormvariate(0, 0.8) * median))) - 8
            text = "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz ", k=length))
            question, answer = text[: length // 3], text[length // 3 :]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--median", type=int, default=900)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--timed", type=int, default=60)
    parser.add_argument("--lanes", default=",".join(LANES))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    config = CONFIGS / ("quickstart.yaml" if given.tiny else "nemotron3-nano-true-size.yaml")
    if given.tiny:
        given.median, given.seq_length, given.steps, given.timed = 60, 256, 6, 3
    failed = 0
    for name in given.lanes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            data, run = Path(folder, "conversations.jsonl"), Path(folder, "run")
            write_conversations(data, 4 * given.steps, given.median, given.seq_length)
            overrides = (
                "dataset.kind=chat",
                f"dataset.path_or_dataset_id={data}",
                f"dataset.seq_length={given.seq_length}",
                "validation_dataset=null",
                "samples.prompts=[]",
                "step_scheduler.val_every_steps=null",
                "step_scheduler.global_batch_size=1",
                "step_scheduler.local_batch_size=1",
                f"step_scheduler.max_steps={given.steps}",
                "distributed.activation_checkpointing=false",
                "checkpoint.enabled=false",
                *LANES[name],
                *given.overrides,
            )
            command = Plan(config, overrides, processes=1, share_gpus=False).command(run)
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}", flush=True)
                failed += 1
                continue
            steps = records(run, "step")
            last = steps[-given.timed :]
            tokens, seconds = (sum(step[key] for step in last) for key in ("tokens", "seconds"))
            print(
                f"{name:<16}{tokens / seconds:>9,.0f} tokens/s, {1e3 * seconds / len(last):,.0f} ms and "
                f"{tokens / len(last):,.0f} tokens a step; all {len(steps)} steps "
                f"{sum(step['seconds'] for step in steps):.0f} s; first losses "
                f"{' '.join(format(step['loss'], '.4f') for step in steps[:3])}; "
                f"{max(step['memory_bytes'] for step in steps) / GIB:.1f} GiB",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
