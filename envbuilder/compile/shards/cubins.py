"""Machine code for GPUs as nvcc makes it: an ELF file (a "cubin") for each architecture.

The layout isn't published; this was read off cubins of nvcc 13.0.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from envbuilder.fatbin import gpu_images

_PARAMETERS = ".nv.constant0."
"""Begins the name of the section that only a kernel has: the constant bank of its parameters."""
GPU_TEXT = re.compile(r"\$str(\$\d+)?|__unnamed_\d+")
"""Names of the texts that nvcc puts into GPU memory, for printf, assert and __func__."""
_BY_FILE = re.compile(r"(?:_INTERNAL_|_GLOBAL__N__)[0-9a-f]{8}_(\d+)_")
"""Begins the name that nvcc gives a file's internal linkage: a hash, and length and name of the file."""


def cubins(path: Path) -> Iterator[tuple[str, Any]]:
    """Architecture and code of the cubins in an object file or shared object that aren't compressed.

    The code is a pyelftools ELFFile. Raises FatbinError, and pyelftools' ELFError where one is damaged.
    """
    for image in gpu_images(path):
        if image.is_machine_code and not image.compressed:
            yield image.architecture, ELFFile(io.BytesIO(image.payload))


def kernel_names(cubin: Any) -> list[str]:
    """The mangled names of `cubin`'s kernels."""
    return [
        section.name.removeprefix(_PARAMETERS)
        for section in cubin.iter_sections()
        if section.name.startswith(_PARAMETERS)
    ]


def plain_name(name: str) -> str:
    """Mangled `name` without what nvcc derives from the file that it compiles.

    Two files' names for one entity of internal linkage become equal.
    """
    position = 0
    while found := _BY_FILE.search(name, position):
        begin, end = _component(name, found)
        kept = "12_GLOBAL__N_1" if name.startswith("_GLOBAL", found.start()) else ""
        name = name[:begin] + kept + name[end:]
        position = begin + len(kept)
    return name


def _component(name: str, found: re.Match[str]) -> tuple[int, int]:
    """Where the part of `name` in which `found` is begins (with its length, in digits) and ends.

    The length may follow other digits, so the shortest that holds hash and file is taken.
    """
    shortest = len(found[0]) + int(found[1]) + 2
    for digits in range(1, 5):
        begin = found.start() - digits
        if begin < 0 or not name[begin].isdigit():
            break
        length = int(name[begin : found.start()])
        if name[begin] != "0" and length >= shortest and found.start() + length <= len(name):
            return begin, found.start() + length
    return found.start(), found.end()
