"""Makes an env into one squashfs file, the same bytes from the same wheels.

The env comes from `install`, in scratch on the node's own disk. What would differ from one time or place to
another is taken out of it: times, owners, rights, where it lay. Modules are compiled now (PEP 552, unchecked
hashes), since nothing can be written beside them later. The shared disk gets the image and its receipt alone.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from envbuilder import __version__
from envbuilder.atomic import new_file, write_atomically
from envbuilder.bundle import hash_file
from envbuilder.env_image import EnvImage, find_image
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.kept_images import image_name
from envbuilder.model import ENV_RECEIPT, EnvReceipt, ImageReceipt
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.venv import venv_python

_EPOCH = "1970-01-01T00:00:00+00:00"
_MODE = 0o440
_ACTIVATION = ("activate", "activate.csh", "activate.fish", "Activate.ps1")
_LEVEL = 3
"""Of zstd: of 19 levels, the last percents of size cost most of the time."""
_COMPILED_AT_ONCE = 200
"""Files for one process. The same files always share one, since what a process has compiled before shows in
the bytes of what it compiles next."""


@dataclass(frozen=True)
class ImageReport:
    """What `make_image` did."""

    image: EnvImage
    seconds: float
    made: bool = True
    """False where it was there already."""


def find_mksquashfs() -> Path:
    """The program that writes images; MismatchError where it is not on this machine."""
    found = shutil.which("mksquashfs")
    if found is None:
        raise MismatchError(
            "There is no mksquashfs on this machine, which writes an env as one file.",
            remedy="Load the module that has squashfs-tools (Debian, Ubuntu: apt install squashfs-tools), or "
            "install the env as a folder: envbuilder install RECIPE",
        )
    return Path(found)


def find_same(root: Root, wanted: EnvReceipt) -> EnvImage | None:
    """The image that is there already, if it holds the env that `wanted` tells of, as this version of
    envbuilder makes it. Its size is compared, its bytes are not: whoever uses it does that."""
    try:
        found = find_image(root, wanted.recipe)
    except IntegrityError:
        return None
    if found is None:
        return None
    receipt = found.receipt
    same = receipt.tool_version == __version__ and receipt.env.made_of_the_same(wanted)
    return found if same and Path(receipt.interpreter).exists() else None


def make_image(env: Path, receipt: EnvReceipt, *, root: Root, reporter: Reporter) -> ImageReport:
    """Writes ROOT/images/NAME-<digest>.squashfs from the env in `env`, which is changed, and its receipt.

    `env` is scratch: the image is made beside it. Files and bytes are told before ROOT is written to.

    Raises MismatchError where mksquashfs is missing or too old, or there is no room.
    """
    began = time.monotonic()
    mksquashfs = find_mksquashfs()
    reporter.stage(f"compiling the modules of {receipt.recipe}")
    _compile_modules(env, receipt.python)
    _take_out_what_differs(env, receipt)
    files, size = _count(env)
    reporter.stage(f"writing the image of {receipt.recipe}")
    made = env.with_suffix(".squashfs")
    version = _write_squashfs(mksquashfs, env, made)
    sha256 = hash_file(made)
    image_receipt = ImageReceipt(
        file=image_name(receipt.recipe, sha256),
        sha256=sha256,
        size=made.stat().st_size,
        plain_files=files,
        plain_bytes=size,
        mksquashfs=version,
        tool_version=__version__,
        interpreter=str(_interpreter_of(env)),
        env=receipt,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    reporter.note(
        f"as a folder, {receipt.recipe} is {files:,} files and {size:,} bytes; "
        f"as an image, one file of {image_receipt.size:,} bytes"
    )
    path = root.images / image_receipt.file
    with new_file(path, size=image_receipt.size, mode=_MODE) as copy, made.open("rb") as source:
        shutil.copyfileobj(source, copy, 1 << 20)
    record = root.image_receipt(receipt.recipe)
    write_atomically(record, image_receipt.model_dump_json(indent=2) + "\n")
    return ImageReport(EnvImage(receipt.recipe, path, image_receipt), time.monotonic() - began)


def _compile_modules(env: Path, python: str) -> None:
    """Compiles all modules of `env`; what doesn't compile, as templates and tests of parsers, is left out.

    The compiled files name their sources by paths relative to the env; Python puts the real ones in their
    place when it loads them.
    """
    library = env / "lib" / f"python{'.'.join(python.split('.')[:2])}"
    sources = sorted(str(path) for path in library.rglob("*.py"))
    parts = [
        sources[start : start + _COMPILED_AT_ONCE] for start in range(0, len(sources), _COMPILED_AT_ONCE)
    ]
    with (
        tempfile.TemporaryDirectory(prefix="compiled-", dir=env.parent) as folder,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        lists = []
        for number, part in enumerate(parts):
            lists.append(Path(folder) / f"{number}.txt")
            lists[-1].write_text("".join(f"{path}\n" for path in part), encoding="utf-8")
        list(pool.map(lambda file: _compile_listed(env, file), lists))


def _compile_listed(env: Path, listed: Path) -> None:
    options = ("-qq", "--invalidation-mode", "unchecked-hash", "-s", env, "-i", listed)
    command: list[str | Path] = [venv_python(env), "-S", "-s", "-m", "compileall", *options]
    # The seed orders the constant sets in the bytecode.
    run(command, env={"PATH": os.defpath, "PYTHONHASHSEED": "0"}, cwd=listed.parent)


def _take_out_what_differs(env: Path, receipt: EnvReceipt) -> None:
    """Takes out of `env` where and when it was made."""
    for name in _ACTIVATION:  # they name the folder; `exec` sets what they set
        (env / "bin" / name).unlink()
    config = env / "pyvenv.cfg"
    config.write_text(re.sub(r"(?m)^command = .*\n", "", config.read_text("utf-8")), "utf-8")
    dated = receipt.model_copy(update={"created_at": _EPOCH})
    (env / ENV_RECEIPT).write_text(dated.model_dump_json(indent=2) + "\n", "utf-8")
    for cache in env.rglob("*.dist-info/uv_cache.json"):  # the time of the wheel's file
        cache.unlink()
        _leave_out_of_record(cache.parent / "RECORD", f"{cache.parent.name}/{cache.name}")
    for path in (env, *env.rglob("*")):
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)


def _leave_out_of_record(record: Path, name: str) -> None:
    with record.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines) if row[0] != name]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    # Written in one step: a hard link to it, as uv's cache has, keeps its bytes.
    write_atomically(record, text.getvalue())


def _interpreter_of(env: Path) -> Path:
    """Where the links of `env` lead out of it."""
    path = venv_python(env)
    while path.is_symlink() and path.is_relative_to(env):
        path = path.parent / path.readlink()
    return path


def _count(env: Path) -> tuple[int, int]:
    """Files (folders among them) and bytes of `env`."""
    statuses = [path.lstat() for path in env.rglob("*")]
    return len(statuses), sum(status.st_size for status in statuses)


def _write_squashfs(mksquashfs: Path, env: Path, image: Path) -> str:
    """Writes `image`; returns the version of mksquashfs."""
    told = run([mksquashfs, "-version"]).output
    version = re.search(r"version (\S+)", told)
    options: Sequence[str] = (
        *("-comp", "zstd", "-Xcompression-level", str(_LEVEL), "-noappend", "-no-progress"),
        *("-all-root", "-no-xattrs", "-no-exports", "-all-time", "0", "-mkfs-time", "0"),
    )
    # SOURCE_DATE_EPOCH would contradict the options.
    done = run([mksquashfs, env, image, *options], env={"PATH": os.defpath})
    if done.returncode != 0:
        raise MismatchError(
            f"{mksquashfs} can't write the image.",
            remedy="Load squashfs-tools 4.4 or newer with zstd, give TMPDIR a disk with room, or install the "
            "env as a folder: envbuilder install RECIPE",
            context={"version": version[1] if version else told, "output": done.output.strip()[-500:]},
        )
    return version[1] if version else "unknown"
