"""Whether the bundled trainer trains with the versions of an env: known on a login node, before a job waits.

The bounds are data, in trainer_versions.toml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.errors import MismatchError
from envbuilder.model import EnvReceipt
from envbuilder.toml import tomllib


@dataclass(frozen=True)
class Oldest:
    """The oldest version of a package that the trainer takes."""

    package: str
    version: str
    reason: str


def oldest_versions() -> tuple[Oldest, ...]:
    """The bounds."""
    return tuple(Oldest(**entry) for entry in _table()["oldest"])


def check_trains(receipt: EnvReceipt) -> None:
    """MismatchError where the env of `receipt` holds versions that the trainer does not train with."""
    versions: dict[str, str] = dict(receipt.provided.versions) if receipt.provided else {}
    versions.update((canonicalize_name(package.name), package.version) for package in receipt.packages)
    old = [
        (found, bound)
        for bound in oldest_versions()
        if (found := versions.get(bound.package)) and Version(found) < Version(bound.version)
    ]
    if not old:
        return
    named = ", ".join(f"{bound.package} {found}" for found, bound in old)
    raise MismatchError(
        f"The trainer does not train with {named}, which the env {receipt.recipe} holds.",
        remedy=_remedy(receipt, [bound for _, bound in old], for_nemotron="mamba-ssm" in versions),
        context={
            bound.package: f"{found}; wanted is {bound.version} or newer: {bound.reason}"
            for found, bound in old
        },
    )


def _remedy(receipt: EnvReceipt, bounds: Sequence[Oldest], *, for_nemotron: bool) -> str:
    shipped = _table()["instead"]
    instead = next((shipped[each] for each in receipt.compute_capabilities if each in shipped), None)
    if for_nemotron and instead not in (None, receipt.recipe):
        return (
            "Take the recipe of the same model and GPUs that it trains with: "
            f"envbuilder fetch recipes/{instead}.toml"
        )
    own = f"recipes/{receipt.recipe}.toml"
    wanted = ", ".join(f'"{bound.package}>={bound.version}"' for bound in bounds)
    return f"Write {wanted} into requirements of {own}; then: envbuilder lock {own}"


@cache
def _table() -> Mapping[str, Any]:
    text = files("envbuilder").joinpath("trainer_versions.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
