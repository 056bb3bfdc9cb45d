"""Where everything lies under ROOT: the one owner of folder names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Root:
    """The tool's folder on the cluster's shared disk."""

    path: Path

    @classmethod
    def resolve(cls, given: Path | None) -> Root:
        """`given` (`--root`), else $ENVBUILDER_ROOT, else .envbuilder in the current folder."""
        return cls((given or Path(os.environ.get("ENVBUILDER_ROOT") or ".envbuilder")).absolute())

    @property
    def store(self) -> Path:
        """Downloaded files by content: `store/<sha256>`, hard-linked into bundles."""
        return self.path / "store"

    @property
    def cache(self) -> Path:
        """What may be deleted at any time."""
        return self.path / "cache"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def wheelhouse(self) -> Path:
        return self.path / "wheelhouse"

    def bundle(self, name: str) -> Path:
        return self.path / "bundles" / name

    def env(self, name: str) -> Path:
        return self.path / "envs" / name

    def run(self, name: str) -> Path:
        return self.path / "runs" / name
