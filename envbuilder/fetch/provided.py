"""Models that the machine has: verified where they lie, against the lock. Nothing of them is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from envbuilder.bundle_contents import BundleFile, differing
from envbuilder.errors import IntegrityError
from envbuilder.hash_record import HashRecord, Stamp
from envbuilder.provided_models import ProvidedModel, check_place, own_copy
from envbuilder.report import Reporter

_NAMED = 5


def verify_provided(
    models: Iterable[ProvidedModel],
    recipe_name: str,
    stamps: Mapping[str, Stamp],
    record: HashRecord,
    reporter: Reporter,
) -> dict[str, Stamp]:
    """The stamps of all files of `models`, which have the lock's bytes; those that are as in `stamps`, or
    that `record` has, are not read again. Keys are absolute paths.

    MismatchError where files are missing, unreadable or anybody's to change, IntegrityError where they have
    other bytes.
    """
    found: dict[str, Stamp] = {}
    for provided in models:
        check_place(provided, recipe_name)
        now = {str(file.path): Stamp.of(file.path, file.sha256) for file in provided.files}
        doubtful = {
            str(file.path): BundleFile(str(file.path), file.size, file.sha256)
            for file in provided.files
            if stamps.get(str(file.path)) != now[str(file.path)] and not record.has(file.path, file.sha256)
        }
        if doubtful:
            reporter.stage(f"verifying the model {provided.model.name} in {provided.folder}")
            _verify(provided, tuple(doubtful.values()), recipe_name, record, reporter)
        found |= now
    return found


def _verify(
    provided: ProvidedModel,
    files: tuple[BundleFile, ...],
    recipe_name: str,
    record: HashRecord,
    reporter: Reporter,
) -> None:
    problems = differing(files, Path("/"), reporter, record)
    if problems:
        raise IntegrityError(
            f"{len(problems)} of the files in {provided.folder} are not what the lock names of the model "
            f"{provided.model.origin}.",
            remedy="Ask the folder's owner to put them right, or correct `provided` of "
            f"[model.{provided.model.name}]; or {own_copy(recipe_name, provided.model)}",
            context={problem.path: problem.detail for problem in problems[:_NAMED]},
        )
