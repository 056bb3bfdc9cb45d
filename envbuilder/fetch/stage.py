"""Puts a bundle together: files, lock, recipe, the tool; `bundle.json` last, so one without is incomplete."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import tomli_w

from envbuilder import __version__
from envbuilder.atomic import make_folder, remove_leftovers, write_atomically, writing
from envbuilder.bundle import RECIPE, RECORD, START, TOOL
from envbuilder.fetch.files import bring_files, plan_files, read_stamps, write_stamps
from envbuilder.fetch.selfpack import pack_tool, pack_trainer
from envbuilder.index import Index
from envbuilder.lock import FILES, GROUPS, SourceLock, lock_filename
from envbuilder.model import Bundle, BundleRecord
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.store import Store
from envbuilder.target import target_for


@dataclass(frozen=True, slots=True)
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
    indexes: Mapping[str, Index],
    client: httpx.Client,
    reporter: Reporter,
    verify: bool = False,
) -> FetchReport:
    """Makes the bundle of `recipe` for Python `python` ("3.12") complete, by its `lock`.

    What is in place already is not transferred, nor read if it is as the last fetch left it; `verify` reads
    everything and mends what is wrong. Raises IntegrityError, NetworkError, MismatchError (no room on the
    disk, or no file for this Python); the same call again then goes on from what is there.
    """
    begin = time.monotonic()
    target = target_for(recipe.target, python)
    files = lock.select(target, GROUPS)
    tool, trainer = pack_tool(), pack_trainer() if recipe.trainer else None
    record = BundleRecord(
        recipe=recipe.name,
        python=python,
        lock_sha256=lock.digest,
        tool_version=__version__,
        tool_wheel=tool.filename,
        tool_sha256=tool.sha256,
        tool_files=tuple(sorted(file.filename for file in lock.select(target, ("tool",)))),
        trainer_wheel=trainer.filename if trainer else None,
        trainer_sha256=trainer.sha256 if trainer else None,
    )
    folder = root.bundle(recipe.name)
    contents = {
        folder / lock_filename(recipe.name): lock.text.encode(),
        folder / RECIPE: _recipe_toml(recipe).encode(),
        folder / START: Path(__file__).with_name("start.py").read_bytes(),
        **{folder / TOOL / wheel.filename: wheel.content for wheel in (tool, trainer) if wheel},
    }
    record_file, record_bytes = folder / RECORD, f"{record.model_dump_json(indent=2)}\n".encode()
    store, stamps = Store(root.store), root.cache / "fetch" / f"{recipe.name}.json"

    reporter.stage(f"fetching {len(files)} files of {recipe.name}")
    plan = plan_files(files, folder / FILES, store, {} if verify else read_stamps(stamps), reporter)
    stale = [path for path, content in contents.items() if not _has(path, content)]
    strange = _others(folder / FILES, {file.filename for file in files})
    strange += _others(folder / TOOL, {path.name for path in contents})
    if plan.store or plan.index or stale or strange or not _has(record_file, record_bytes):
        with writing(folder, 0):
            make_folder(folder)
            record_file.unlink(missing_ok=True)
        bring_files(
            plan,
            folder / FILES,
            store,
            recipe=recipe.name,
            indexes=indexes,
            client=client,
            reporter=reporter,
        )
        for path in stale:
            write_atomically(path, contents[path])
        for path in strange:
            path.unlink(missing_ok=True)
        for part in (folder, folder / FILES, folder / TOOL):
            remove_leftovers(part)
        write_atomically(record_file, record_bytes)
    write_stamps(stamps, files, folder / FILES)
    store.tidy()
    return FetchReport(
        # Not read back: another fetch of this bundle may be about to write the same record again.
        bundle=Bundle(path=folder, record=record, lock=lock),
        files=len(files),
        bytes=sum(file.size for file in files),
        transferred_files=len(plan.index),
        transferred_bytes=sum(file.size for file in plan.index),
        seconds=time.monotonic() - begin,
    )


def _recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML that loads as the same recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True))


def _has(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _others(folder: Path, names: set[str]) -> list[Path]:
    """Files in `folder` beside those of these names; names with a dot first are copies on their way."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name not in names and not path.name.startswith(".")]
