"""What has changed between two source locks, in the order and the words in which a person reads it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.pylock import Package
from packaging.version import Version

from envbuilder.lock import GROUPS, LockedModel, SourceLock
from envbuilder.target import python_versions, target_for

Subject = Literal["lock", "package", "model"]
_TABLE_KEYS = ("index", "license", "metadata-source", "requires", "build-requires")
"""Those of a package's table that are compared as they stand."""


@dataclass(frozen=True)
class Change:
    """One thing that differs."""

    subject: Subject
    name: str
    """Of the package or model; "target", "provided", "excluded" or "resolver" for the lock itself."""
    kind: str
    """"added", "removed", or what of it has changed: "version", "bytes", "files", "groups", "form", …"""
    old: str
    new: str

    def describe(self) -> str:
        """One line."""
        if self.kind == "added":
            return f"added: {self.name} {self.new}"
        if self.kind == "removed":
            return f"removed: {self.name} {self.old}"
        if self.kind == "version":
            return f"{self.name} {self.old} -> {self.new}"
        if self.kind == "bytes":
            return f"same version, other bytes: {self.name}: {self.old} -> {self.new}"
        return f"{self.name}: {self.kind}: {self.old or 'none'} -> {self.new or 'none'}"


@dataclass(frozen=True)
class LockDiff:
    """All that differs between two locks; empty where they bring the same."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)


def diff_locks(old: SourceLock, new: SourceLock) -> LockDiff:
    """What differs in what the locks bring, and for which machines. Their text may differ in more."""
    return LockDiff((*_lock(old, new), *_packages(old, new), *_models(old, new)))


def describe(diff: LockDiff) -> list[str]:
    """A line for each change."""
    return [change.describe() for change in diff.changes]


def _lock(old: SourceLock, new: SourceLock) -> Iterator[Change]:
    targets = (old.target.model_dump(), new.target.model_dump())
    for key in targets[0] | targets[1]:
        yield from _changed("lock", "target", key, *(_text(target.get(key)) for target in targets))
    tables = [dict((lock.pylock.tool or {})["envbuilder"]) for lock in (old, new)]
    yield from _changed("lock", "lock", "resolver", *(_text(table.get("resolver")) for table in tables))
    for key in ("provided", "excluded"):
        before, after = ({_text(item) for item in table.get(key, ())} for table in tables)
        for item in sorted(before - after):
            yield Change("lock", key, "removed", item, "")
        for item in sorted(after - before):
            yield Change("lock", key, "added", "", item)


@dataclass(frozen=True)
class _Side:
    """One version of a package in one lock."""

    version: str
    needed: str
    """The groups, with the Pythons where it isn't all of them."""
    form: str
    files: Mapping[str, str]
    """File name → sha256."""
    facts: Mapping[str, str]
    """What is compared as it stands."""

    def __str__(self) -> str:
        return f"{self.version} ({self.needed})"


def _packages(old: SourceLock, new: SourceLock) -> Iterator[Change]:
    before, after = _sides(old), _sides(new)
    for name in sorted(before.keys() | after.keys()):
        olds, news = before.get(name, {}), after.get(name, {})
        gone = [olds[version] for version in olds if version not in news]
        come = [news[version] for version in news if version not in olds]
        if len(gone) == len(come) == 1:
            yield from _version(name, gone[0], come[0])
        else:
            yield from (Change("package", name, "removed", str(side), "") for side in gone)
            yield from (Change("package", name, "added", "", str(side)) for side in come)
        for version in olds:
            if version in news:
                yield from _same_version(name, olds[version], news[version])


def _version(name: str, old: _Side, new: _Side) -> Iterator[Change]:
    yield Change("package", name, "version", old.version, str(new))
    yield from _common(name, old, new)


def _same_version(name: str, old: _Side, new: _Side) -> Iterator[Change]:
    yield from _common(name, old, new)
    for file in sorted(old.files.keys() & new.files.keys()):
        if old.files[file] != new.files[file]:
            yield Change(
                "package",
                f"{name} {old.version} ({file})",
                "bytes",
                f"sha256 {old.files[file]}",
                f"sha256 {new.files[file]}",
            )
    yield from _changed("package", name, "files", *_only(old.files, new.files))


def _common(name: str, old: _Side, new: _Side) -> Iterator[Change]:
    yield from _changed("package", name, "groups", old.needed, new.needed)
    yield from _changed("package", name, "form", old.form, new.form)
    for key in dict.fromkeys([*old.facts, *new.facts]):
        yield from _changed("package", name, key, old.facts.get(key, ""), new.facts.get(key, ""))


def _sides(lock: SourceLock) -> dict[str, dict[str, _Side]]:
    """Package → version → what the lock says of it, oldest version first."""
    sides: dict[str, dict[str, _Side]] = {}
    environments = {
        python: target_for(lock.target, python).environment for python in python_versions(lock.target)
    }
    for package in sorted(lock.pylock.packages, key=lambda package: package.version or Version("0")):
        sides.setdefault(package.name, {})[str(package.version)] = _side(package, environments)
    return sides


def _side(package: Package, environments: Mapping[str, Any]) -> _Side:
    files = [*(package.wheels or ()), *([package.sdist] if package.sdist else ())]
    table: Mapping[str, Any] = (package.tool or {}).get("envbuilder", {})
    facts = {key: _text(table[key]) for key in _TABLE_KEYS if key in table}
    if git := table.get("git"):
        facts["git commit"] = git["commit"]
        facts["submodules"] = ", ".join(
            f"{path} {commit}" for path, commit in sorted(git["submodules"].items())
        )
    if patches := table.get("patches"):
        facts["patches"] = ", ".join(f"{patch['path']} sha256 {patch['sha256']}" for patch in patches)
    form = "git" if git else "sdist" if package.sdist else "wheel"
    return _Side(
        version=str(package.version),
        needed=_needed(package, environments),
        form=form,
        files={file.filename: file.hashes["sha256"] for file in files},
        facts=facts,
    )


def _needed(package: Package, environments: Mapping[str, Any]) -> str:
    on = {
        group: [
            python
            for python, environment in environments.items()
            if package.marker is None
            or package.marker.evaluate(
                {**environment, "dependency_groups": {group}, "extras": set()}, context="lock_file"
            )
        ]
        for group in GROUPS
    }
    return ", ".join(
        group if len(pythons) == len(environments) else f"{group} on Python {' and '.join(pythons)}"
        for group, pythons in on.items()
        if pythons
    )


def _models(old: SourceLock, new: SourceLock) -> Iterator[Change]:
    before, after = ({model.name: model for model in lock.models} for lock in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield Change("model", f"model {name}", "removed", _model(before[name]), "")
        elif name not in before:
            yield Change("model", f"model {name}", "added", "", _model(after[name]))
        else:
            yield from _model_changes(before[name], after[name])


def _model_changes(old: LockedModel, new: LockedModel) -> Iterator[Change]:
    name = f"model {old.name}"
    yield from _changed("model", name, "repo", old.repo or "", new.repo or "")
    yield from _changed("model", name, "commit", old.commit or "", new.commit or "")
    yield from _changed("model", name, "license", old.license or "", new.license or "")
    yield from _changed("model", name, "remote code", _text(old.remote_code), _text(new.remote_code))
    before, after = ({file.name: file.sha256 for file in model.files} for model in (old, new))
    changed = [file for file in sorted(before.keys() & after.keys()) if before[file] != after[file]]
    for file in changed:
        kind = "bytes" if old.commit == new.commit else f"file {file}"
        shown = f"{name} ({file})" if old.commit == new.commit else name
        yield Change("model", shown, kind, f"sha256 {before[file]}", f"sha256 {after[file]}")
    yield from _changed("model", name, "files", *_only(before, after))


def _model(model: LockedModel) -> str:
    return f"{model.repo} {model.commit}" if model.repo else model.origin


def _only(old: Iterable[str], new: Iterable[str]) -> tuple[str, str]:
    """The names that one side alone has."""
    before, after = set(old), set(new)
    return ", ".join(sorted(before - after)), ", ".join(sorted(after - before))


def _changed(subject: Subject, name: str, kind: str, old: str, new: str) -> Iterator[Change]:
    if old != new:
        yield Change(subject, name, kind, old, new)


def _text(value: object) -> str:
    """A value of a lock's tables on one line."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)
