"""Where everything lies under ROOT: the one owner of folder names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
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

    @property
    def images(self) -> Path:
        """Envs as one file each, with a receipt beside it."""
        return self.path / "images"

    def image_receipt(self, name: str) -> Path:
        """That of the image of the recipe `name`: what there is without it is no env."""
        return self.images / f"{name}.json"

    def bundle(self, name: str) -> Path:
        return self.path / "bundles" / name

    def env(self, name: str) -> Path:
        return self.path / "envs" / name

    def kernels(self, name: str) -> Path:
        """What Triton and Inductor compiled for the recipe `name`."""
        return self.cache / "kernels" / name

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def sweep(self, name: str) -> Path:
        """What the sweep `name` is made of."""
        return self.path / "sweeps" / f"{name}.json"
