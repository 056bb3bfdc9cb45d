"""What an older lock holds, so that a new one keeps it: a version moves only where it must, or is told to."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.utils import canonicalize_name

from envbuilder.errors import InputError, MismatchError
from envbuilder.lock import GROUPS, Group, SourceLock, lock_filename
from envbuilder.recipe import TargetSpec
from envbuilder.resolve.protocol import Versions
from envbuilder.target import python_versions, target_for

Resolution = Mapping[Group, Mapping[str, Versions]]
"""Group → Python → the version of each package that the lock holds."""


def kept_versions(
    lock: SourceLock | None, target: TargetSpec, upgrade: frozenset[str] = frozenset()
) -> Resolution:
    """The versions in `lock` for each group and each Python of `target`, without those of the packages that
    `upgrade` names. Without a lock, none: all are chosen afresh.

    InputError for a name in `upgrade` that the lock doesn't hold.
    """
    names = {canonicalize_name(name) for name in upgrade}
    locked = {package.name for package in lock.pylock.packages} if lock else set()
    if unknown := sorted(names - locked):
        raise InputError(
            f"There is no {', '.join(unknown)} in the lock to upgrade.",
            remedy="Name packages that the lock holds, or --upgrade alone for all of them.",
            context={"packages": ", ".join(unknown), "lock": lock_filename(lock.name) if lock else "none"},
        )
    if lock is None:
        return {}
    return {
        group: {
            python: {
                name: version
                for name, version in _versions(lock, target, python, group).items()
                if name not in names
            }
            for python in python_versions(target)
        }
        for group in GROUPS
    }


def kept_version(kept: Resolution, name: str) -> str | None:
    """The one version of package `name` in `kept`; None where it has none, or several."""
    versions = {found[name] for pythons in kept.values() for found in pythons.values() if name in found}
    return versions.pop() if len(versions) == 1 else None


def _versions(lock: SourceLock, spec: TargetSpec, python: str, group: Group) -> Versions:
    try:
        return {file.package: file.version for file in lock.select(target_for(spec, python), (group,))}
    except MismatchError:
        return {}  # the recipe's target has moved on from what the lock serves
