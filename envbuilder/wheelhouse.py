"""The wheelhouse: built wheels, one folder for each ABI key, each with the receipt of how it was made.

A folder without a receipt is an unfinished one. The receipt is written last and names the wheel's sha256.
Between them comes, for those who ask where a wheel is from, its provenance.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from packaging.version import Version

from envbuilder.atomic import new_file, write_atomically
from envbuilder.bundle import hash_file
from envbuilder.errors import IntegrityError
from envbuilder.model import BuildReceipt, BuiltWheel, read_record
from envbuilder.paths import Root

RECEIPT = "receipt.json"
PROVENANCE = "provenance.json"
"""An in-toto statement (`compile/wheels/provenance.py`)."""
_ANY: Mapping[str, str] = MappingProxyType({})


def store_built(
    root: Root, wheel: Path, receipt: BuildReceipt, *, provenance: bytes | None = None
) -> BuiltWheel:
    """Puts `wheel`, its `provenance` and then its `receipt` into the wheelhouse."""
    folder = root.wheelhouse / receipt.key
    with new_file(folder / receipt.wheel, size=wheel.stat().st_size) as file, wheel.open("rb") as source:
        shutil.copyfileobj(source, file)
    if provenance is not None:
        write_atomically(folder / PROVENANCE, provenance)
    else:
        (folder / PROVENANCE).unlink(missing_ok=True)  # an earlier build's
    write_atomically(folder / RECEIPT, receipt.model_dump_json(indent=2) + "\n")
    return BuiltWheel(path=folder / receipt.wheel, receipt=receipt)


def read_built(root: Root, key: str) -> BuiltWheel | None:
    """What was built under `key`, if its receipt is whole and the wheel has the receipt's bytes."""
    built = _read(root.wheelhouse / key / RECEIPT)
    if built is None or hash_file(built.path) != built.receipt.wheel_sha256:
        return None
    return built


def find_built(
    root: Root,
    *,
    sdist_sha256: str,
    python: str,
    torch: str | None,
    compute_capabilities: Sequence[str],
    environment: Mapping[str, str] = _ANY,
    patches: Sequence[str] = (),
) -> BuiltWheel | None:
    """The newest wheel that was built from this sdist, for this Python ("3.12"), torch and GPUs.

    `torch` may lack its local version ("+cu130"). `environment` are the recipe's variables for the build,
    `patches` the sha256 of each patch, in the order in which they are applied. The wheel's bytes are not
    read: whoever uses it checks its hash.
    """
    fitting = [
        built
        for built in all_built(root)
        if built.receipt.sdist_sha256 == sdist_sha256
        and built.receipt.python.startswith(f"{python}.")
        and _same_torch(built.receipt.torch, torch)
        and set(built.receipt.compute_capabilities) == set(compute_capabilities)
        and tuple(built.receipt.patches.values()) == tuple(patches)
        and environment.items() <= built.receipt.environment.items()
    ]
    return max(fitting, key=lambda built: built.receipt.built_at, default=None)


def all_built(root: Root) -> Iterator[BuiltWheel]:
    """Every finished wheel of the wheelhouse. Their bytes are not read."""
    for path in sorted(root.wheelhouse.glob(f"*/{RECEIPT}")):
        if (built := _read(path)) is not None:
            yield built


def _read(path: Path) -> BuiltWheel | None:
    """None where the receipt is missing or damaged: then the wheel is as good as not built."""
    try:
        receipt = read_record(path, BuildReceipt, remedy="")
    except IntegrityError:
        return None
    wheel = path.parent / receipt.wheel
    return BuiltWheel(path=wheel, receipt=receipt) if wheel.is_file() else None


def _same_torch(built: str | None, wanted: str | None) -> bool:
    if built is None or wanted is None:
        return built is wanted
    one, other = Version(built), Version(wanted)
    return one.public == other.public and (one.local == other.local or None in (one.local, other.local))
