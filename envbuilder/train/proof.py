"""The env before it trains: what is installed against the receipt, without reading all of its gigabytes.

Every start compares the list of distributions with the receipt, and each file that a RECORD lists with the
size that it names. A file changed after `install` wrote the receipt is hashed, others are not read. So an
edit that keeps a file's size and sets its time back is not seen; `doctor --only env.records` hashes all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from packaging.utils import canonicalize_name

from envbuilder.distributions import (
    Distribution,
    RecordedFile,
    differences,
    has_changed,
    owned_paths,
    provided_differences,
    read_distributions,
    recorded_files,
    runs_at_start,
)
from envbuilder.env_image import EnvImage
from envbuilder.errors import MismatchError
from envbuilder.model import ENV_RECEIPT, EnvReceipt
from envbuilder.venv import PROVIDED_PTH

_THREADS = 16
"""A shared disk answers many at once, one at a time it is slow."""
_CHUNK = 512
_NAMED = 8


@dataclass(frozen=True)
class EnvProof:
    """What an env is, and how it differs from its receipt."""

    digest: str
    digest_of: str
    """What `digest` is the sha256 of."""
    files: int
    hashed: int
    """Of `files`: those that changed after the receipt was written."""
    seconds: float
    faults: tuple[str, ...]
    """Each begins with the name of the package; empty where all is as it was installed."""


def prove_env(env: Path, receipt: EnvReceipt) -> EnvProof:
    """Compares the env in the folder `env` with `receipt`, its receipt."""
    began = time.monotonic()
    minor = ".".join(receipt.python.split(".")[:2])
    site_packages = (env / "lib" / f"python{minor}" / "site-packages",)
    found = read_distributions(site_packages)
    wanted = {canonicalize_name(package.name): package.version for package in receipt.packages}
    faults = [*differences(wanted, found), *provided_differences(receipt.provided, site_packages)]
    files: list[tuple[str, RecordedFile]] = []
    for distribution in found:
        try:
            files += [(distribution.name, file) for file in recorded_files(distribution)]
        except (OSError, ValueError):
            faults.append(f"{distribution.name}: {distribution.folder / 'RECORD'} is missing or damaged")
    written = (env / ENV_RECEIPT).stat().st_mtime_ns
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(pool.map(lambda chunk: _look(chunk, written), chunks))
    faults += chain.from_iterable(chunk_faults for chunk_faults, _ in looked)
    faults += _strays(found, site_packages, provided=receipt.provided is not None)
    return EnvProof(
        _digest(receipt, found),
        "the wheels' sha256 in the receipt and every installed RECORD",
        len(files),
        sum(hashed for _, hashed in looked),
        time.monotonic() - began,
        tuple(faults),
    )


def image_proof(image: EnvImage) -> EnvProof:
    """Of an env that is an image: its digest says all, and is compared with its bytes before it is used."""
    return EnvProof(image.receipt.sha256, "the image", image.receipt.plain_files, 0, 0.0, ())


def drifted(env: Path, recipe_name: str, proof: EnvProof) -> MismatchError:
    """The error of an env that does not match its receipt."""
    packages = list(dict.fromkeys(fault.split()[0].rstrip(":") for fault in proof.faults))
    more = f" and {len(packages) - _NAMED} more" if len(packages) > _NAMED else ""
    return MismatchError(
        f"The env {env.name} is not as it was installed: {', '.join(packages[:_NAMED])}{more}.",
        remedy=f"envbuilder install recipes/{recipe_name}.toml --reinstall  # or train with --allow-drift",
        context={
            "env": env,
            "differences": "\n" + "\n".join(proof.faults[: 2 * _NAMED]),
        },
    )


def _look(files: Sequence[tuple[str, RecordedFile]], written: int) -> tuple[list[str], int]:
    """What is wrong with `files`, and how many had to be hashed."""
    faults, hashed = [], 0
    for package, file in files:
        try:
            status = file.path.stat()
            changed = file.size is not None and status.st_size != file.size
            if not changed and status.st_mtime_ns > written:
                hashed += 1
                changed = has_changed(file)
        except FileNotFoundError:
            faults.append(f"{package}: {file.path} is missing")
        except OSError as error:
            faults.append(f"{package}: {file.path} can't be read: {error.strerror}")
        else:
            faults += [f"{package}: {file.path} has other bytes"] if changed else []
    return faults, hashed


def _strays(
    found: Sequence[Distribution], site_packages: tuple[Path, ...], *, provided: bool
) -> Iterator[str]:
    """Files that no package brought and that Python runs at every start."""
    at_start = [
        path for folder in site_packages for path in folder.glob("*") if runs_at_start(path, site_packages)
    ]
    if at_start:
        owned = set(chain.from_iterable(owned_paths(distribution) for distribution in found))
        for path in at_start:
            if str(path) not in owned and not (provided and path.name == PROVIDED_PTH):
                yield f"{path.name} is no package's, and runs at every start of Python ({path})"


def _digest(receipt: EnvReceipt, found: Sequence[Distribution]) -> str:
    digest = hashlib.sha256()
    for package in sorted(receipt.packages, key=lambda package: package.name):
        digest.update(f"{package.name} {package.version} {package.sha256}\n".encode())
    for distribution in sorted(found, key=lambda one: (one.name, one.version)):
        record = distribution.folder / "RECORD"
        content = record.read_bytes() if record.is_file() else b""
        sha256 = hashlib.sha256(content).hexdigest()
        digest.update(f"{distribution.name} {distribution.version} {sha256}\n".encode())
    return digest.hexdigest()
