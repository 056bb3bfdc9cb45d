"""How long training takes to its first step from weights on a disk, in the layout of `trainer.premerge`.

    python -m benchmarks.first_step /dev/shm/model            the true-size model: 59 GiB on a disk in memory
    python -m benchmarks.first_step /tmp/model --tiny         a tiny model on the CPU

Run by the Python of an env, on a GPU node. The folder is made with random weights, if it is not there, and
stays; a disk in memory stands for one whose files are in the page cache. Given are, for each start of the
trainer, the seconds to the end of its first step, Python's start and the kernels' compilation counted in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.stitched import CONFIGS, Failed, Plan, train
from trainer.__main__ import OFFLINE
from trainer.premerge import FILE_BYTES
from trainer.reading import read_config
from trainer.weights import INDEX

GIB = 2**30


def make_model(config_file: Path, folder: Path) -> int:
    """Writes the random weights that `config_file` trains to `folder`, in the model's order; their bytes."""
    os.environ.update(OFFLINE)
    warnings.simplefilter("ignore")
    import torch
    from safetensors.torch import save_file

    from trainer.kernels import find_mamba_kernels
    from trainer.model import empty_model, fill, model_config

    config = read_config(config_file)
    kernels, device = find_mamba_kernels(config.device), torch.device(config.device)
    base = model_config(config.model)
    model = empty_model(config.model, base, kernels, device)
    fill(model, config.model, device, seed=config.seed)
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        length = tensor.numel() * tensor.element_size()
        if groups[-1] and size + length > FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size, total = size + length, total + length
    folder.mkdir(parents=True)
    places = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(group, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    base.save_pretrained(folder)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    file = CONFIGS / ("quickstart.yaml" if given.tiny else "nemotron3-nano-true-size.yaml")
    if not given.folder.exists():
        began = time.time()
        total = make_model(file, given.folder)
        print(f"{given.folder}: {total / GIB:.1f} GiB in {time.time() - began:.0f} s", flush=True)
    weights = (
        "model.config=null",
        "model.init=null",
        f"model.pretrained_model_name_or_path={given.folder.absolute()}",
        "step_scheduler.max_steps=3",
        "checkpoint.enabled=false",
    )
    for number in range(1, given.starts + 1):
        with tempfile.TemporaryDirectory() as name:
            try:
                print(
                    f"start {number}, {train(Plan(file, weights, 1, share_gpus=False), Path(name))}",
                    flush=True,
                )
            except Failed as problem:
                print(problem)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
