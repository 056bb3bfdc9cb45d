"""What differs between two bundles: the machine they are for, the tool, and their locks."""

from __future__ import annotations

from envbuilder.lock_diff import describe, diff_locks
from envbuilder.model import Bundle


def diff_bundles(old: Bundle, new: Bundle) -> list[str]:
    """A line for each difference; none where both install the same with the same tool."""
    before, after = old.record, new.record
    facts = {
        "Python": (before.python, after.python),
        "recipe.toml": (before.recipe_sha256, after.recipe_sha256),
        "envbuilder": (
            f"{before.tool_version} sha256 {before.tool_sha256}",
            f"{after.tool_version} sha256 {after.tool_sha256}",
        ),
        "trainer": (before.trainer_sha256 or "none", after.trainer_sha256 or "none"),
    }
    lines = [f"{name}: {a} -> {b}" for name, (a, b) in facts.items() if a != b]
    return [*lines, *describe(diff_locks(old.lock, new.lock))]
