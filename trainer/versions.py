"""Which versions of the kept libraries this trainer is right with. Nothing is imported but their metadata."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from packaging.version import Version

from trainer.errors import VersionMismatch

OLDEST: Mapping[str, tuple[str, str]] = {
    "transformers": ("5.3", "Nemotron-H is native in transformers from there on"),
    "mamba-ssm": ("2.3", "2.2.6 and older import names that transformers 5 removed"),
    "peft": ("0.19.1", "older ones lay out the adapters of routed experts differently"),
}
"""Distribution → its oldest version that is taken, and why."""


def check_versions() -> None:
    """VersionMismatch that names every installed package that is too old, and what to take instead.

    A package that is absent is not looked at here: importing it says so where it is needed.
    """
    found = {name: version for name in OLDEST if (version := _installed(name)) is not None}
    old = {name: version for name, version in found.items() if Version(version) < Version(OLDEST[name][0])}
    if not old:
        return
    wanted = ", ".join(f'"{name}>={OLDEST[name][0]}"' for name in old)
    raise VersionMismatch(
        "The env's packages are too old: "
        + "; ".join(
            f"{name} {version}, wanted is {OLDEST[name][0]} or newer: {OLDEST[name][1]}"
            for name, version in old.items()
        ),
        remedy=f"envbuilder lock recipes/NAME.toml  # with {wanted} in its requirements",
        context=found,
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
