"""Takes what was brought by other means into the store, each byte checked; completes the bundle, offline.

Files are known by their names, wherever below the folder they lie; whether they are what the lock names, size
and sha256 say.
"""

from __future__ import annotations

import os
import shlex
import stat
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from envbuilder.bundle import copy_verified
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, MismatchError
from envbuilder.fetch.files import Meter, by_content, in_parallel
from envbuilder.fetch.stage import FetchReport, complete_bundle, plan_bundle
from envbuilder.fetch.wanted import Wanted, stored_files
from envbuilder.hashing import Hasher, hashing
from envbuilder.lock import FILES, GROUPS, SourceLock
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.store import Store
from envbuilder.target import target_for

_NAMED = 10
"""Files that a message names; of more, it says how many."""


@dataclass(frozen=True)
class _Tried:
    """What came of one content that a bundle lacks."""

    files: tuple[Wanted, ...]
    """All that have this content."""
    used: Path | None
    """Where it was found."""
    wrong: tuple[Path, ...]
    """What has its name, and other bytes."""


def adopt_files(
    recipe: Recipe,
    lock: SourceLock,
    *,
    root: Root,
    python: str,
    folder: Path,
    recipe_folder: Path,
    reporter: Reporter,
    verify: bool = False,
) -> FetchReport:
    """Completes the bundle of `recipe` for Python `python` with the files below `folder`, and asks nobody.

    What is right goes into the store even if something else is missing, so files may be brought in several
    parts. Files are linked where that makes no difference to who may read them, else copied; wrong ones and
    unknown ones are left as they are. IntegrityError where files are missing and wrong ones have their names,
    MismatchError where they are only missing, InputError where `folder` can't be read.
    """
    begin = time.monotonic()
    target = target_for(lock.target, python)
    files = stored_files(recipe, lock, target, recipe_folder)
    brought = _by_name(folder, root)
    if unknown := [brought[name][0] for name in sorted(brought.keys() - {_name(file) for file in files})]:
        reporter.note(f"The lock knows no file of these names, and they are left: {_some(unknown)}.")
    reporter.stage(f"adopting files of {recipe.name} from {folder}")
    plan = plan_bundle(recipe, files, root=root, reporter=reporter, verify=verify)
    own = {patch.path for patch in lock.patches}
    lacking = by_content(file for file in plan.origin if file.path not in own)
    tried = _adopt(lacking, brought, Store(root.store), reporter)
    used = {one.used for one in tried}
    wrong = {path: one.files[0] for one in tried for path in one.wrong if path not in used}
    if missing := [file for one in tried if one.used is None for file in one.files]:
        git = {f"{FILES}/{file.filename}" for file in lock.select(target, GROUPS) if file.index is None}
        again = f"envbuilder fetch recipes/{recipe.name}.toml --python {python}"
        raise _incomplete(folder, missing, wrong, git, again)
    if wrong:
        reporter.warn(f"These are not what the lock names, and are left: {_some(sorted(wrong))}.")
    stored = [file for one in tried for file in one.files]
    plan = replace(
        plan,
        store=(*plan.store, *stored),
        origin=tuple(file for file in plan.origin if file.path in own),
    )
    return complete_bundle(
        recipe, lock, files, plan, root=root, python=python, reporter=reporter, begin=begin, verify=verify
    )


def _by_name(folder: Path, root: Root) -> Mapping[str, Sequence[Path]]:
    """File name → the files of that name below `folder`, ROOT's own aside; InputError if it can't be read."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"The folder {error.filename} can't be read: {error.strerror}.",
            remedy="Give the folder in which the brought files lie: --adopt DIR",
            context={"folder": folder},
        ) from error

    own = root.path.resolve()
    found: dict[str, list[Path]] = defaultdict(list)
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if Path(place, name).resolve() != own)
        for name in sorted(names):
            found[name].append(Path(place, name))
    return found


def _adopt(
    lacking: Sequence[tuple[Wanted, ...]],
    brought: Mapping[str, Sequence[Path]],
    store: Store,
    reporter: Reporter,
) -> list[_Tried]:
    """Stores each content of `lacking` that is among `brought`."""
    meter = Meter(reporter, "adopt", sum(same[0].size for same in lacking))

    def adopt(same: tuple[Wanted, ...]) -> _Tried:
        wrong: list[Path] = []
        for path in [
            path for name in sorted({_name(file) for file in same}) for path in brought.get(name, ())
        ]:
            if _stored(path, same[0], store, hasher):
                meter.count(same[0].size)
                return _Tried(same, path, tuple(wrong))
            wrong.append(path)
        return _Tried(same, None, tuple(wrong))

    with hashing() as hasher:
        return in_parallel(adopt, lacking, meter.stop)


def _stored(path: Path, file: Wanted, store: Store, hasher: Hasher) -> bool:
    """Whether `path` has the bytes of `file`, which the store then has; InputError if it can't be read."""
    try:
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        with path.open("rb"):
            pass  # later on a refusal could be the store's as well
    except OSError as error:
        raise InputError(
            f"{path} can't be read: {error.strerror}.", remedy=f"chmod u+r {path}", context={"file": path}
        ) from error
    try:
        store.add(file.sha256, file.size, partial(_take, path, file, hasher))
    except IntegrityError:
        return False
    return True


def _take(path: Path, file: Wanted, hasher: Hasher, part: Path) -> None:
    """Makes `part` the verified bytes of `path`: the same file where that will do, else a copy."""
    try:
        linked = _link(path, part)
    except OSError:  # no links on this file system, or none between these two
        linked = False
    if linked and hasher.sha256(part, lambda _: None) != file.sha256:
        raise IntegrityError(f"{path} is not what the lock names.", remedy=f"rm {path}")
    if not linked:
        copy_verified(path, file.sha256, file.size, part, remedy=f"rm {path}")


def _link(path: Path, part: Path) -> bool:
    """Makes `part` a link to `path`, if that has the owner and group of a stored file; whether it did."""
    found, own = path.lstat(), part.lstat()
    if not stat.S_ISREG(found.st_mode) or (found.st_uid, found.st_gid) != (own.st_uid, own.st_gid):
        return False
    part.unlink()
    os.link(path, part)
    return True


def _incomplete(
    folder: Path, missing: Sequence[Wanted], wrong: Mapping[Path, Wanted], git: set[str], again: str
) -> EnvbuilderError:
    """The error for what is missing after all that was right in `folder` has been stored."""
    parts = {path: why for path, file in wrong.items() if (why := _unfinished(path, file))}
    others = sorted(wrong.keys() - parts.keys())
    from_git = [file for file in missing if file.path in git]
    remedies = []
    if others:
        remedies.append(f"rm {' '.join(shlex.quote(str(path)) for path in others[:_NAMED])}")
    if parts:
        remedies.append("let the transfer that was cut off go on (the same command)")
    if len(missing) > len(from_git):
        remedies.append(f"what is still to be brought: {again} --export-urls wget")
    if from_git:
        remedies.append(f"from git, where its server can be reached, when all else is there: {again}")
    context = {str(path): why for path, why in list(parts.items())[:_NAMED]}
    context |= {str(path): "other bytes than the lock names" for path in others[:_NAMED]}
    context["missing"] = _some([file.path for file in missing if file.path not in git]) or "nothing else"
    if from_git:
        context["packed from git, no URL leads to it"] = _some([file.path for file in from_git])
    kind = IntegrityError if others else MismatchError
    unusable = f"; unusable files in {folder}: {len(wrong)}" if wrong else ""
    return kind(
        f"The bundle still lacks {len(missing)} files{unusable}.",
        remedy="; ".join(remedies),
        context=context,
    )


def _unfinished(path: Path, file: Wanted) -> str | None:
    """Why `path` may become `file` yet; None where it can't."""
    if path.with_name(f"{path.name}.aria2").exists():
        return "aria2 has not ended"
    size = path.stat().st_size if path.is_file() else 0
    return f"{size:,} of {file.size:,} bytes" if size < file.size else None


def _name(file: Wanted) -> str:
    return PurePosixPath(file.path).name


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more
