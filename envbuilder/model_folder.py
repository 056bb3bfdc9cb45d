"""The lock of a model that is on no hub: the files of a folder, hashed where they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.hash_record import HashRecord, Stamp
from envbuilder.hashing import Hasher, OnBytes, hash_in_parallel
from envbuilder.hub_files import ModelRepository, choose_files, license_of
from envbuilder.lock import LockedModel, LockedModelFile
from envbuilder.provided_models import unreadable
from envbuilder.recipe import ModelSpec
from envbuilder.report import Reporter


def lock_folder(
    name: str, spec: ModelSpec, *, kept: LockedModel | None, record: HashRecord, reporter: Reporter
) -> LockedModel:
    """The lock of the recipe's model `name`, of which there is nothing but a folder: its files are hashed.

    Those that are as they were when `record` was given their hash are not read again. `kept` is what the lock
    has so far. InputError for a folder that can't be used, MismatchError where something in it can't be read.
    """
    assert spec.provided is not None  # a model without a repo has a folder
    folder = Path(spec.provided)
    try:
        names = frozenset(_names(folder))
        choice = choose_files(
            ModelRepository(name, str(folder), names, lambda file: (folder / file).read_bytes(), True),
            spec.remote_code,
        )
        files = _locked_files(name, folder, choice.files, record, reporter)
    except FileNotFoundError as error:
        raise InputError(
            f"There is no {error.filename}, which the model {name} needs.",
            remedy=f"Correct `provided` in [model.{name}].",
            context={"key": f"model.{name}.provided", "folder": folder},
        ) from error
    except OSError as error:
        raise unreadable(Path(error.filename or folder), "name another folder as `provided`") from error
    if kept and kept.repo is None and kept.files != files:
        reporter.note(f"The files in {folder} are others than those that the lock named so far.")
    if choice.left_out:
        reporter.note(
            f"{folder} has {len(choice.left_out)} files of weights that transformers doesn't read, "
            f"{choice.left_out[0]} among them; they are left out."
        )
    reporter.note(
        f"The model {name} is locked by the files that are in {folder} now: no hub vouches for them."
    )
    return LockedModel(
        name=name,
        repo=None,
        commit=None,
        license=_license(folder / "README.md"),
        remote_code=choice.remote_code,
        files=files,
    )


def _names(folder: Path) -> Iterator[str]:
    """The files below `folder`, links to files among them."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name).relative_to(folder).as_posix() for name in names)


def _locked_files(
    name: str, folder: Path, files: Iterable[str], record: HashRecord, reporter: Reporter
) -> tuple[LockedModelFile, ...]:
    # The hasher follows no link, and a folder of the hub library's cache is full of them.
    paths = {file: Path(os.path.realpath(folder / file)) for file in files}
    sizes = {file: path.stat().st_size for file, path in paths.items()}
    hashes = {file: sha256 for file, path in paths.items() if (sha256 := record.sha256(path))}
    unread = [file for file in paths if file not in hashes]
    if unread:
        reporter.stage(f"hashing the files of the model in {folder}, which is on no hub")
    done, total = 0, sum(sizes[file] for file in unread)

    def hashed(file: str, hasher: Hasher, on_bytes: OnBytes) -> str:
        before = paths[file].lstat()
        sha256 = hasher.sha256(paths[file], on_bytes)
        record.add(paths[file], Stamp.of_status(before, sha256))
        return sha256

    def count(more: int) -> None:
        nonlocal done
        done += more
        reporter.progress(f"model {name}", done, total, "bytes")

    hashes.update(zip(unread, hash_in_parallel(unread, hashed, count)))
    return tuple(LockedModelFile(file, size, hashes[file]) for file, size in sizes.items())


def _license(card: Path) -> str | None:
    """The licence that a model card names."""
    from huggingface_hub import metadata_load  # it takes half a second to import

    with suppress(Exception):  # no card, or one that is no YAML: the model can be used without
        return license_of(metadata_load(card) or {})
    return None
