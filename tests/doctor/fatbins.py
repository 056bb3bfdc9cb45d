"""Real ELF files, with GPU code sections or with one thing about what they need, made without CUDA."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

KINDS = {"compute": 1, "sm": 2}


def make_library(path: Path, source: str, *options: str | Path, compiler: str = "gcc") -> Path:
    """The shared object `path`, compiled from C (from C++ by "g++"); others need it by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = path.with_name(f"{path.name}.{'cpp' if compiler == 'g++' else 'c'}")
    code.write_text(source, encoding="utf-8")
    # Without --as-needed, which some compilers have by default: what is named is needed.
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name},--no-as-needed", "-o", path, code]
    subprocess.run([*command, *options], check=True)
    code.unlink()
    return path


def make_extension(path: Path, *architectures: str) -> bytes:
    """A shared object at `path` with code for `architectures` ("sm_90", "compute_80"); returns its bytes."""
    make_library(path, "", "-nostdlib")
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
