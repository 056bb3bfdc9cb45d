"""Whole bundles with a file of every kind, as `fetch` leaves them, made without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from envbuilder.bundle import open_bundle
from envbuilder.lock import Group, LockedModel, LockedModelFile, lock_filename
from envbuilder.lock_text import LockEntry, compose_lock
from envbuilder.model import Bundle, BundleRecord
from envbuilder.paths import Root
from envbuilder.recipe import Exclusion, Recipe
from tests.lab.bundles import lock_entry, locked_file
from tests.lab.packages import make_sdist, make_wheel

NAME = "sample"
PYTHON = "3.12"
PATCH = b"--- a/native.py\n+++ b/native.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n"
GIT_COMMIT, SUBMODULE_COMMIT, MODEL_COMMIT = "a" * 40, "b" * 40, "c" * 40
LONG_NAME = f"{'deep/' * 30}weights ü.safetensors"
"""Of a file of the model: longer than a ustar header's name, and not ASCII."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Sample:
    """What goes into a bundle; a test changes one thing before `make`."""

    root: Root
    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            name=NAME,
            requirements=("top[fast]", "native"),
            exclude=(Exclusion(package="unused", reason="only its tests import it"),),
        )
    )
    model_files: dict[str, bytes] = field(
        default_factory=lambda: {
            "config.json": b"{}\n",
            "modeling.py": b"pass\n",
            LONG_NAME: bytes(range(256)) * 5000,
            "empty.txt": b"",
        }
    )
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Package → what its table in the lock has besides the usual."""

    def make(self) -> Bundle:
        folder = self.root.bundle(self.recipe.name)
        for part in ("files", "tool", "patches"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "patches/native.patch").write_bytes(PATCH)
        model = self._model(folder)
        tool = make_wheel(folder / "tool", "envbuilder", "0.1", requires=["helper"])
        trainer = make_wheel(folder / "tool", "envbuilder-trainer", "0.1", requires=["top"])
        lock = compose_lock(
            self.recipe,
            digest="0" * 64,
            resolver="none",
            entries=self._entries(folder / "files"),
            models=[model],
        )
        recipe = tomli_w.dumps(self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
        texts = {"recipe.toml": recipe, "start.py": "print('start')\n", lock_filename(self.recipe.name): lock}
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        record = BundleRecord(
            recipe=self.recipe.name,
            python=PYTHON,
            lock_sha256=sha256(lock.encode()),
            recipe_sha256=sha256(recipe.encode()),
            start_sha256=sha256(texts["start.py"].encode()),
            tool_version="0.1",
            tool_wheel=tool.name,
            tool_sha256=sha256(tool.read_bytes()),
            tool_files=("helper-1.0-py3-none-any.whl",),
            trainer_wheel=trainer.name,
            trainer_sha256=sha256(trainer.read_bytes()),
        )
        (folder / "bundle.json").write_text(record.model_dump_json(indent=2) + "\n")
        return open_bundle(self.root, self.recipe.name)

    def _entries(self, folder: Path) -> list[LockEntry]:
        patch = {"path": "patches/native.patch", "size": len(PATCH), "sha256": sha256(PATCH)}
        git = {"commit": GIT_COMMIT, "submodules": {"third_party/lib": SUBMODULE_COMMIT}}
        fast = ["leaf", "quick; extra == 'fast'", "absent; sys_platform == 'win32'", "leaf (bad requirement"]
        return [
            self._entry(
                make_wheel(folder, "top", "2.0", requires=fast), "runtime", {"license": "MIT OR Apache-2.0"}
            ),
            self._entry(make_wheel(folder, "leaf", "1.0"), "runtime", {"license": "BSD-3-Clause"}),
            self._entry(make_wheel(folder, "quick", "1.0"), "runtime", {"license": "A licence of our own"}),
            self._entry(
                make_sdist(folder, "native", "1.5"),
                "runtime",
                {"requires": ["leaf>=1"], "build-requires": ["compiler"], "patches": [patch]},
            ),
            self._entry(make_sdist(folder, "from-git", "0.3"), "runtime", {"git": git, "requires": []}),
            self._entry(make_wheel(folder, "compiler", "13.0"), "build", {}),
            self._entry(make_wheel(folder, "helper", "1.0"), "tool", {}),
        ]

    def _entry(self, path: Path, group: Group, table: Mapping[str, Any]) -> LockEntry:
        file = locked_file(path, None if "git" in table else "default")
        return lock_entry(self.recipe, file, [group], {**table, **self.tables.get(file.package, {})})

    def _model(self, folder: Path) -> LockedModel:
        for name, content in self.model_files.items():
            path = folder / "models" / "tiny" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return LockedModel(
            name="tiny",
            repo="owner/tiny-model",
            commit=MODEL_COMMIT,
            license="apache-2.0",
            remote_code=("modeling.py",),
            files=tuple(
                LockedModelFile(name, len(content), sha256(content))
                for name, content in self.model_files.items()
            ),
        )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
