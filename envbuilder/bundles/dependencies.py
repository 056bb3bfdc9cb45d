"""Which packages of a bundle need which, by their own metadata and the lock: no index, and nothing is run."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import RawMetadata, parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from envbuilder.bundle import TOOL, bundle_file
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.licenses import license_in
from envbuilder.lock import GROUPS
from envbuilder.model import Bundle
from envbuilder.target import Target

_LARGEST = 16 << 20
"""Bytes that a wheel's METADATA may have."""


@dataclass(frozen=True)
class OwnWheel:
    """envbuilder's wheel, or its trainer's."""

    name: str
    version: str
    filename: str
    sha256: str
    requires: tuple[str, ...]
    license: str | None


def own_wheels(bundle: Bundle) -> tuple[OwnWheel, ...]:
    """The wheels in the bundle's `tool` folder: envbuilder's, then the trainer's, if it has one."""
    record = bundle.record
    wanted = [(record.tool_wheel, record.tool_sha256)]
    if record.trainer_wheel is not None and record.trainer_sha256 is not None:
        wanted.append((record.trainer_wheel, record.trainer_sha256))
    return tuple(_own(bundle.path / TOOL / filename, sha256) for filename, sha256 in wanted)


def dependency_graph(
    bundle: Bundle, target: Target, own: Sequence[OwnWheel], roots: Iterable[str]
) -> dict[str, frozenset[str]]:
    """Package → the packages that it needs at run time on `target`, as far as the bundle has them.

    `roots` are requirements that a person wrote: they ask for extras. The key "" has what they name.
    IntegrityError where a wheel can't be read.
    """
    requires = {
        file.package: (
            bundle.lock.package_table(file.package).get("requires", ())
            if file.is_sdist
            else _metadata(bundle_file(bundle, file)).get("requires_dist", [])
        )
        # Where the tool has another version of a package, the env's counts.
        for file in reversed(bundle.lock.select(target, GROUPS))
    }
    requires |= {wheel.name: wheel.requires for wheel in own}
    requires[""] = tuple(roots)
    return _graph({name: _parsed(texts) for name, texts in requires.items()}, target)


def _graph(requires: Mapping[str, Sequence[Requirement]], target: Target) -> dict[str, frozenset[str]]:
    """Follows extras to where they lead: `a[b]` makes those requirements of `a` hold that ask for `b`."""
    extras: dict[str, set[str]] = {name: {""} for name in requires}
    graph: dict[str, set[str]] = {name: set() for name in requires}
    waiting = list(requires)
    while waiting:
        name = waiting.pop()
        for requirement in requires[name]:
            needed = canonicalize_name(requirement.name)
            if needed not in requires or not _holds(requirement, extras[name], target):
                continue
            if needed != name:
                graph[name].add(needed)
            if new := requirement.extras - extras[needed]:
                extras[needed] |= new
                waiting.append(needed)
    return {name: frozenset(needed) for name, needed in graph.items()}


def _holds(requirement: Requirement, extras: Iterable[str], target: Target) -> bool:
    marker = requirement.marker
    environment = {key: str(value) for key, value in target.environment.items()}
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in extras)


def _parsed(texts: Iterable[str]) -> tuple[Requirement, ...]:
    """Old packages have requirements that PEP 508 doesn't know: they say nothing here."""
    found = []
    for text in texts:
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            continue
    return tuple(found)


def _own(path: Path, sha256: str) -> OwnWheel:
    if not path.is_file():
        raise MismatchError(f"The bundle lacks {path}.", remedy=_fetch(path), context={"file": path})
    metadata = _metadata(path)
    return OwnWheel(
        name=canonicalize_name(metadata["name"]),
        version=metadata["version"],
        filename=path.name,
        sha256=sha256,
        requires=tuple(metadata.get("requires_dist", [])),
        license=license_in(metadata),
    )


def _metadata(wheel: Path) -> RawMetadata:
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = next(
                member
                for member in archive.infolist()
                if member.filename.count("/") == 1 and member.filename.endswith(".dist-info/METADATA")
            )
            if info.file_size > _LARGEST:
                raise zipfile.BadZipFile("its METADATA is far too large")
            metadata, _ = parse_email(archive.read(info))
        if not {"name", "version"} <= metadata.keys():
            raise zipfile.BadZipFile("its METADATA has no name or no version")
    except (zipfile.BadZipFile, OSError, StopIteration, NotImplementedError) as error:
        raise IntegrityError(
            f"{wheel} is not a wheel that can be read: {str(error) or 'it has no METADATA'}.",
            remedy=_fetch(wheel),
            context={"file": wheel},
        ) from error
    return metadata


def _fetch(wheel: Path) -> str:
    return f"envbuilder fetch recipes/{wheel.absolute().parents[1].name}.toml --verify"
