"""A disk that purges: when the first files under ROOT expire, and whether some are gone already.

A file's time counts from its last use: the later of its last write and its last read, as the file system
keeps them. These checks read no file and set no time: centres forbid it to touch files so that they stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from envbuilder.bundle_contents import examine, mending
from envbuilder.distributions import gone_files
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.subject import Subject
from envbuilder.kept_images import kept_images
from envbuilder.provided_models import models_of_bundle
from envbuilder.report import Reporter

NEAR = 0.25
"""Of the days that a file has: with fewer left, it is time to see to it."""
_DAY = 86400.0
_UNKNOWN = "The site names no purge-days, so nothing is known of a purge there."


@dataclass(frozen=True)
class Oldest:
    """The file of a part that expires first."""

    path: Path
    used: float
    """When it was last written or read (seconds since 1970)."""
    written: float
    """The earliest last write of all files."""
    files: int


def check_dates(subject: Subject, reporter: Reporter) -> Outcome:
    """The dates on which the first file of each part of ROOT expires."""
    assert subject.site is not None
    days = subject.site.purge_days
    if days is None:
        return skipped(_UNKNOWN)
    evidence, near = [], []
    for name, paths in _parts(subject):
        oldest = _oldest(paths)
        if oldest is None:
            continue
        evidence.append(
            f"{name}: {oldest.files:,} files; the first expires on {_date(oldest.used, days)} "
            f"({oldest.path}), by its last write alone on {_date(oldest.written, days)}"
        )
        left = (oldest.used - time.time()) / _DAY + days
        # What lies in the store alone, no bundle needs; what a bundle holds is counted there.
        if left < NEAR * days and name != "store":
            near.append((left, name))
    if not evidence:
        return skipped("Nothing is under ROOT yet that could expire.")
    if near:
        left, first = min(near)
        when = f"in {left:.0f} days" if left > 0 else "any day now"
        return warning(
            f"After {days} days without use the site purges files: the first of {first} expire {when}.",
            *evidence,
            remedy=_keep(subject),
        )
    return ok(f"After {days} days without use the site purges files; none expires soon.", *evidence)


def check_gone(subject: Subject, reporter: Reporter) -> Outcome:
    """The files that the bundle's and the env's records name and that are not there any more."""
    assert subject.site is not None
    if subject.site.purge_days is None:
        return skipped(_UNKNOWN)
    gone: list[str] = []
    remedies: list[str] = []
    if subject.has_bundle:
        problems = examine(subject.bundle, reporter, sizes_only=True).problems
        missing = [problem for problem in problems if problem.kind == "missing"]
        if missing:
            gone += [str(subject.bundle.path / problem.path) for problem in missing]
            remedies.append(mending(subject.bundle, missing).replace(" --verify", ""))
    if subject.env is not None:
        lost = gone_files(subject.env, subject.receipt)
        if lost:
            gone += lost
            remedies.append(f"envbuilder install {subject.recipe_file}")
    if gone:
        return failed(
            f"{len(gone)} files are gone, as after a purge.", *shown(gone), remedy=" && ".join(remedies)
        )
    if not subject.has_bundle and subject.env is None:
        return skipped("Nothing is fetched or installed yet.")
    return ok("No file is gone that the records name.")


def _parts(subject: Subject) -> Iterator[tuple[str, Iterable[str]]]:
    """What a purge could take from, by name: of bundles and envs the recipe's own, where there is one."""
    root, recipe = subject.root, subject.recipe
    yield "store", _files(root.store)
    yield "the bundle" if recipe else "bundles", _files(root.bundle(recipe.name if recipe else ""))
    if subject.provided_models:
        for model in models_of_bundle(subject.bundle):
            yield f"the model {model.model.name}", [str(file.path) for file in model.files]
    yield "the wheelhouse", _files(root.wheelhouse)
    yield "the env" if recipe else "envs", _files(root.env(recipe.name if recipe else ""))
    images = [image for image in kept_images(root) if recipe is None or image.recipe == recipe.name]
    yield "the image" if recipe else "images", [str(image.path) for image in images if not image.superseded]
    yield "runs", _files(root.run(""))


def _oldest(paths: Iterable[str]) -> Oldest | None:
    """None where there is no file."""
    oldest: tuple[float, str] | None = None
    written, files = float("inf"), 0
    for path in paths:
        with suppress(OSError):  # gone meanwhile
            found = os.lstat(path)
            files += 1
            written = min(written, found.st_mtime)
            used = max(found.st_mtime, found.st_atime)
            if oldest is None or used < oldest[0]:
                oldest = (used, path)
    return Oldest(Path(oldest[1]), oldest[0], written, files) if oldest else None


def _files(folder: Path) -> Iterator[str]:
    """The files below `folder`; what links lead to may lie on another disk."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry.path


def _date(since: float, days: int) -> str:
    return datetime.fromtimestamp(since + days * _DAY, timezone.utc).strftime("%Y-%m-%d")


def _keep(subject: Subject) -> str:
    """What keeps a bundle and the runs, and what makes the rest again."""
    recipe = subject.recipe_file
    name = subject.recipe.name if subject.recipe else "NAME"
    return (
        f"Copy what took long to a disk that is not purged: envbuilder bundle pack {name} --output FOLDER; "
        f"cp -r {subject.root.run('')} {subject.root.wheelhouse} FOLDER. What is gone comes back with: "
        f"envbuilder fetch {recipe} && envbuilder compile {recipe} --local && envbuilder install {recipe}"
    )


CHECKS = (
    Check(
        "purging.dates",
        "the dates on which files expire",
        "when the first files of store, bundle, provided models, wheelhouse, env, image and runs are "
        "purged, by the site's purge-days",
        check_dates,
        needs=("site",),
        limit_s=120,
    ),
    Check(
        "purging.gone",
        "files that were purged",
        "whether files are gone that the bundle's record or the env's receipt names",
        check_gone,
        needs=("recipe", "site"),
        limit_s=120,
    ),
)
