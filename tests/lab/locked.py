"""Locks of a few files, and the folder of a bundle that holds them; nothing is resolved or fetched."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import parse_sdist_filename, parse_wheel_filename

from envbuilder.lock import FILES, Group, LockedFile, SourceLock, parse_lock
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.recipe import Recipe
from envbuilder.target import python_versions


def lock_files(
    bundle: Path,
    recipe: Recipe,
    files: Mapping[Path, Sequence[Group]],
    tables: Mapping[str, Mapping[str, Any]] | None = None,
) -> SourceLock:
    """The lock of `recipe` that names `files` (path → groups that need it), which are copied into `bundle`.

    `tables`: package → what its `tool.envbuilder` table says beside the index.
    """
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / FILES).mkdir(parents=True)
    entries = []
    for path, groups in files.items():
        shutil.copyfile(path, bundle / FILES / path.name)
        parse = parse_wheel_filename if path.suffix == ".whl" else parse_sdist_filename
        name, version = parse(path.name)[:2]
        file = LockedFile(
            package=name,
            version=str(version),
            filename=path.name,
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            index="default",
            is_sdist=path.suffix != ".whl",
        )
        needed = {group: frozenset(python_versions(recipe.target)) for group in groups}
        table = {"index": "default", **(tables or {}).get(name, {})}
        entries.append(LockEntry(name, str(version), needed, (file,), table))
    return parse_lock(recipe.name, compose_lock(recipe, digest="0" * 64, resolver="none", entries=entries))
