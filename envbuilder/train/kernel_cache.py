"""Compiled kernels (Triton's, Inductor's): used from the node's own disk, kept under ROOT between jobs.

A shared disk is slow for these many small files, and all nodes would write them at once; but a cold first
step takes minutes, so they must outlive the job. Each node begins with a copy of ROOT's; after the first step
and at the end, what is new on the first node is put back. Entries are named by what they were compiled from
and never change, so nothing is ever overwritten. Triton's lists of files hold absolute paths, which are put
right for where the copy lies: another user's kernels (`envbuilder use`) lay elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.node_folder import node_folder, private_node_folder
from envbuilder.paths import Root
from envbuilder.report import Reporter

_GROUP = "__grp__"
"""What the names of Triton's lists of an entry's files begin with."""


@dataclass(frozen=True)
class KernelCache:
    """The cache of one recipe."""

    local: Path
    """On this node. The same as `kept` where the node has no folder for it."""
    kept: Path
    """Under ROOT."""

    @property
    def variables(self) -> dict[str, str]:
        """What makes Triton and Inductor use the local copy."""
        return {
            "TRITON_CACHE_DIR": str(self.local / "triton"),
            # Which configuration was the fastest is kept too: all jobs of a run take the same, and none
            # tries again.
            "TRITON_CACHE_AUTOTUNING": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.local / "inductor"),
        }

    def seed(self) -> None:
        """Brings what ROOT has and this node has not."""
        _copy_new(self.kept, self.local)

    def save(self) -> None:
        """Brings what this node has and ROOT has not; where it can't, the next job compiles again."""
        _copy_new(self.local, self.kept)


def kernel_cache(root: Root, recipe_name: str, reporter: Reporter) -> KernelCache:
    """The recipe's cache on this node."""
    kept = root.kernels(recipe_name)
    mine = private_node_folder()
    if mine is None:
        reporter.warn(f"{node_folder()} is no private folder of yours: compiled kernels are used from {kept}")
        return KernelCache(kept, kept)
    return KernelCache(mine / "kernels" / recipe_name, kept)


def _copy_new(source: Path, target: Path) -> None:
    """Copies the files of `source` that `target` has not, each whole or not at all."""
    if source == target:
        return
    for path in _finished(source):
        there = target / path.relative_to(source)
        with suppress(OSError):
            if not there.exists():
                there.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, there)


def _copy(path: Path, there: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".copy.", dir=there.parent)
    made = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as target, path.open("rb") as source:
            if path.name.startswith(_GROUP):
                target.write(_group_in(there.parent, source.read()))
            else:
                shutil.copyfileobj(source, target)
        made.chmod(path.stat().st_mode & 0o777)
        made.rename(there)
    except BaseException:
        made.unlink()
        raise


def _group_in(folder: Path, group: bytes) -> bytes:
    """Triton's list of an entry's files, for an entry that lies in `folder`: on the node, or under the user,
    that made it, it lay elsewhere."""
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        paths = json.loads(group)["child_paths"]
        here = {name: str(folder / Path(path).name) for name, path in paths.items()}
        return json.dumps({"child_paths": here}).encode()
    return group


def _finished(top: Path) -> Iterator[Path]:
    """The files below `top`, those that list others last: Triton's groups name the files of an entry."""
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(top)
        # Triton writes in a folder tmp.pid_…, Inductor and this module into hidden files.
        if "tmp.pid" not in folder
        for name in names
        if not name.startswith(".") and not name.endswith((".tmp", ".lock"))
    ]
    return iter(sorted(files, key=lambda path: path.name.startswith(_GROUP)))
