"""What a run is made of, as digests: env, config, data, model. The trainer writes them beside its weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from envbuilder.bundle import hash_file, open_bundle
from envbuilder.errors import EnvbuilderError
from envbuilder.lock import LockedModel
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.provided_models import locked_model
from envbuilder.report import Reporter
from envbuilder.train.proof import EnvProof

STAMP_VARIABLE = "ENVBUILDER_STAMP"
"""A JSON object of strings, for the trainer."""
_TIMEOUT_S = 240
_LONGEST_HEADER = 100_000_000
"""Bytes: the most that safetensors itself takes."""


def make_stamp(
    python: tuple[str, ...],
    config: Path,
    overrides: tuple[str, ...],
    *,
    root: Root,
    recipe_name: str,
    proof: EnvProof,
    env: Mapping[str, str],
    reporter: Reporter,
) -> dict[str, str]:
    """The digests of what a run is made of, by name; `env` are the variables for the env's `python`,
    the words that start it.

    `data` and `validation_data` are the sha256 of the whole files. `model` says itself what it is a digest
    of: the lock's hashes where the lock names the model and the sizes are right, else headers and sizes.
    """
    stamp = {
        "env": f"sha256:{proof.digest}",
        "env is of": proof.digest_of,
        "config": f"sha256:{_config_digest(config, overrides)}",
        "config is of": "the config file and the overrides",
    }
    if proof.faults:
        stamp["drift"] = "; ".join(proof.faults)
    files = _files_of(python, config, overrides, env)
    if files is None:
        reporter.warn(
            "the run is not stamped with its model and data: the env's trainer doesn't tell which they are"
        )
        return stamp
    for name in ("data", "validation_data"):
        if (path := files.get(name)) and Path(path).is_file():
            stamp[name] = f"sha256:{hash_file(Path(path))}"
    if files.get("model"):
        stamp["model"], stamp["model is of"] = _model_digest(
            Path(files["model"]), _locked_model(root, recipe_name, Path(files["model"]))
        )
    return stamp


def _config_digest(config: Path, overrides: Iterable[str]) -> str:
    digest = hashlib.sha256(config.read_bytes())
    for override in overrides:
        digest.update(b"\0" + override.encode())
    return digest.hexdigest()


def _files_of(
    python: tuple[str, ...], config: Path, overrides: Iterable[str], env: Mapping[str, str]
) -> dict[str, Any] | None:
    """Where the config's model and data lie, by the trainer; None where it doesn't say."""
    settings = [word for override in overrides for word in ("--set", override)]
    told = run(
        [*python, "-m", "trainer.inspection", config, "--paths", *settings], env=env, timeout_s=_TIMEOUT_S
    )
    with suppress(ValueError, IndexError, KeyError, TypeError):
        files = dict(json.loads(told.output.strip().splitlines()[-1])["config"])
        if {"data", "model"} <= files.keys():
            return files
        if "error" in files:
            return {}  # the trainer itself tells that, with its exit code
    return None


def _locked_model(root: Root, recipe_name: str, folder: Path) -> LockedModel | None:
    """What the bundle's lock names of the model in `folder`; None where it knows none there."""
    with suppress(EnvbuilderError):
        bundle = open_bundle(root, recipe_name)
        return locked_model(folder, bundle.lock.models, bundle.record.provided_models)
    return None


def _model_digest(folder: Path, model: LockedModel | None) -> tuple[str, str]:
    """The digest of the model in `folder`, which may be the locked `model`, and what it is of."""
    digest = hashlib.sha256()
    if model and all(_size(folder / file.name) == file.size for file in model.files):
        for file in model.files:
            digest.update(f"{file.name} {file.size} {file.sha256}\n".encode())
        what = f"names, sizes and locked hashes of {model.origin}; sizes compared, not bytes"
        return f"sha256:{digest.hexdigest()}", what
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + _header(path))
    for path in sorted(folder.glob("*.json")):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}", "headers and sizes of the safetensors files, and the JSON files"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _header(path: Path) -> bytes:
    """The header of a safetensors file: names, shapes and places of its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        return file.read(min(size, _LONGEST_HEADER))
