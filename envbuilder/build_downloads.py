"""What the builds of a lock's source packages may download, and whether the recipe keeps them from it.

On a node without a network such a build fails, or hangs, long after the job began; here it is said on the
login node, with the line to write into the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement

from envbuilder.bundle import path_in
from envbuilder.download_scan import BuildDownload, Switch, scan_sdist
from envbuilder.lock import FILES, SourceLock
from envbuilder.recipe import Recipe, SourceBuild
from envbuilder.report import Reporter
from envbuilder.requirements import required_name
from envbuilder.target import target_for

_SHOWN = 3
"""Places that one message names."""


@dataclass(frozen=True)
class JudgedDownload:
    """A `BuildDownload` of one package of a lock, as the recipe has it."""

    package: str
    version: str
    download: BuildDownload
    off: bool
    """The recipe, or what is in the build environment, keeps the build from it."""


def downloads_of(
    recipe: Recipe, lock: SourceLock, bundle: Path, *, python: str
) -> tuple[JudgedDownload, ...]:
    """What each source package of `lock` would download in its build, read from its sdist in folder `bundle`.

    InputError where an sdist can't be read, MismatchError where it isn't there. Patches are not applied.
    """
    target = target_for(lock.target, python)
    at_hand = {file.package for file in lock.select(target, ("build",))} | recipe.provided_names
    judged = []
    for file in lock.select(target, ("runtime",)):
        if not file.is_sdist:
            continue
        path = path_in(bundle, f"{FILES}/{file.filename}", recipe=recipe.name)
        environment = recipe.build.get(file.package, SourceBuild()).env
        for download in scan_sdist(path):
            if download.requires:
                off = all(_required_name(text) in at_hand for text in download.requires)
            else:
                off = download.switch is not None and download.switch.is_off(environment)
            judged.append(JudgedDownload(file.package, file.version, download, off))
    return tuple(judged)


def report_downloads(recipe: Recipe, judged: tuple[JudgedDownload, ...], reporter: Reporter) -> None:
    """Says what `downloads_of` found: a warning for what nothing turns off, a note for what is off."""
    groups: dict[tuple[str, str, Switch | None, bool, bool, bool], list[BuildDownload]] = {}
    for item in judged:
        found = item.download
        key = (
            item.package,
            item.version,
            found.switch,
            item.off,
            found.unread,
            bool(found.requires),
        )
        groups.setdefault(key, []).append(found)
    for (package, version, switch, off, unread, requires), found_here in groups.items():
        places = _places(found_here)
        subject = f"{package} {version}"
        if unread:
            reporter.note(f"{subject}: whether its build downloads can't be told: {places}.")
        elif not off:
            reporter.warn(
                f"{subject}: its build may download, and compute nodes have no network: {places}. "
                f"{_advice(recipe, package, switch, found_here[0])}"
            )
        elif not requires:
            reporter.note(f"{subject}: its build doesn't download, as {_said(switch)}: {places}.")


def _said(switch: Switch | None) -> str:
    assert switch is not None  # without one, nothing is off
    if switch.how == "unset":
        return f"{switch.variable} is not set"
    return f"the recipe sets {switch.variable}"


def _advice(recipe: Recipe, package: str, switch: Switch | None, first: BuildDownload) -> str:
    file = f"recipes/{recipe.name}.toml"
    if first.requires:
        wanted = ", ".join(f'"{text}"' for text in first.requires)
        return f"Write build-requires = [{wanted}] under [build.{package}] in {file}, then lock again."
    if switch is None:
        return (
            f"Nothing is known that turns this off: see {first.file}, and patch it or set its own "
            f"variable under [build.{package}.env] in {file}."
        )
    if switch.how == "unset":
        return f"Delete {switch.variable} from [build.{package}.env] in {file}."
    value = "…" if switch.value == "*" else switch.value
    return f'Write {switch.variable} = "{value}" under [build.{package}.env] in {file}.'


def _places(found: list[BuildDownload]) -> str:
    texts = [
        f"{item.what} in {item.file}" + (f", line {item.line}" if item.line else "")
        for item in found[:_SHOWN]
    ]
    more = len(found) - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _required_name(text: str) -> str:
    try:
        return required_name(text)
    except InvalidRequirement:
        return text
