"""`python -m trainer.premerge MODEL OUT`: a model's weights once more, laid out as training loads them.

The hub has one tensor for each expert, OUT has the model's own parameters, in the order of its layers, in a
few large files, so that loading is long reads. Bytes are copied: nothing is converted, and memory holds one
buffer. transformers loads the folder too. `premerged.json` names each weight file's size and sha256;
`--verify` holds the files against it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trainer.__main__ import OFFLINE
from trainer.config import ModelSection
from trainer.errors import ConfigError, TrainerError, TrainingFailed
from trainer.files import fsync_folder, sha256, write_atomically
from trainer.kernels import find_mamba_kernels
from trainer.loading import Piece, pieces_of
from trainer.model import empty_model, model_config
from trainer.weights import INDEX, PICKLED

MANIFEST = "premerged.json"
FILE_BYTES = 2**33
BUFFER_BYTES = 2**24


def main() -> int:
    """Merges or verifies what the command line names; 0, or the exit code of the failure."""
    parser = argparse.ArgumentParser(prog="trainer.premerge", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?")
    parser.add_argument("--verify", action="store_true", help="read a premerged MODEL against its manifest")
    arguments = parser.parse_args()
    if arguments.verify != (arguments.out is None):
        parser.error("give MODEL and OUT, or --verify and MODEL")
    os.environ.update(OFFLINE)
    try:
        if arguments.verify:
            print(f"{arguments.model}: {verify(arguments.model)} files are whole")
        else:
            print(f"{arguments.out}: {premerge(arguments.model, arguments.out):,} bytes of weights")
    except TrainerError as problem:
        print(problem.told(), file=sys.stderr)
        return problem.exit_code
    return 0


def premerge(model: Path, out: Path) -> int:
    """Writes the folder `out`, which must not be there; it appears whole. Returns the weights' bytes.

    Raises ConfigError for a model that can't be loaded, TrainingFailed if `out` can't be written.
    """
    model, out = model.absolute(), out.absolute()
    if out.exists():
        raise ConfigError(f"{out} is there already.", remedy=f"name another folder, or rm -r {out}")
    section = ModelSection.model_validate({"pretrained_model_name_or_path": model})
    layers = empty_model(section, model_config(section), find_mamba_kernels("cpu"), torch.device("cpu"))
    shapes = {name: tensor.shape for name, tensor in layers.state_dict().items()}
    pieces = pieces_of(layers, model)
    for name, own in pieces.items():
        if len(dtypes := {piece.stored.dtype for piece in own}) > 1:
            raise ConfigError(
                f"The experts of {name} are stored in different dtypes: {', '.join(sorted(dtypes))}.",
                remedy=f"train on {model} as it is: loading converts them",
            )
    groups = list(_grouped(pieces))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            total = _write(temporary, model, groups, pieces, shapes)
            temporary.chmod(0o750)
            temporary.rename(out)
            fsync_folder(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as problem:
        raise TrainingFailed(
            f"{out} can't be written: {problem}", remedy=f"df -h {out.parent}", context={"folder": out.parent}
        ) from problem
    return total


def verify(folder: Path) -> int:
    """Reads every weight file against the manifest; their number. ConfigError for one that is wrong."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError) as problem:
        raise ConfigError(
            f"{folder} has no readable {MANIFEST}: premerge didn't write it.",
            remedy="python -m trainer.premerge MODEL OUT",
            context={"problem": problem},
        ) from problem
    for name, expected in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        found = {"bytes": size, "sha256": sha256(file) if size == expected["bytes"] else "not read"}
        if found != expected:
            raise ConfigError(
                f"{file} is not what premerge wrote.",
                remedy=f"rm -r {folder}  # and premerge once more",
                context={"expected": expected, "got": found},
            )
    return len(files)


def _grouped(pieces: dict[str, list[Piece]]) -> Iterator[list[str]]:
    """The tensors of each file, in the model's order."""
    group: list[str] = []
    size = 0
    for name, own in pieces.items():
        length = _bytes_of(own)
        if group and size + length > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += length
    yield group


def _bytes_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.stored.end - piece.stored.begin for piece in pieces)


def _write(
    folder: Path,
    model: Path,
    groups: Sequence[Sequence[str]],
    pieces: dict[str, list[Piece]],
    shapes: dict[str, torch.Size],
) -> int:
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        files[name] = _write_file(folder / name, {tensor: pieces[tensor] for tensor in group}, shapes)
        weight_map |= dict.fromkeys(group, name)
    total = sum(_bytes_of(own) for own in pieces.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file in sorted(model.iterdir()):
        if file.is_file() and not any(file.match(p) for p in ("*.safetensors", "*.index.json", *PICKLED)):
            shutil.copyfile(file, folder / file.name)
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")
    write_atomically(folder / MANIFEST, json.dumps({"source": str(model), "files": files}, indent=1) + "\n")
    return total


def _write_file(path: Path, tensors: dict[str, list[Piece]], shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """One safetensors file; its size and digest."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, own in tensors.items():
        end = position + _bytes_of(own)
        header[name] = {
            "dtype": own[0].stored.dtype,
            "shape": list(shapes[name]),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format's own writer has it
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for own in tensors.values():
            for piece in own:
                _copy(piece, file, digest)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _copy(piece: Piece, into: BinaryIO, digest: Any) -> None:
    with piece.stored.file.open("rb") as source:
        source.seek(piece.stored.begin)
        left = piece.stored.end - piece.stored.begin
        while left:
            chunk = source.read(min(left, BUFFER_BYTES))
            if not chunk:
                raise OSError(f"{piece.stored.file} ends too early")
            into.write(chunk)
            digest.update(chunk)
            left -= len(chunk)


if __name__ == "__main__":
    sys.exit(main())
