"""Bundles of a few files, made without an index: what `fetch` would leave on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.utils import parse_sdist_filename, parse_wheel_filename

from envbuilder.bundle import RECORD, open_bundle
from envbuilder.lock import Group, LockedFile, lock_filename
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.model import Bundle, BundleRecord
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.target import python_versions


def make_bundle(
    root: Root,
    recipe: Recipe,
    files: Mapping[Path, Sequence[Group]],
    *,
    python: str,
    trainer_wheel: Path | None = None,
    build_requires: Mapping[str, Sequence[str]] | None = None,
) -> Bundle:
    """The bundle of `recipe` with `files` (path → the lock's groups that need it), opened.

    `build_requires` (package → requirements) goes into the lock's table of an sdist.
    """
    folder = root.bundle(recipe.name)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    (folder / "tool").mkdir()
    entries = []
    for path, groups in files.items():
        _place(path, folder / "files" / path.name)
        name, version = (
            parse_wheel_filename(path.name)[:2] if path.suffix == ".whl" else parse_sdist_filename(path.name)
        )
        entries.append(
            LockEntry(
                name=name,
                version=str(version),
                needed={group: frozenset(python_versions(recipe.target)) for group in groups},
                files=(
                    LockedFile(
                        package=name,
                        version=str(version),
                        filename=path.name,
                        size=path.stat().st_size,
                        sha256=_sha256(path),
                        index="default",
                        is_sdist=path.suffix != ".whl",
                    ),
                ),
                table={"index": "default", "build-requires": list((build_requires or {}).get(name, ()))},
            )
        )
    text = compose_lock(recipe, digest="0" * 64, resolver="none", entries=entries)
    (folder / lock_filename(recipe.name)).write_text(text, encoding="utf-8")
    if trainer_wheel is not None:
        _place(trainer_wheel, folder / "tool" / trainer_wheel.name)
    record = BundleRecord(
        recipe=recipe.name,
        python=python,
        lock_sha256=hashlib.sha256(text.encode()).hexdigest(),
        recipe_sha256="0" * 64,
        start_sha256="0" * 64,
        tool_version="0",
        tool_wheel="envbuilder-0-py3-none-any.whl",
        tool_sha256="0" * 64,
        tool_files=(),
        trainer_wheel=trainer_wheel.name if trainer_wheel else None,
        trainer_sha256=_sha256(trainer_wheel) if trainer_wheel else None,
    )
    (folder / RECORD).write_text(record.model_dump_json(), encoding="utf-8")
    return open_bundle(root, recipe.name)


def _place(source: Path, place: Path) -> None:
    """A hard link where it can be: the toolchain's wheels are large."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
