"""Reads which GPU architectures a binary holds code for, without any CUDA tool.

nvcc embeds GPU code as "fatbinaries" in the ELF sections `.nv_fatbin` (and `__nv_relfatbin` for relocatable
device code). The layout is not published; it was read off binaries that nvcc 11 to 13 made and compared with
what `cuobjdump --list-elf` says about them.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")
"""Magic, format version, header size, body size (bytes)."""
_ENTRY = struct.Struct("<HHIQ12xI8xQ")
"""Kind, -, header size, payload size (bytes), architecture (at 28), flags (at 40)."""
_MACHINE_CODE = 2
_PREFIX = {1: "compute", 2: "sm", 8: "lto"}
"""Kind of entry: PTX for a virtual architecture, machine code for a real one, code for a later link."""
_SUFFIX = ((0x100000, "a"), (0x200000, "f"))
"""Flags of architecture-specific ("90a") and family-specific ("100f") code."""
_COMPRESSED = 0x2000 | 0x8000
"""Flags of payloads that are packed, as LZ4 (nvcc 12 and older) and as Zstandard."""


class FatbinError(ValueError):
    """A file is not an ELF binary, or its GPU code has a layout that this reader does not know."""


@dataclass(frozen=True)
class GpuImage:
    """One piece of GPU code in a binary."""

    architecture: str
    """E.g. "sm_90" (machine code), "compute_90" (PTX)."""
    compressed: bool
    payload: memoryview
    """As stored, so packed where `compressed`; may end in padding. Else machine code is ELF (a "cubin").
    The file is mapped, and this read when it is looked at: libraries have gigabytes of it."""

    @property
    def is_machine_code(self) -> bool:
        return self.architecture.startswith(_PREFIX[_MACHINE_CODE])


def gpu_architectures(path: Path) -> tuple[str, ...]:
    """The architectures that the shared object or object file `path` has GPU code for, sorted.

    "sm_90" is machine code, "compute_90" PTX. Empty where there is none. Raises FatbinError.
    """
    return tuple(sorted({image.architecture for image in gpu_images(path)}))


def gpu_images(path: Path) -> Iterator[GpuImage]:
    """Every piece of GPU code in the shared object or object file `path`, in order. Raises FatbinError."""
    try:
        with path.open("rb") as file:
            sections = [
                (int(section["sh_offset"]), int(section["sh_size"]))
                for section in ELFFile(file).iter_sections()
                if section.name in _SECTIONS
            ]
            # An empty file is no ELF, so there is something to map.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ELFError as error:
        raise FatbinError(f"{path} is not an ELF binary: {error}") from error
    try:
        for offset, size in sections:
            yield from _images(data[offset : offset + size])
    except (struct.error, KeyError) as error:
        raise FatbinError(f"{path} holds GPU code of an unknown layout") from error


def _images(section: memoryview) -> Iterator[GpuImage]:
    offset = 0
    while offset + _CONTAINER.size <= len(section):
        magic, _, header, body = _CONTAINER.unpack_from(section, offset)
        if magic != _MAGIC:
            offset += 8  # padding: containers begin at multiples of 8
            continue
        begin, end = offset + header, offset + header + body
        while begin < end:
            image, begin = _image(section, begin)
            yield image
        offset = (end + 7) // 8 * 8


def _image(section: memoryview, offset: int) -> tuple[GpuImage, int]:
    """The entry at `offset`, and where the next one begins."""
    kind, _, header, payload, architecture, flags = _ENTRY.unpack_from(section, offset)
    if header < _ENTRY.size or offset + header + payload > len(section):
        raise KeyError("header")
    suffix = "".join(letter for flag, letter in _SUFFIX if flags & flag)
    begin, end = offset + header, offset + header + payload
    name = f"{_PREFIX[kind]}_{architecture}{suffix}"
    return GpuImage(name, bool(flags & _COMPRESSED), section[begin:end]), end
