"""Models that the machine has: where their files are, and whether they can be relied on.

Nothing is copied and nothing is written. A folder may be plain, a snapshot in the cache of the hub's library
(`models--OWNER--NAME/snapshots/COMMIT`, whose files are links to blobs), or the folder above its snapshots.
Links are followed: what is checked is what a training will read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.accounts import account_name, group_name
from envbuilder.errors import MismatchError
from envbuilder.lock import LockedModel
from envbuilder.model import Bundle
from envbuilder.recipe import Recipe

_NAMED = 5


@dataclass(frozen=True)
class ProvidedFile:
    """One file of a model, where it is read."""

    name: str
    """Its path in the model's folder."""
    path: Path
    """Absolute, without links."""
    size: int
    """Bytes, by the lock."""
    sha256: str


@dataclass(frozen=True)
class ProvidedModel:
    """A locked model, and the folder in which the machine has it."""

    model: LockedModel
    folder: Path

    @property
    def files(self) -> tuple[ProvidedFile, ...]:
        return tuple(
            ProvidedFile(file.name, Path(os.path.realpath(self.folder / file.name)), file.size, file.sha256)
            for file in self.model.files
        )


def models_of_recipe(recipe: Recipe, models: Iterable[LockedModel]) -> tuple[ProvidedModel, ...]:
    """Those of the lock's `models` that `recipe` says the machine has."""
    return tuple(
        ProvidedModel(model, snapshot_of(Path(spec.provided), model.commit))
        for model in models
        if (spec := recipe.model.get(model.name)) and spec.provided
    )


def models_of_bundle(bundle: Bundle) -> tuple[ProvidedModel, ...]:
    """Those of the bundle's models that the machine had when it was fetched."""
    places = bundle.record.provided_models
    return tuple(
        ProvidedModel(model, Path(places[model.name])) for model in bundle.lock.models if model.name in places
    )


def locked_model(
    folder: Path, models: Iterable[LockedModel], provided: Mapping[str, str]
) -> LockedModel | None:
    """Which of `models` lies in `folder`: the one that is provided there (name → folder), else the bundle's
    own, or a copy in a folder of the same name."""
    found = {model.name: model for model in models}
    place = os.path.realpath(folder)
    there = (name for name, path in provided.items() if os.path.realpath(path) == place)
    return found.get(next(there, folder.name))


def own_copy(recipe_name: str, model: LockedModel) -> str:
    """The way out where the folder is somebody else's, and wrong."""
    recipe = f"recipes/{recipe_name}.toml"
    if model.repo is None:
        return f"name another folder as `provided` of [model.{model.name}] in {recipe}"
    return (
        f"a copy of your own: take `provided` out of [model.{model.name}] in {recipe}, then: "
        f"envbuilder fetch {recipe}"
    )


def absent(provided: ProvidedModel) -> str:
    """The sentence for a folder that is not there."""
    return f"The model {provided.model.origin} is not at {provided.folder}, where the recipe says that it is."


def name_place(recipe_name: str, provided: ProvidedModel) -> str:
    """The remedy for it. A lock names no folder, so it stays as it is."""
    name, recipe = provided.model.name, f"recipes/{recipe_name}.toml"
    return (
        f"Name its folder on this machine as `provided` of [model.{name}] in {recipe}, then: "
        f"envbuilder fetch {recipe}"
    )


def check_place(provided: ProvidedModel, recipe_name: str) -> None:
    """MismatchError where files of the model are missing or can't be read, or are anybody's to change.

    Their sizes and bytes are not looked at.
    """
    model, folder = provided.model, provided.folder
    elsewhere = own_copy(recipe_name, model)
    files = provided.files
    missing = [file for file in files if not _is_file(file.path, elsewhere)]
    if missing:
        lacks = f"{len(missing)} of the {len(files)} files of the model {model.origin}"
        raise MismatchError(
            f"The folder {folder} lacks {lacks}." if folder.is_dir() else absent(provided),
            remedy=f"{name_place(recipe_name, provided)}; or {elsewhere}",
            context={
                "folder": folder,
                **{file.name: f"{file.size:,} bytes" for file in missing[:_NAMED]},
                **({"and": f"{len(missing) - _NAMED} more"} if len(missing) > _NAMED else {}),
            },
        )
    for file in files:
        if not os.access(file.path, os.R_OK):
            raise unreadable(file.path, elsewhere)
    for path in _writable_places(folder, files):
        if path.stat().st_mode & stat.S_IWOTH:
            raise MismatchError(
                f"Everybody may change {path}, where the model {model.origin} is.",
                remedy=f"Ask {_owner(path)} for: chmod o-w {path}; or {elsewhere}",
                context=_ownership(path),
            )


def snapshot_of(folder: Path, commit: str | None) -> Path:
    """The snapshot of `commit` where `folder` is one of the hub library's cache, else `folder` itself."""
    if commit and (snapshot := folder / "snapshots" / commit).is_dir():
        return snapshot
    return folder


def _is_file(path: Path, elsewhere: str) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, elsewhere) from error


def _writable_places(folder: Path, files: Iterable[ProvidedFile]) -> list[Path]:
    """Whoever may write there may put other bytes into the model."""
    return sorted({folder, *(file.path for file in files), *(file.path.parent for file in files)})


def unreadable(path: Path, elsewhere: str) -> MismatchError:
    """The error for `path`, or for the folder above it that lets nobody through."""
    closed = next((place for place in reversed(path.parents) if not os.access(place, os.X_OK)), path)
    return MismatchError(
        f"{closed} can't be read by you.",
        remedy=f"Ask {_owner(closed)} for: chmod -R g+rX {closed}, and to be in its group (id -Gn); "
        f"or {elsewhere}",
        context=_ownership(closed),
    )


def _ownership(path: Path) -> dict[str, object]:
    context: dict[str, object] = {"path": path}
    with suppress(OSError):
        found = path.stat()
        group = group_name(found.st_gid)
        context |= {"owner": _owner(path), "group": group, "mode": stat.filemode(found.st_mode)}
    return context


def _owner(path: Path) -> str:
    try:
        return account_name(path.stat().st_uid)
    except OSError:
        return "its owner"
