"""Fills a model whose tensors are there already, whole or sharded: from safetensors files, or at random.

Every process reads only the bytes that it keeps. What it keeps of a shared parameter is one run of its
elements in row-major order (`sharding.py`; FSDP2 cuts it along its first dimension), and so is every stored
tensor, be it the whole parameter or one expert of it. Loading is the intersection of runs: no tensor is
merged or held whole.

The bytes go from the file through a few buffers (page-locked on CUDA) straight to their place on the device:
host memory is `READERS` buffers of `CHUNK_BYTES`, whatever the model's size.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.errors import ConfigError
from trainer.sharding import SharedParameter
from trainer.weights import StoredTensor, stored_tensors

READERS = 8
CHUNK_BYTES = 2**25
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PREFIXES = {"nemotron_h": ("backbone.", "model.")}
"""Model type → how names begin on the hub, and in transformers."""
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
"""One expert's own tensor on the hub; transformers has one parameter for all, the expert first."""
HALVES = {"gate_proj": 0, "up_proj": 1}
"""Where gated experts have both in one parameter, `gate_up_proj`: which half of an expert's rows it is."""
UNUSED = (r"rotary_emb\.inv_freq$",)
"""Stored by old releases of transformers, computed since."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor and where in its parameter it begins, in elements, row-major."""

    stored: StoredTensor
    offset: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.stored.shape)


def load_weights(causal_lm: Any, folder: Path) -> None:
    """Fills the parameters and the stored buffers of `causal_lm` from the files in `folder`.

    The tensors are on their device, whole or shared. Takes the hub's layout and transformers' own.
    Raises ConfigError for a damaged file and for a tensor that is missing, unknown or of another shape.
    """
    pieces = pieces_of(causal_lm, folder)
    tensors = named_tensors(causal_lm)
    reads = [read for name, own in pieces.items() for piece in own for read in _reads(tensors[name], piece)]
    reads.sort(key=lambda read: (read.file, read.begin))
    device = next(causal_lm.parameters()).device
    try:
        with _Readers(device) as readers:
            readers.read(reads)
    except OSError as problem:
        raise ConfigError(
            f"The weights in {folder} can't be read: {problem}",
            remedy=f"ls -l {folder}",
            context={"folder": folder},
        ) from problem


def random_weights(causal_lm: Any, blocks: Sequence[nn.Module], seed: int) -> None:
    """Fills the model by its own rules; the numbers depend on the seed and the kind of device alone.

    Every process makes each block whole, one at a time, and keeps its part.
    """
    in_blocks = {id(module) for block in blocks for module in block.modules()}
    rest = [module for module in causal_lm.modules() if id(module) not in in_blocks]
    for number, modules in enumerate((*(list(block.modules()) for block in blocks), rest)):
        torch.manual_seed(seed * 1_000_003 + number)
        with torch.no_grad(), _whole(modules):
            for module in reversed(modules):  # what a module holds comes before itself
                causal_lm._init_weights(module)


def computed_buffers(causal_lm: Any) -> None:
    """Fills the buffers that no checkpoint has, such as the rotary embedding's frequencies."""
    stored = causal_lm.state_dict().keys()
    owners = {name.rpartition(".")[0] for name, _ in causal_lm.named_buffers() if name not in stored}
    for owner in sorted(owners):
        causal_lm._init_weights(causal_lm.get_submodule(owner))


@contextmanager
def _whole(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules' own sharded parameters are whole inside; after it each process has its part of them."""
    shards: list[tuple[nn.Module, str, nn.Parameter]] = []
    wholes: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, shard in list(module.named_parameters(recurse=False)):
            if isinstance(shard, DTensor | SharedParameter):
                empty = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
                module._parameters[name] = wholes.setdefault(
                    id(shard), nn.Parameter(empty, requires_grad=False)
                )
                shards.append((module, name, shard))
    yield
    for module, name, shard in shards:
        own, first = local_part(shard)
        own.copy_(wholes[id(shard)].view(-1)[first : first + own.numel()])
        module._parameters[name] = shard


def named_tensors(causal_lm: Any) -> dict[str, Tensor]:
    """What a checkpoint has of the model: parameters and persistent buffers, each once, in its order."""
    stored = causal_lm.state_dict().keys()
    named = {**dict(causal_lm.named_parameters()), **dict(causal_lm.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in stored}


def pieces_of(causal_lm: Any, folder: Path) -> dict[str, list[Piece]]:
    """Tensor of the model → the stored ones that fill it, in order; `causal_lm` may be on the meta device.

    Raises ConfigError, see `load_weights`.
    """
    try:
        stored = stored_tensors(folder)
    except ValueError as problem:
        raise ConfigError(
            f"The model in {folder} can't be loaded: {problem}",
            remedy=f"ls -l {folder}  # every shard of model.safetensors.index.json must be there, and whole",
            context={"key": "model.pretrained_model_name_or_path"},
        ) from problem
    tensors = named_tensors(causal_lm)
    found: dict[str, list[Piece]] = defaultdict(list)
    twins = _twins(causal_lm, tensors)
    for tensor in stored.values():
        name, part = _place(tensor.name, causal_lm.config.model_type, tensors)
        if name in tensors:
            found[name].append(_piece(tensor, name, tensors[name].shape, part))
        elif name not in twins and not _is_unused(causal_lm, name):
            raise _wrong(tensor, "is no tensor of this model", {"name": name})
    for name, twin in twins.items():  # a tied tensor may be stored under either name
        if twin not in found and name in stored:
            found[twin].append(_piece(stored[name], twin, tensors[twin].shape, None))
    for name, own in tensors.items():
        found[name].sort(key=lambda piece: piece.offset)
        _require_whole(folder, name, own.shape, found[name])
    return {name: found[name] for name in tensors}


@dataclass(frozen=True)
class _Part:
    """An expert, or one of the equal parts that its rows consist of."""

    expert: int
    part: int
    parts: int


def _place(stored: str, model_type: str, tensors: Mapping[str, Tensor]) -> tuple[str, _Part | None]:
    """The model's name for a stored tensor, and which part of it that is; None for the whole."""
    if stored in tensors:
        return stored, None
    hub, own = PREFIXES.get(model_type, ("", ""))
    name = own + stored.removeprefix(hub) if hub and stored.startswith(hub) else stored
    if expert := EXPERT.fullmatch(name):
        module, number, projection = expert[1], int(expert[2]), expert[3]
        if f"{module}.{projection}" in tensors:
            return f"{module}.{projection}", _Part(number, 0, 1)
        if projection in HALVES and f"{module}.gate_up_proj" in tensors:
            return f"{module}.gate_up_proj", _Part(number, HALVES[projection], len(HALVES))
    return name, None


def _twins(causal_lm: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A tied tensor's other name → the one that it has among `tensors`."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    all_names = causal_lm.named_parameters(remove_duplicate=False)
    return {name: names[id(tensor)] for name, tensor in all_names if name not in tensors}


def _is_unused(causal_lm: Any, name: str) -> bool:
    """Whether transformers leaves out a stored tensor of this name too (heads for other uses, …)."""
    patterns = (*UNUSED, *(getattr(causal_lm, "_keys_to_ignore_on_load_unexpected", None) or ()))
    return any(re.search(pattern, name) for pattern in patterns)


def _piece(stored: StoredTensor, name: str, shape: torch.Size, part: _Part | None) -> Piece:
    expected = tuple(shape) if part is None else (shape[1] // part.parts, *shape[2:])
    if stored.shape != expected or (part is not None and part.expert >= shape[0]):
        raise _wrong(stored, f"doesn't fit {name} {list(shape)}", {"expected": expected})
    if stored.dtype not in DTYPES:
        raise _wrong(stored, f"is stored as {stored.dtype}, which can't be trained on", {})
    place = 0 if part is None else part.expert * part.parts + part.part
    return Piece(stored, place * math.prod(expected))


def _wrong(stored: StoredTensor, problem: str, facts: Mapping[str, object]) -> ConfigError:
    return ConfigError(
        f"{stored.file.name}: {stored.name} {list(stored.shape)} {problem}.",
        remedy=f"sha256sum {stored.file}  # config.json and weights must be of one model",
        context={"file": stored.file, "tensor": stored.name, "shape": stored.shape, **facts},
    )


def _require_whole(folder: Path, name: str, shape: torch.Size, pieces: list[Piece]) -> None:
    """ConfigError unless the pieces, in order, fill the tensor without a gap or an overlap."""
    position = 0
    for piece in pieces:
        if piece.offset != position:
            break
        position += piece.elements
    if position == shape.numel():
        return
    row = position // max(1, shape[1:].numel())
    files = sorted({piece.stored.file.name for piece in pieces})
    raise ConfigError(
        f"The weights in {folder} don't hold {name} exactly once: a part is missing or doubled at row {row}."
        if pieces
        else f"The weights in {folder} lack {name}.",
        remedy=f"ls -l {folder}  # bring the model's *.safetensors and their index once more",
        context={"folder": folder, "tensor": name, "files": ", ".join(files) or "none has it"},
    )


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process keeps of `tensor`, flat, and where in the whole that begins, in elements."""
    if isinstance(tensor, SharedParameter):
        return tensor.own, tensor.first
    if not isinstance(tensor, DTensor):
        return tensor.detach().view(-1), 0
    rows, processes = tensor.shape[0], tensor.device_mesh.size()
    first = min(rows, math.ceil(rows / processes) * tensor.device_mesh.get_local_rank())
    with torch.no_grad():
        return tensor.to_local().view(-1), first * tensor.shape[1:].numel()


@dataclass(frozen=True)
class _Read:
    file: Path
    begin: int
    """In bytes from the file's start."""
    dtype: torch.dtype
    into: Tensor
    """Flat, at most CHUNK_BYTES of `dtype`."""


def _reads(tensor: Tensor, piece: Piece) -> Iterator[_Read]:
    """What of `piece` this process keeps, chunk by chunk."""
    local, first = local_part(tensor)
    dtype = DTYPES[piece.stored.dtype]
    start, stop = max(first, piece.offset), min(first + local.numel(), piece.offset + piece.elements)
    step = CHUNK_BYTES // dtype.itemsize
    for position in range(start, stop, step):
        yield _Read(
            piece.stored.file,
            piece.stored.begin + (position - piece.offset) * dtype.itemsize,
            dtype,
            local[position - first : min(position + step, stop) - first],
        )


class _Readers:
    """Threads that read, each with a buffer and, on CUDA, a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(min(READERS, len(os.sched_getaffinity(0))))
        self._own = threading.local()
        self._files: dict[Path, int] = {}

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for handle in self._files.values():
            os.close(handle)

    def read(self, reads: list[_Read]) -> None:
        """Does them all. Raises OSError, also for a file that ends too early."""
        for file in {read.file for read in reads}:
            self._files[file] = os.open(file, os.O_RDONLY)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the memory that is written to may still be in use
        for _ in self._threads.map(self._read, reads):
            pass

    @torch.no_grad()
    def _read(self, read: _Read) -> None:
        length = read.into.numel() * read.dtype.itemsize
        buffer = self._buffer()[:length]
        numbers: Any = buffer.numpy()
        view, position = memoryview(numbers), 0
        while position < length:
            count = os.preadv(self._files[read.file], [view[position:]], read.begin + position)
            if not count:
                raise OSError(f"{read.file} ends too early")
            position += count
        if self._device.type != "cuda":
            read.into.copy_(buffer.view(read.dtype))
            return
        with torch.cuda.stream(self._own.stream):
            read.into.copy_(buffer.view(read.dtype), non_blocking=True)
        self._own.stream.synchronize()

    def _buffer(self) -> Tensor:
        """This thread's."""
        if not hasattr(self._own, "buffer"):
            on_gpu = self._device.type == "cuda"
            self._own.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
            if on_gpu:
                self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        buffer: Tensor = self._own.buffer
        return buffer
