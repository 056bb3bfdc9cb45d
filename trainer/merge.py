"""`python -m trainer.merge ADAPTER MODEL OUT`: one model folder of a base and its adapter, for transformers.

OUT is a copy of MODEL, in which the adapted weights are written over, in the files' own layout and dtype:
W + scale · B A, computed in fp32 one matrix at a time. So memory does not depend on the model's size, and OUT
loads wherever MODEL does. It appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.__main__ import OFFLINE
from trainer.config import ModelSection
from trainer.errors import ConfigError, TrainerError, TrainingFailed
from trainer.expert_lora import split_by_expert
from trainer.experts import projections
from trainer.files import fsync_folder
from trainer.kernels import find_mamba_kernels
from trainer.loading import DTYPES, Piece, pieces_of
from trainer.lora import BASE, base_digest
from trainer.model import empty_model, model_config
from trainer.premerge import MANIFEST
from trainer.weights import PICKLED

UNKNOWN_HERE = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out")
"""Of PEFT's settings, those that make another product than scale · B A, or more than it."""


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: for each expert scale · b @ a; a linear layer is one expert."""

    a: Tensor
    """[experts, rank, in], fp32."""
    b: Tensor
    """[experts, out, rank], fp32."""
    scale: float

    def rows(self, expert: int, first: int, last: int) -> Tensor:
        """Rows `first` up to `last` of one expert's part: [rows, in]."""
        return self.scale * (self.b[expert, first:last] @ self.a[expert])


def main() -> int:
    """Merges what the command line names; 0, or the exit code of the failure."""
    parser = argparse.ArgumentParser(prog="trainer.merge", description=__doc__.partition("\n")[0])
    for name in ("adapter", "model", "out"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    arguments = parser.parse_args()
    os.environ.update(OFFLINE)
    try:
        count = merge(arguments.adapter, arguments.model, arguments.out)
    except TrainerError as problem:
        print(problem.told(), file=sys.stderr)
        return problem.exit_code
    print(f"{arguments.out}: {count} weights merged")
    return 0


def merge(adapter: Path, model: Path, out: Path) -> int:
    """Writes the folder `out`, which must not be there, and returns how many weights were changed.

    Raises ConfigError for an adapter that can't be read or is of another base, TrainingFailed if `out` can't
    be written.
    """
    out = out.absolute()
    if out.exists():
        raise ConfigError(f"{out} is there already.", remedy=f"name another folder, or rm -r {out}")
    section = ModelSection.model_validate({"pretrained_model_name_or_path": model.absolute()})
    base = empty_model(section, model_config(section), find_mamba_kernels("cpu"), torch.device("cpu"))
    pieces = pieces_of(base, model)
    deltas = _read_adapter(adapter, base)
    _require_same_base(adapter, model, {name: pieces[name] for name in deltas})
    weight_files = {piece.stored.file for own in pieces.values() for piece in own}
    try:
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            for file in [*sorted(weight_files), *_other_files(model)]:
                shutil.copyfile(file, temporary / file.name)
            for name, delta in deltas.items():
                for piece in pieces[name]:
                    _add(temporary / piece.stored.file.name, piece, delta)
            for file in temporary.iterdir():
                _flush(file)
            temporary.chmod(0o750)
            temporary.rename(out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(out.parent)
    except OSError as problem:
        raise TrainingFailed(
            f"{out} can't be written: {problem}",
            remedy=f"df -h {out.parent}",
            context={"bytes": sum(file.stat().st_size for file in weight_files)},
        ) from problem
    return len(deltas)


def _other_files(model: Path) -> Iterator[Path]:
    """Config, index, tokenizer, …; no weights that would stay without the adapter, no digests of the base."""
    for file in sorted(model.iterdir()):
        if file.is_file() and not any(file.match(p) for p in ("*.safetensors", MANIFEST, *PICKLED)):
            yield file


def _read_adapter(adapter: Path, base: Any) -> dict[str, Delta]:
    """Parameter of the base → what is added to it."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_bytes())
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as problem:
        raise ConfigError(
            f"{adapter} holds no readable adapter: {problem}", remedy=f"ls -l {adapter}"
        ) from problem
    unknown = [key for key in UNKNOWN_HERE if config.get(key)]
    if config.get("peft_type") != "LORA" or unknown:
        raise ConfigError(
            f"{adapter} is no plain LoRA: {', '.join(unknown) or config.get('peft_type')}.",
            remedy="merge it with PEFT, which made it: PeftModel.merge_and_unload",
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parameters = dict(base.named_parameters())
    deltas = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        name = _parameter(layer.removeprefix("base_model.model."), base, config)
        a, b = (tensors.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if name not in parameters or a is None or b is None:
            raise _another_base(adapter, f"it has no weight {name} of its own")
        shape = parameters[name].shape
        experts = shape[0] if len(shape) == 3 else 1
        if a.shape != (experts * rank, shape[-1]) or b.shape != (shape[-2], experts * rank):
            raise _another_base(adapter, f"its {name} is {list(shape)}")
        deltas[name] = Delta(*split_by_expert(a, b, experts), scale)
    return deltas


def _parameter(layer: str, base: Any, config: dict[str, Any]) -> str:
    """The base's name for what an adapter's layer is on. Of experts, the outermost is the last projection."""
    name = layer.replace(".base_layer", "")
    on_parameters = config.get("target_parameters") or ()
    if not any(target.startswith(f"{name}.") for target in on_parameters):
        return f"{name}.weight"
    adapted = [p for p in projections(base.get_submodule(name)) if f"{name}.{p}" in on_parameters]
    return f"{name}.{adapted[-1 - layer.count('.base_layer')]}"


def _require_same_base(adapter: Path, model: Path, pieces: dict[str, list[Piece]]) -> None:
    """ConfigError if the adapter says that it was trained on other weights of these shapes."""
    if not (adapter / BASE).exists():  # another trainer's
        return
    described = json.loads((adapter / BASE).read_bytes())
    rows = {}
    for name, own in pieces.items():
        with own[0].stored.file.open("rb") as stored:
            rows[name] = _read(stored, own[0], 0, own[0].stored.shape[-1])
    if base_digest(rows, getattr(torch, described["dtype"])) != described["digest"]:
        raise _another_base(adapter, f"the weights in {model} have other values")


def _another_base(adapter: Path, why: str) -> ConfigError:
    return ConfigError(
        f"The adapter was trained on another model than this one: {why}.",
        remedy=f"give the folder that it was trained on: grep base_model {adapter}/adapter_config.json",
        context={"adapter": adapter},
    )


def _add(file: Path, piece: Piece, delta: Delta) -> None:
    """Adds to a stored tensor in place, one expert's rows at a time; a piece is any run of whole rows."""
    columns, per_expert = delta.a.shape[2], delta.b.shape[1]
    first = piece.offset // columns
    last = first + piece.elements // columns
    with file.open("r+b") as stored:
        row = first
        while row < last:
            expert, start = divmod(row, per_expert)
            stop = min(per_expert, start + last - row)
            place, length = (row - first) * columns, (stop - start) * columns
            weight = _read(stored, piece, place, length)
            summed = (weight.float().view(-1, columns) + delta.rows(expert, start, stop)).to(weight.dtype)
            stored.seek(piece.stored.begin + place * weight.itemsize)
            stored.write(summed.view(torch.uint8).numpy().tobytes())
            row += stop - start


def _read(stored: BinaryIO, piece: Piece, place: int, length: int) -> Tensor:
    """`length` elements of a stored tensor from its element `place` on, flat."""
    dtype = DTYPES[piece.stored.dtype]
    stored.seek(piece.stored.begin + place * dtype.itemsize)
    return torch.frombuffer(bytearray(stored.read(length * dtype.itemsize)), dtype=dtype)


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
