"""The kernel that plays a link: it writes so many bytes in so much time, on so many multiprocessors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

BLOCK = 8192
CHUNK = 8 * BLOCK
WARPS = 16


@triton.jit
def _receive(own, into, part, parts, nanoseconds, chunk: tl.constexpr, block: tl.constexpr):
    """`part` and `chunk` in words of four bytes; each chunk takes at least so many nanoseconds."""
    until = globaltimer()
    for start in range(tl.program_id(0) * chunk, part, tl.num_programs(0) * chunk):
        for other in range(1, parts):
            target = into + other.to(tl.int64) * part
            for offset in range(0, chunk, block):
                place = start + offset + tl.arange(0, block)
                there = place < part
                tl.store(target + place, tl.load(own + place, mask=there), mask=there)
            until += nanoseconds
            now = globaltimer()
            while now < until:
                now = globaltimer()


def receive(own: Tensor, into: Tensor, *, rate: float, programs: int) -> None:
    """Writes `own` into every part of `into` but the first, on the current stream.

    rate: bytes a nanosecond, all `programs` together. The sizes are multiples of four bytes.
    """
    source, target = own.reshape(-1).view(torch.int32), into.reshape(-1).view(torch.int32)
    part = source.numel()
    parts = target.numel() // part
    _receive[(programs,)](
        source,
        target,
        part,
        parts,
        int(4 * CHUNK * programs / rate),
        chunk=CHUNK,
        block=BLOCK,
        num_warps=WARPS,
    )
