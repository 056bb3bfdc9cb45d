"""ELF files with GPU code of known architectures, made without nvcc."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path


def image(kind: int, architecture: int, flags: int = 0, payload: bytes = b"\0" * 24) -> bytes:
    """One entry of a fatbinary, as nvcc lays it out: 64 bytes of header, then the code."""
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload))
    header += struct.pack("<IIHHI", 0, 0, 0, 0, architecture) + bytes(8) + struct.pack("<Q", flags)
    return header.ljust(64, b"\0") + payload


def fatbinary(*images: bytes) -> bytes:
    body = b"".join(images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(folder: Path, sections: Mapping[str, bytes]) -> Path:
    """A shared library with these sections, made by the machine's own tools."""
    path = folder / "unit.so"
    source = folder / "unit.c"
    source.write_text("int nothing;\n", encoding="utf-8")
    subprocess.run(["gcc", "-shared", source, "-o", path], check=True)
    for name, data in sections.items():
        (folder / "section").write_bytes(data)
        subprocess.run(["objcopy", "--add-section", f"{name}={folder / 'section'}", path], check=True)
    return path
