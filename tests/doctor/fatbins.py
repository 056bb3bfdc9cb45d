"""Real ELF files with GPU code sections, made without CUDA."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

KINDS = {"compute": 1, "sm": 2}


def make_extension(path: Path, *architectures: str) -> bytes:
    """A shared object at `path` with code for `architectures` ("sm_90", "compute_80"); returns its bytes."""
    source = path.with_suffix(".c")
    source.write_text("", encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", path, source], check=True)
    if architectures:
        section = path.with_suffix(".fatbin")
        section.write_bytes(_fatbin(architectures))
        subprocess.run(["objcopy", "--add-section", f".nv_fatbin={section}", path], check=True)
    return path.read_bytes()


def _fatbin(architectures: tuple[str, ...]) -> bytes:
    entries = b"".join(_entry(*name.split("_")) for name in architectures)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def _entry(kind: str, number: str) -> bytes:
    payload = b"\0" * 64
    header = struct.pack("<HHIQ12xI8xQ", KINDS[kind], 0, 64, len(payload), int(number), 0)
    return header.ljust(64, b"\0") + payload
