"""Recipes and locks for files that a test has made, and running a fetch of them in a process of its own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import httpx
import tomli_w
from packaging.utils import parse_sdist_filename, parse_wheel_filename

from envbuilder.atomic import write_atomically
from envbuilder.errors import EnvbuilderError
from envbuilder.fetch import FetchReport, Origins, fetch_bundle
from envbuilder.index import Index
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.report import Quiet, Reporter
from tests.lab.index_server import loopback_client

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

    def prepare(self) -> tuple[Path, str]:
        """Writes the inputs for `main` and returns its arguments."""
        inputs = self.root.path / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        # Atomically: another process of this test may be reading them.
        recipe = self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        write_atomically(inputs / "recipe.toml", tomli_w.dumps(recipe))
        write_atomically(inputs / f"pylock.{NAME}.toml", self.lock_text)
        return self.root.path, self.index_url

    def start(self, *, largest_file: int | None = None) -> ForkServerProcess:
        """The same fetch in a process of its own; `largest_file` is its RLIMIT_FSIZE, in bytes."""
        process = PROCESSES.Process(target=main, args=(*self.prepare(), largest_file))
        process.start()
        return process

    def outcome(self) -> dict[str, Any]:
        """What the fetch in another process ended with: its error, or its report."""
        outcome: dict[str, Any] = json.loads((self.root.path / "inputs" / "outcome.json").read_text())
        return outcome


# Forked from a process that has imported everything: a test can start, and kill, dozens of them.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", __name__])


def main(root: Path, index_url: str, largest_file: int | None = None) -> NoReturn:
    """Fetches, writes `outcome.json`, and exits as envbuilder does."""
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    inputs = root / "inputs"
    exit_code = 0
    with loopback_client() as client:
        text = (inputs / f"pylock.{NAME}.toml").read_text()
        fetcher = Fetcher(Root(root), index_url, client, text, load_recipe(inputs / "recipe.toml"))
        try:
            outcome: dict[str, object] = {"transferred_files": fetcher.fetch().transferred_files}
        except EnvbuilderError as error:
            outcome, exit_code = error.to_json(), error.exit_code
    (inputs / "outcome.json").write_text(json.dumps(outcome))
    sys.exit(exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
