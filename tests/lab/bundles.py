"""Locks and bundles of a few files, made without an index: what `lock` and `fetch` would leave on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import parse_sdist_filename, parse_wheel_filename

from envbuilder.bundle import RECORD, TOOL, hash_file, open_bundle
from envbuilder.lock import FILES, Group, LockedFile, SourceLock, lock_filename, parse_lock
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.model import Bundle, BundleRecord
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.target import python_versions

Tables = Mapping[str, Mapping[str, Any]]
"""Package → what its `tool.envbuilder` table in the lock says beside the index."""


def locked_file(path: Path, index: str | None = "default") -> LockedFile:
    """The file at `path` as a lock names it."""
    is_sdist = path.suffix != ".whl"
    name, version = parse_sdist_filename(path.name) if is_sdist else parse_wheel_filename(path.name)[:2]
    return LockedFile(
        package=name,
        version=str(version),
        filename=path.name,
        size=path.stat().st_size,
        sha256=hash_file(path),
        index=index,
        is_sdist=is_sdist,
    )


def lock_entry(
    recipe: Recipe, file: LockedFile, groups: Sequence[Group], table: Mapping[str, Any]
) -> LockEntry:
    """A package of one file that `groups` need on each Python; `table` is what is said beside its index."""
    pythons = frozenset(python_versions(recipe.target))
    whole = {**({"index": file.index} if file.index else {}), **table}
    return LockEntry(file.package, file.version, dict.fromkeys(groups, pythons), (file,), whole)


def lock_files(
    bundle: Path, recipe: Recipe, files: Mapping[Path, Sequence[Group]], tables: Tables | None = None
) -> SourceLock:
    """The lock of `recipe` that names `files` (path → the groups that need it), which alone are then in the
    new folder `bundle`."""
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / FILES).mkdir(parents=True)
    entries = []
    for path, groups in files.items():
        _place(path, bundle / FILES / path.name)
        file = locked_file(path)
        entries.append(lock_entry(recipe, file, groups, (tables or {}).get(file.package, {})))
    return parse_lock(recipe.name, compose_lock(recipe, digest="0" * 64, resolver="none", entries=entries))


def make_bundle(
    root: Root,
    recipe: Recipe,
    files: Mapping[Path, Sequence[Group]],
    *,
    python: str,
    trainer_wheel: Path | None = None,
    tables: Tables | None = None,
) -> Bundle:
    """The bundle of `recipe` with `files` (path → the lock's groups that need it), opened."""
    folder = root.bundle(recipe.name)
    lock = lock_files(folder, recipe, files, tables)
    (folder / lock_filename(recipe.name)).write_text(lock.text, encoding="utf-8")
    if trainer_wheel is not None:
        (folder / TOOL).mkdir()
        _place(trainer_wheel, folder / TOOL / trainer_wheel.name)
    record = BundleRecord(
        recipe=recipe.name,
        python=python,
        lock_sha256=hashlib.sha256(lock.text.encode()).hexdigest(),
        recipe_sha256="0" * 64,
        start_sha256="0" * 64,
        tool_version="0",
        tool_wheel="envbuilder-0-py3-none-any.whl",
        tool_sha256="0" * 64,
        tool_files=(),
        trainer_wheel=trainer_wheel.name if trainer_wheel else None,
        trainer_sha256=hash_file(trainer_wheel) if trainer_wheel else None,
    )
    (folder / RECORD).write_text(record.model_dump_json(), encoding="utf-8")
    return open_bundle(root, recipe.name)


def _place(source: Path, place: Path) -> None:
    """A hard link where it can be: the toolchain's wheels are large."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
