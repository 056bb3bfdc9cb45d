"""How long a compile will take, from what earlier ones took: for the time limit of a job."""

from __future__ import annotations

from collections.abc import Sequence

from envbuilder.compile.units.records import Estimate, Records, UnitId
from envbuilder.model import BuildReceipt
from envbuilder.paths import Root
from envbuilder.wheelhouse import all_built

_AROUND = 60.0
"""Seconds for the build environment, linking and the env's installation."""


def estimated_work(root: Root, packages: Sequence[str], *, cpus: int) -> Estimate | None:
    """Wall seconds of compiling all of `packages` on `cpus` CPUs with nothing cached, and the memory of the
    largest unit; None where one of them was never built under `root`."""
    newest: dict[str, BuildReceipt] = {}
    for built in all_built(root):
        before = newest.get(built.receipt.package)
        if before is None or before.built_at < built.receipt.built_at:
            newest[built.receipt.package] = built.receipt
    if not packages or not set(packages) <= newest.keys():
        return None
    records = Records.open(root.cache / "records")
    units = [
        records.estimate(UnitId(package, unit.source, unit.shard, unit.architectures_kept, unit.compiler), 0)
        for package in packages
        for unit in newest[package].units
    ]
    seconds = [unit.seconds for unit in units]
    return Estimate(
        seconds=_AROUND + max(sum(seconds) / cpus, max(seconds, default=0.0)),
        memory=max((unit.memory for unit in units), default=0),
        known=all(unit.known for unit in units),
    )
