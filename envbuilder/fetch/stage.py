"""Puts a bundle together: files, lock, recipe, the tool; `bundle.json` last, so one without is incomplete."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from envbuilder import __version__
from envbuilder.atomic import is_new_file, make_folder, remove_leftovers, write_atomically, writing
from envbuilder.build_downloads import downloads_of, report_downloads
from envbuilder.bundle import RECIPE, RECORD, START, TOOL, check_folders
from envbuilder.errors import MismatchError
from envbuilder.fetch.closure import prove_closure
from envbuilder.fetch.files import Plan, bring_files, plan_files, read_stamps, write_stamps
from envbuilder.fetch.provided import verify_provided
from envbuilder.fetch.selfpack import pack_tool, pack_trainer
from envbuilder.fetch.wanted import Origins, Wanted, wanted_files
from envbuilder.hash_record import HashRecord
from envbuilder.lock import SourceLock, lock_filename
from envbuilder.model import Bundle, BundleRecord
from envbuilder.paths import Root
from envbuilder.provided_models import models_of_recipe
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.store import Store
from envbuilder.target import target_for


@dataclass(frozen=True)
class FetchReport:
    """What a fetch did."""

    bundle: Bundle
    files: int
    """Locked files in the bundle."""
    bytes: int
    """Their size."""
    transferred_files: int
    """Those of them that came over the network this time."""
    transferred_bytes: int
    """Their size."""
    seconds: float
    """Wall time."""


def fetch_bundle(
    recipe: Recipe,
    lock: SourceLock,
    *,
    root: Root,
    python: str,
    origins: Origins,
    reporter: Reporter,
    verify: bool = False,
) -> FetchReport:
    """Makes the bundle of `recipe` for Python `python` ("3.12") complete, by its `lock`.

    What is in place already is not transferred, nor read if it is as the last fetch left it; `verify` reads
    everything and mends what is wrong. Before the bundle counts as complete, its files alone are shown to be
    enough for every build. Raises IntegrityError, NetworkError, MismatchError (no room on the disk, no file
    for this Python, files that don't suffice, a model that is not where it is provided); the same call again
    then goes on from what is there.
    """
    begin = time.monotonic()
    files = wanted_files(recipe, lock, target_for(lock.target, python), origins)
    reporter.stage(f"fetching {len(files)} files of {recipe.name}")
    plan = plan_bundle(recipe, files, root=root, reporter=reporter, verify=verify)
    return complete_bundle(
        recipe, lock, files, plan, root=root, python=python, reporter=reporter, begin=begin, verify=verify
    )


def plan_bundle(
    recipe: Recipe, files: tuple[Wanted, ...], *, root: Root, reporter: Reporter, verify: bool = False
) -> Plan:
    """What the bundle of `recipe` lacks of `files`; `verify` reads also what is as the last fetch left it."""
    folder = root.bundle(recipe.name)
    check_folders(folder)
    _check_links(folder)
    stamps = {} if verify else read_stamps(_stamps(root, recipe))
    return plan_files(files, folder, Store(root.store), stamps, _hashed(root, recipe), reporter)


def complete_bundle(
    recipe: Recipe,
    lock: SourceLock,
    files: tuple[Wanted, ...],
    plan: Plan,
    *,
    root: Root,
    python: str,
    reporter: Reporter,
    begin: float,
    verify: bool = False,
) -> FetchReport:
    """Carries out `plan` (plan_bundle), where `files` are what `lock` names for `python`: see fetch_bundle.

    `begin`: time.monotonic() of the command's start. `verify` reads also those files of provided models that
    are as the last fetch found them.
    """
    target = target_for(lock.target, python)
    provided = models_of_recipe(recipe, lock.models)
    kept = {} if verify else read_stamps(_stamps(root, recipe))
    hashed = _hashed(root, recipe)
    provided_stamps = verify_provided(provided, recipe.name, kept, hashed, reporter)
    tool, trainer = pack_tool(), pack_trainer() if recipe.trainer else None
    recipe_toml, start = _recipe_toml(recipe).encode(), Path(__file__).with_name("start.py").read_bytes()
    record = BundleRecord(
        recipe=recipe.name,
        python=python,
        lock_sha256=lock.digest,
        recipe_sha256=hashlib.sha256(recipe_toml).hexdigest(),
        start_sha256=hashlib.sha256(start).hexdigest(),
        tool_version=__version__,
        tool_wheel=tool.filename,
        tool_sha256=tool.sha256,
        tool_files=tuple(sorted(file.filename for file in lock.select(target, ("tool",)))),
        trainer_wheel=trainer.filename if trainer else None,
        trainer_sha256=trainer.sha256 if trainer else None,
        provided_models={one.model.name: str(one.folder) for one in provided},
    )
    folder = root.bundle(recipe.name)
    contents = {
        folder / lock_filename(recipe.name): lock.text.encode(),
        folder / RECIPE: recipe_toml,
        folder / START: start,
        **{folder / TOOL / wheel.filename: wheel.content for wheel in (tool, trainer) if wheel},
    }
    record_file, record_bytes = folder / RECORD, f"{record.model_dump_json(indent=2)}\n".encode()
    store = Store(root.store)

    stale = [path for path, content in contents.items() if not _has(path, content)]
    strange = _others(folder, {*(folder / file.path for file in files), *contents, record_file})
    if plan.store or plan.origin or stale or strange or not _has(record_file, record_bytes):
        with writing(folder, 0):
            make_folder(folder)
            record_file.unlink(missing_ok=True)
        bring_files(plan, folder, store, hashed, reporter)
        for path in stale:
            write_atomically(path, contents[path])
        for path in strange:
            path.unlink(missing_ok=True)
        for part in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            remove_leftovers(part)
        if any(file.is_sdist for file in lock.select(target)):
            prove_closure(recipe, lock, folder, python=python, reporter=reporter)
            report_downloads(recipe, downloads_of(recipe, lock, folder, python=python), reporter)
        write_atomically(record_file, record_bytes)
    with suppress(MismatchError):  # they save time; a complete bundle needs no place to write to
        write_stamps(_stamps(root, recipe), files, folder, provided_stamps)
    hashed.remove()
    store.tidy()
    return FetchReport(
        # Not read back: another fetch of this bundle may be about to write the same record again.
        bundle=Bundle(path=folder, record=record, lock=lock),
        files=len(files),
        bytes=sum(file.size for file in files),
        transferred_files=len(plan.origin),
        transferred_bytes=sum(file.size for file in plan.origin),
        seconds=time.monotonic() - begin,
    )


def _check_links(folder: Path) -> None:
    """MismatchError where the bundle's folder, or one in it, is a link: what is strange in it is deleted."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() and path.is_dir():
            raise MismatchError(
                f"{path} is a link to another folder.",
                remedy=f"rm {path}, or to keep bundles on another disk: envbuilder --root FOLDER",
                context={"folder": path, "leads to": path.resolve()},
            )


def _stamps(root: Root, recipe: Recipe) -> Path:
    return root.cache / "fetch" / f"{recipe.name}.json"


def _hashed(root: Root, recipe: Recipe) -> HashRecord:
    """What a fetch that was cut off has hashed or brought; the stamps tell of one that came to its end."""
    return HashRecord.where_needed(root.cache / "fetch" / f"{recipe.name}.hashed")


def _recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML that loads as the same recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True))


def _has(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _others(folder: Path, known: set[Path]) -> list[Path]:
    """Files below `folder` beside those known; hidden new ones are on their way."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in found if path not in known and not is_new_file(path)]
