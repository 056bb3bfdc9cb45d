"""Makes the one file: envbuilder with all that it needs, for each Python and machine (see docs/one-file.md).

    python onefile/make.py OUT [--python 3.11 …] [--machine x86_64 …]

uv chooses and installs the packages for each target into a folder of its own. A file that several targets
have is kept once, under its sha256:

    __main__.py, unpacking.py    what Python runs
    targets.json                 target ("3.9-x86_64") → size in bytes and digest of what is unpacked for it
    targets/TARGET.json          path in the unpacked folder → sha256
    files/SHA256                 the files
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipapp
from collections.abc import Iterator, Sequence
from pathlib import Path

from uv import find_uv_bin

from envbuilder.fetch.selfpack import pack_tool

PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = {"x86_64": "x86_64-manylinux2014", "aarch64": "aarch64-manylinux_2_28"}
"""Machine → the oldest system, in uv's words, that all packages have wheels for."""
BOOTSTRAP = Path(__file__).with_name("bootstrap")
PROGRAMS = ("uv",)
"""Of the programs that packages bring, those that the tool starts."""
OF_THE_INSTALLER = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json")
"""In each .dist-info: they tell of this installation, and not of the package."""
EPOCH = 315532800  # 1980, as far back as a zip can tell: the same files give the same zip


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the one file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--machine", nargs="+", choices=tuple(PLATFORMS), default=tuple(PLATFORMS))
    asked = parser.parse_args()
    make(asked.out, asked.python, asked.machine)
    print(f"{asked.out}: {asked.out.stat().st_size / 1e6:.0f} MB")


def make(out: Path, pythons: Sequence[str], machines: Sequence[str]) -> None:
    """Writes the one file for these Pythons and machines to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onefile-", dir=out.parent) as scratch:
        content = Path(scratch, "content")
        for folder in (content / "files", content / "targets"):
            folder.mkdir(parents=True)
        for name in ("__main__.py", "unpacking.py"):
            shutil.copy(BOOTSTRAP / name, content)
        packed = pack_tool()
        wheel = Path(scratch, packed.filename)
        wheel.write_bytes(packed.content)
        targets = {}
        for python in pythons:
            for machine in machines:
                installed = Path(scratch, f"{python}-{machine}")
                install(wheel, installed, python, machine)
                targets[installed.name] = keep(installed, content)
                shutil.rmtree(installed)
        write_json(content / "targets.json", targets)
        for path in content.rglob("*"):
            os.utime(path, (EPOCH, EPOCH))
        new = Path(scratch, out.name)
        zipapp.create_archive(content, new, interpreter="/usr/bin/env python3", compressed=True)
        new.replace(out)


def install(wheel: Path, folder: Path, python: str, machine: str) -> None:
    """Installs `wheel` and what it requires on that target into `folder`, to be run as `python FOLDER`."""
    command = [
        *(find_uv_bin(), "pip", "install", "--quiet", "--no-config", "--python", sys.executable),
        *("--python-version", python, "--python-platform", PLATFORMS[machine], "--only-binary", ":all:"),
        *("--target", folder, wheel),
    ]
    subprocess.run(command, check=True)
    shutil.copy(BOOTSTRAP / "run_unpacked.py", folder / "__main__.py")


def keep(installed: Path, content: Path) -> dict[str, int | str]:
    """Takes the files of a target over into `content`; what `targets.json` says of it."""
    files, size = {}, 0
    for path in wanted_files(installed):
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        files[path.relative_to(installed).as_posix()] = sha256
        size += len(data)
        (content / "files" / sha256).write_bytes(data)
    listing = write_json(content / "targets" / f"{installed.name}.json", files)
    return {"size": size, "digest": hashlib.sha256(listing).hexdigest()}


def wanted_files(installed: Path) -> Iterator[Path]:
    """The files of a target, without what only this installation needed."""
    for path in sorted(installed.rglob("*")):
        inside = path.relative_to(installed)
        of_installer = inside.parts[0].endswith(".dist-info") and inside.name in OF_THE_INSTALLER
        unused = inside.parts[0] == "bin" and inside.name not in PROGRAMS
        hidden = len(inside.parts) == 1 and inside.name.startswith(".")
        if path.is_file() and not (of_installer or unused or hidden or "__pycache__" in inside.parts):
            yield path


def write_json(path: Path, what: object) -> bytes:
    data = json.dumps(what, indent=0, sort_keys=True).encode()
    path.write_bytes(data)
    return data


if __name__ == "__main__":
    main()
