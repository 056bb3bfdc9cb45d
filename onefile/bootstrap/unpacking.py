"""Puts the tool and its packages, for the Python that runs, from the one file into the user's cache folder.

Standalone, with the standard library only. In the one file, `targets.json` names what it holds (see
`make.py`); a target's files are unpacked once, into a folder that is named by their digest.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NoReturn

ONE_FILE = Path(__file__).parent.absolute()
VARIABLE = "ENVBUILDER_CACHE"
_ABANDONED_S = 3600
"""Age at which a half-unpacked folder has no process any more that fills it."""
_NEW = ".new-"


def unpacked_tool() -> Path:
    """Where the tool lies for this Python and machine, unpacked if need be; `python FOLDER` runs it.

    Ends the process (exit 7) where the one file holds nothing for them, and where the folder can't be made
    or is not the user's alone to change.
    """
    target = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    running = f"{sys.implementation.name} {target}"
    with zipfile.ZipFile(ONE_FILE) as archive:
        targets = json.loads(archive.read("targets.json"))
        held = [f"cpython {one}" for one in targets]
        if running not in held:
            _fail(
                f"{ONE_FILE} has nothing for {running}, but for: {', '.join(held)}.",
                f"Load one of these Pythons (module avail python), then: python3 {ONE_FILE}",
            )
        size, digest = targets[target]["size"], targets[target]["digest"]
        cache = _cache_folder()
        folder = cache / f"onefile-{target}-{digest[:16]}"
        if not folder.is_dir():
            print(
                f"envbuilder: unpacking {size / 1e6:.0f} MB into {folder}, once "
                f"(elsewhere: export {VARIABLE}=FOLDER)",
                file=sys.stderr,
            )
            try:
                _unpack(archive, target, folder)
            except OSError as error:
                _fail(
                    f"{folder} can't be unpacked ({size / 1e6:.0f} MB): {error.strerror or error}.",
                    f"Choose a disk with room where programs may run: export {VARIABLE}=FOLDER",
                )
    _check_owner(folder)
    return folder


def _cache_folder() -> Path:
    if named := os.environ.get(VARIABLE):
        return Path(named).absolute()
    above = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (above if above.is_absolute() else Path.home() / ".cache") / "envbuilder"


def _unpack(archive: zipfile.ZipFile, target: str, folder: Path) -> None:
    """Beside its place first: `folder` is absent or whole, however many processes do this at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder.parent))
    try:
        files = json.loads(archive.read(f"targets/{target}.json"))
        for inside in sorted({new, *((new / name).parent for name in files)}):
            inside.mkdir(parents=True, exist_ok=True)
        for name, member in files.items():
            content = archive.read(f"files/{member}")
            descriptor = os.open(new / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            # Nothing in here is secret, and nobody else may change it, whatever the umask.
            (new / name).chmod(0o755 if name.startswith("bin/") else 0o644)
        for inside in (new, *(path for path in new.rglob("*") if path.is_dir())):
            inside.chmod(0o755)
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed processes left."""
    for path in cache.glob(f"{_NEW}*"):
        if path.lstat().st_mtime < time.time() - _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _check_owner(folder: Path) -> None:
    status = folder.lstat()
    changeable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or changeable:
        _fail(
            f"{folder} is another user's, or others may change it: what lies there is not run.",
            f"Choose a folder of your own: export {VARIABLE}=FOLDER",
        )


def _fail(message: str, remedy: str) -> NoReturn:
    print(f"{message}\n  remedy: {remedy}", file=sys.stderr)
    raise SystemExit(7)
