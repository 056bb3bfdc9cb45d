"""A real env of a few small wheels, with receipt and env lock, for checks to look at and tests to damage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from envbuilder.bundle import hash_file
from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.envlock import ENV_LOCK, WheelFile, env_lock_text
from envbuilder.interpreter import inspect_interpreter
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.model import EnvReceipt, Extension, Finding, InstalledPackage, ProvidedPackages
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.site import Site
from envbuilder.venv import install_wheels, make_venv
from tests.lab.packages import make_wheel

LOCK = """
lock-version = "1.0"
created-by = "envbuilder"

[[packages]]
name = "tiny"
version = "1.0"
[[packages.wheels]]
name = "tiny-1.0-py3-none-any.whl"
path = "files/tiny-1.0-py3-none-any.whl"
size = {size}
hashes = {{ sha256 = "{sha}" }}
[packages.tool.envbuilder]
index = "default"

[tool.envbuilder]
schema = 2
recipe-digest = "{digest}"

[tool.envbuilder.target]
python = ">=3.11,<3.14"
machine = "x86_64"
glibc = "2.28"
"""


def torch_version(version: str = "2.11.0+cu130", cuda: str | None = "13.0") -> dict[str, str | bytes]:
    """The files of a torch of this build, as far as they are read."""
    constants = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    return {"torch/__init__.py": "", "torch/version.py": f"from typing import Optional\n\n{constants}"}


def make_lock(*, size: int = 1000, digest: str = "0" * 64) -> SourceLock:
    """A lock of one small wheel; another `digest` makes another lock."""
    return parse_lock("tiny", LOCK.format(size=size, digest=digest, sha="a" * 64))


@dataclass
class TinyEnv:
    """An installed env under a ROOT of its own."""

    root: Root
    folder: Path
    site_packages: Path
    receipt: EnvReceipt
    recipe: Recipe
    lock: SourceLock = field(default_factory=make_lock)

    def change_receipt(self, **fields: object) -> None:
        """Writes the receipt with other values in these fields."""
        self.receipt = self.receipt.model_copy(update=fields)
        (self.folder / "envbuilder.json").write_text(self.receipt.model_dump_json(), encoding="utf-8")

    def install(self, wheel: Path) -> None:
        """Puts one more wheel into the env, as a user's `pip install` would."""
        package = InstalledPackage(
            name=wheel.name.split("-")[0],
            version=wheel.name.split("-")[1],
            wheel=wheel.name,
            sha256=hash_file(wheel),
            origin="bundle",
        )
        files = [WheelFile(package, wheel, wheel.stat().st_size)]
        install_wheels(self.folder, files, scratch=self.root.cache, remedy="none")

    def check(self, check: str) -> Finding:
        """The finding of one check."""
        return run_one(check, root=self.root, recipe=self.recipe, lock=self.lock)


def run_one(
    check: str,
    *,
    root: Root,
    recipe: Recipe | None = None,
    lock: SourceLock | None = None,
    site: Site | None = None,
    config: Path | None = None,
) -> Finding:
    """The finding of one check. A failure that doesn't say what to type fails the test; so does a defect."""
    subject = Subject(recipe, root, lock, site=site, config=config)
    (finding,) = run_checks(subject, Quiet(), choose_checks({check}))
    assert finding.check == check
    assert not finding.summary.startswith("The check itself broke off"), finding.evidence
    assert finding.summary
    assert finding.remedy or finding.verdict in ("ok", "skipped")
    return finding


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


@pytest.fixture
def make_env(root: Root, tmp_path: Path) -> Callable[..., TinyEnv]:
    """Makes an env of the wheels `tiny` 1.0 and `other` 2.0."""

    def make(
        *,
        recipe: Recipe | None = None,
        files: dict[str, str | bytes] | None = None,
        extensions: tuple[Extension, ...] = (),
        compute_capabilities: tuple[str, ...] = (),
        provided: ProvidedPackages | None = None,
    ) -> TinyEnv:
        interpreter = inspect_interpreter(Path(sys.executable))
        folder = root.env("tiny")
        site_packages = make_venv(interpreter, folder, provided)
        store = tmp_path / "wheels"
        store.mkdir()
        wheels = [
            make_wheel(store, "tiny", "1.0", files={"tiny.py": "x = 1\n", **(files or {})}),
            make_wheel(store, "other", "2.0"),
        ]
        packages = [
            InstalledPackage(
                name=wheel.name.split("-")[0],
                version=wheel.name.split("-")[1],
                wheel=wheel.name,
                sha256=hash_file(wheel),
                origin="bundle",
            )
            for wheel in wheels
        ]
        there = [
            WheelFile(package, path, path.stat().st_size)
            for package, path in zip(packages, wheels, strict=True)
        ]
        install_wheels(folder, there, scratch=root.cache, remedy="none")
        (folder / ENV_LOCK).write_text(env_lock_text(there, folder), encoding="utf-8")
        lock = make_lock()
        receipt = EnvReceipt(
            recipe="tiny",
            lock_sha256=lock.digest,
            python=interpreter.version,
            compute_capabilities=compute_capabilities,
            packages=tuple(packages),
            extensions=extensions,
            provided=provided,
            created_at="2026-01-01T00:00:00+00:00",
        )
        env = TinyEnv(
            root, folder, site_packages, receipt, recipe or Recipe(name="tiny", requirements=("tiny",)), lock
        )
        env.change_receipt()
        return env

    return make


@pytest.fixture
def env(make_env: Callable[..., TinyEnv]) -> TinyEnv:
    return make_env()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the PATH one folder that holds these shell scripts, by name, and nothing else."""

    def only(**scripts: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, body in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\nPATH={os.defpath}\n{body}\n", encoding="utf-8")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return only


def cuda_recipe(
    *modules: str, capability: str = "9.0", detect: bool = False, toolchain: str = "packages"
) -> Recipe:
    """A recipe that compiles the extension `modules` from the package `tiny`."""
    packages = ["nvcc"] if toolchain == "packages" else []
    return Recipe.model_validate(
        {
            "name": "tiny",
            "requirements": ["tiny"],
            "cuda": {
                "compute-capabilities": [capability],
                "detect": detect,
                "toolchain": toolchain,
                "toolchain-requirements": packages,
            },
            "build": {"tiny": {"modules": list(modules)}},
        }
    )


def nvidia_smi(gpu: str = "NVIDIA H200, 9.0", *, cuda: str = "13.0", mode: str = "Default") -> str:
    """A shell script that answers as nvidia-smi does on a machine with one `gpu` ("NAME, CAPABILITY")."""
    return (
        f'case "$1" in --query*) echo "0, {gpu}, 580.65.06, 143771, {mode}";; '
        f'*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: {cuda} |";; esac'
    )
