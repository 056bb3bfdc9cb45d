"""`bundle diff`."""

from __future__ import annotations

from pathlib import Path

from envbuilder.bundles import diff_bundles
from envbuilder.model import Bundle
from envbuilder.paths import Root
from tests.bundles.samples import Sample


def test_a_bundle_and_itself_do_not_differ(bundle: Bundle) -> None:
    assert diff_bundles(bundle, bundle) == []


def test_the_python_the_tool_and_the_lock_are_compared(bundle: Bundle, tmp_path: Path) -> None:
    other = Sample(Root(tmp_path / "other"), tables={"leaf": {"license": "MIT"}}).make()
    record = other.record.model_copy(
        update={"python": "3.13", "tool_version": "0.2", "trainer_sha256": None, "recipe_sha256": "1" * 64}
    )
    lines = diff_bundles(bundle, other.model_copy(update={"record": record}))
    assert lines == [
        "Python: 3.12 -> 3.13",
        f"recipe.toml: {bundle.record.recipe_sha256} -> {'1' * 64}",
        f"envbuilder: 0.1 sha256 {record.tool_sha256} -> 0.2 sha256 {record.tool_sha256}",
        f"trainer: {bundle.record.trainer_sha256} -> none",
        "leaf: license: BSD-3-Clause -> MIT",
    ]
