"""What a job's time limit is chosen from."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.compile.estimate import estimated_work
from envbuilder.compile.units.records import Records, UnitId
from envbuilder.model import UnitTiming
from envbuilder.paths import Root
from envbuilder.wheelhouse import store_built
from tests.compile.test_provenance import RECEIPT


def unit(source: str) -> UnitTiming:
    return RECEIPT.units[0].model_copy(update={"source": source, "shard": ""})


@pytest.mark.parametrize(("cpus", "expected"), [(1, 60 + 400), (2, 60 + 300), (16, 60 + 300)])
def test_it_is_the_work_over_the_cpus_or_the_longest_unit(tmp_path: Path, cpus: int, expected: float) -> None:
    root = Root(tmp_path)
    wheel = tmp_path / RECEIPT.wheel
    wheel.write_bytes(b"wheel")
    receipt = RECEIPT.model_copy(update={"units": (unit("a.cu"), unit("b.cu"))})
    store_built(root, wheel, receipt)
    records = Records.open(root.cache / "records")
    for source, seconds in (("a.cu", 300.0), ("b.cu", 100.0)):
        one = receipt.units[0]
        named = UnitId(receipt.package, source, "", one.architectures_kept, one.compiler)
        records.add(named, seconds, seconds, 1)
    estimate = estimated_work(root, [receipt.package], cpus=cpus)
    assert estimate is not None
    assert estimate.seconds == expected
    assert estimate.memory >= 1


def test_of_a_package_that_was_never_built_nothing_is_known(tmp_path: Path) -> None:
    assert estimated_work(Root(tmp_path), ["unknown"], cpus=4) is None
