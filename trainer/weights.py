"""A model folder's weight files, by their headers alone: what is where, and whether all is whole. No torch.

A safetensors file is eight bytes with the header's length (little endian), the header, which is JSON
(tensor → dtype, shape, where it begins and ends), and the tensors: a file that was cut off is known by its
size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weight formats that can run code when they are read."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its bytes in the file, in row-major order."""

    name: str
    file: Path
    dtype: str
    """The format's own word: BF16, F32, …"""
    shape: tuple[int, ...]
    begin: int
    """In bytes from the file's start."""
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in `folder`. Raises ValueError, "FILE: what is wrong with it"."""
    problems: list[str] = []
    index = _index(folder, problems)
    if problems:
        raise ValueError(problems[0])
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(index.values()) or {SINGLE}):
        try:
            found |= read_header(folder / name)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
    if absent := sorted(set(index) - set(found)):
        raise ValueError(f"{index[absent[0]]}: lacks {absent[0]}, which {INDEX} names")
    return found


def inspect_weights(folder: Path) -> dict[str, Any]:
    """`files`, `bytes`, `tensors` and `problems`, each "FILE: what is wrong with it"."""
    if not folder.is_dir():
        return _report([f"{folder} is not there" if not folder.exists() else f"{folder} is not a folder"])
    problems: list[str] = []
    index = _index(folder, problems)
    there = {path.name for path in folder.glob("*.safetensors")}
    wanted = set(index.values()) if index else {SINGLE} & there
    if not there:
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        also = f"; {', '.join(pickled[:3])} can run code and is not read" if pickled else ""
        problems.append(f"{folder} has no *.safetensors{also}")
    elif not wanted and not problems:
        problems.append(f"{INDEX}: is missing, and so is {SINGLE}: nothing says which tensor is where")
    problems += [
        f"{name}: is missing, and {_count(index, name)} tensors are in it" for name in sorted(wanted - there)
    ]
    total, tensors = 0, 0
    for name in sorted(wanted & there):
        total += (folder / name).stat().st_size
        try:
            inside = read_header(folder / name)
        except ValueError as problem:
            problems.append(f"{name}: {problem}")
            continue
        tensors += len(inside)
        absent = sorted(tensor for tensor, shard in index.items() if shard == name and tensor not in inside)
        if absent:
            problems.append(f"{name}: lacks {len(absent)} of its tensors, the first is {absent[0]}")
    return _report(problems, files=len(wanted), size=total, tensors=tensors)


def _report(problems: list[str], *, files: int = 0, size: int = 0, tensors: int = 0) -> dict[str, Any]:
    return {"files": files, "bytes": size, "tensors": tensors, "problems": problems}


def _index(folder: Path, problems: list[str]) -> Mapping[str, str]:
    """Tensor → its file; empty where there is no index, or none that can be read."""
    file = folder / INDEX
    if not file.exists():
        return {}
    try:
        index = json.loads(file.read_bytes())["weight_map"]
        return {str(tensor): str(name) for tensor, name in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        problems.append(f"{INDEX}: is damaged ({type(problem).__name__}: {problem})")
        return {}


def _count(index: Mapping[str, str], name: str) -> int:
    return sum(shard == name for shard in index.values())


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors in `file` by name. Raises ValueError where its size or header is wrong."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ValueError(f"is a pointer of git-lfs ({size} bytes), not the file itself")
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"is cut off or damaged: {size} bytes, and its header alone has {length}")
            header = json.loads(stream.read(length))
    except OSError as problem:
        raise ValueError(f"can't be read ({problem.strerror})") from problem
    except json.JSONDecodeError as problem:
        raise ValueError(f"its header is damaged ({problem})") from problem
    try:
        tensors = {
            name: StoredTensor(
                name,
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, IndexError) as problem:
        raise ValueError("its header is damaged (a tensor has no place)") from problem
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        how = "is cut off" if end > size else "is too long"
        raise ValueError(f"{how}: {size} bytes, and its header names {end}")
    return tensors
