"""Recipes and locks for files that a test has made, and fetching them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from packaging.utils import parse_sdist_filename, parse_wheel_filename

from envbuilder.fetch import FetchReport, Origins, fetch_bundle
from envbuilder.index import Index
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet, Reporter

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
NAME = "small"
REPOSITORY = Path(__file__).parent.parent.parent


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_recipe(*, trainer: bool = False) -> Recipe:
    return Recipe(name=NAME, requirements=("anything",), trainer=trainer)


def lock_of(
    files: Iterable[Path],
    groups: Mapping[str, str] | None = None,
    *,
    target: Mapping[str, str] | None = None,
    models: Iterable[Mapping[str, Any]] = (),
) -> str:
    """The text of a lock that names `files`; `groups`: package → its group, where it is not `runtime`.

    `target` and `models` are the tables of those names.
    """
    packages: list[dict[str, Any]] = []
    for path in files:
        entry = {
            "name": path.name,
            "path": f"files/{path.name}",
            "size": path.stat().st_size,
            "hashes": {"sha256": sha256(path)},
        }
        if path.suffix == ".whl":
            name, version = parse_wheel_filename(path.name)[:2]
            source: dict[str, Any] = {"wheels": [entry]}
        else:
            name, version = parse_sdist_filename(path.name)
            source = {"sdist": entry}
        group = (groups or {}).get(name, "runtime")
        packages.append(
            {
                "name": name,
                "version": str(version),
                "marker": f"'{group}' in dependency_groups",
                **source,
                "tool": {"envbuilder": {"index": "default"}},
            }
        )
    return tomli_w.dumps(
        {
            "lock-version": "1.0",
            "created-by": "lab",
            "dependency-groups": ["runtime", "build", "tool"],
            "default-groups": ["runtime"],
            "packages": packages,
            "tool": {
                "envbuilder": {
                    "schema": 2,
                    "recipe-digest": "0" * 64,
                    "target": dict(target or {}),
                    "models": [dict(model) for model in models],
                }
            },
        }
    )


@dataclass(frozen=True)
class Fetcher:
    """Fetches one recipe from one index into one ROOT."""

    root: Root
    index_url: str
    client: httpx.Client
    lock_text: str
    recipe: Recipe = field(default_factory=make_recipe)

    @property
    def lock(self) -> SourceLock:
        return parse_lock(NAME, self.lock_text)

    @property
    def origins(self) -> Origins:
        return Origins(
            indexes={"default": Index("default", self.index_url, self.client)},
            client=self.client,
            hub=None,
            recipe_folder=self.root.path / "inputs",
        )

    @property
    def files(self) -> Path:
        return self.root.bundle(NAME) / "files"

    def fetch(self, *, verify: bool = False, reporter: Reporter | None = None) -> FetchReport:
        return fetch_bundle(
            self.recipe,
            self.lock,
            root=self.root,
            python=PYTHON,
            origins=self.origins,
            reporter=reporter or Quiet(),
            verify=verify,
        )
