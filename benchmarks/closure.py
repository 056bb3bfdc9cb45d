"""What the benchmarks fetch: synthetic wheels and a synthetic model, of incompressible bytes, made once.

The wheels are valid (METADATA, WHEEL, RECORD with true hashes) and not deflated, so that uv and pip take
them and unpacking costs no more than copying.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from packaging.requirements import Requirement

from envbuilder.lock import Group, LockedFile, LockedModel, LockedModelFile, recipe_digest
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.recipe import ModelSpec, Recipe, TargetSpec
from envbuilder.requirements import tool_requires
from envbuilder.target import python_versions

MIB = 1 << 20
WHEEL_SIZES = (
    700 * MIB,
    500 * MIB,
    300 * MIB,
    200 * MIB,
    *(60 * MIB,) * 4,
    *(8 * MIB,) * 8,
    *(MIB // 4,) * 60,
)
"""Bytes of each wheel's payload: 76 files and 2.0 GB, shaped like a CUDA closure."""
MODEL_SIZES = (*(640 * MIB,) * 4, *(2 * MIB,) * 2, *(64 * 1024,) * 14)
"""Bytes of each file of the model: 20 files and 2.7 GB, a few shards and many small ones."""
NAME = "bench"
PREFIX = "bench_"
VERSION = "999.0"
"""Of each package; those that envbuilder requires are thereby new enough."""
COMMIT = "c0ffee" + "0" * 34
"""The only revision of the model."""


@dataclass(frozen=True)
class Closure:
    """Files on disk, and how each tool is asked for them."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def make_wheels(folder: Path, sizes: tuple[int, ...] = WHEEL_SIZES) -> Closure:
    """Wheels of `sizes` in `folder`, which keeps them from one run to the next, and one for each requirement
    of envbuilder itself: without those its lock would not be whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tool = sorted({Requirement(text).name for text in tool_requires()})
    wheels = [_wheel(folder, f"{PREFIX}{number:02}", size) for number, size in enumerate(sizes)]
    return Closure(folder, (*wheels, *(_wheel(folder, name.replace("-", "_"), 1024) for name in tool)))


def make_model(folder: Path, sizes: tuple[int, ...] = MODEL_SIZES) -> Closure:
    """A model's files in `folder`; hardly a model, but the bytes of one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, size in enumerate(sizes):
        path = folder / (f"model-{number:05}.safetensors" if size > 64 * 1024 else f"part-{number:02}.json")
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as file:
                for chunk in _random(size):
                    file.write(chunk)
        files.append(path)
    return Closure(folder, tuple(files))


def write_requirements(path: Path, closure: Closure) -> None:
    """What `pip download --require-hashes -r` reads."""
    lines = [f"{_project(file)}=={VERSION} --hash=sha256:{sha256(file)}\n" for file in closure.files]
    path.write_text("".join(lines))


def write_recipe(folder: Path, closure: Closure, model: Closure | None = None) -> Path:
    """recipes/bench.toml in `folder`, and its lock in lockfiles/; `model` is one of commit COMMIT."""
    wanted = tuple(_project(file) for file in closure.files if file.name.startswith(PREFIX))
    spec = {NAME: ModelSpec(repo="o/m", revision=COMMIT, remote_code=())} if model else {}
    recipe = Recipe(name=NAME, requirements=wanted, trainer=False, model=spec)
    text = compose_lock(
        recipe,
        digest=recipe_digest(recipe, (), tool_requires(), {}),
        resolver="none",
        entries=[_entry(file) for file in closure.files],
        models=[_locked_model(model)] if model else [],
    )
    for below in ("recipes", "lockfiles"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    (folder / "lockfiles" / f"pylock.{NAME}.toml").write_text(text)
    path = folder / "recipes" / f"{NAME}.toml"
    path.write_text(tomli_w.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True)))
    return path


def _entry(file: Path) -> LockEntry:
    name = _project(file)
    locked = LockedFile(
        package=name,
        version=VERSION,
        filename=file.name,
        size=file.stat().st_size,
        sha256=sha256(file),
        index="default",
        is_sdist=False,
    )
    group: Group = "runtime" if file.name.startswith(PREFIX) else "tool"
    needed = {group: frozenset(python_versions(TargetSpec()))}
    return LockEntry(name, VERSION, needed, (locked,), {"index": "default"})


def _locked_model(model: Closure) -> LockedModel:
    files = tuple(LockedModelFile(path.name, path.stat().st_size, sha256(path)) for path in model.files)
    return LockedModel(NAME, "o/m", COMMIT, license=None, remote_code=(), files=files)


def sha256(path: Path) -> str:
    """Hash of a file, kept beside it: two gigabytes are not read again for each run."""
    kept = path.with_name(f".{path.name}.sha256")
    if not kept.exists():
        with path.open("rb") as file:
            kept.write_text(hashlib.file_digest(file, "sha256").hexdigest())
    return kept.read_text()


def _project(wheel: Path) -> str:
    return wheel.name.partition("-")[0].replace("_", "-")


def _wheel(folder: Path, name: str, size: int) -> Path:
    path = folder / f"{name}-{VERSION}-py3-none-any.whl"
    if path.exists() and path.stat().st_size >= size:
        return path
    info = f"{name}-{VERSION}.dist-info"
    payload, digest = f"{name}/payload.bin", hashlib.sha256()
    small = {
        f"{name}/__init__.py": b"",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(payload, "w", force_zip64=True) as member:
            for chunk in _random(size):
                digest.update(chunk)
                member.write(chunk)
        record = [f"{payload},sha256={_base64(digest.digest())},{size}"]
        for inside, content in small.items():
            archive.writestr(inside, content)
            record.append(f"{inside},sha256={_base64(hashlib.sha256(content).digest())},{len(content)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,", ""]))
    return path


def _random(size: int) -> Iterator[bytes]:
    while size > 0:
        yield os.urandom(min(size, MIB))
        size -= MIB


def _base64(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
