"""What a bundle holds besides the tool, and how each file of it is brought."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import httpx

from envbuilder.bundle import copy_verified
from envbuilder.download import download
from envbuilder.errors import MismatchError
from envbuilder.git import pack_tree
from envbuilder.index import Index
from envbuilder.lock import (
    FILES,
    GROUPS,
    MODELS,
    LockedFile,
    LockedModel,
    LockedModelFile,
    LockedPatch,
    SourceLock,
)
from envbuilder.provided_models import models_of_recipe
from envbuilder.recipe import Recipe
from envbuilder.target import Target

if TYPE_CHECKING:
    from envbuilder.hub import Hub

OnBytes = Callable[[int], None]
Fill = Callable[[Path, OnBytes], None]
"""Writes a file's bytes to a path that may hold a beginning of them, and answers for their size and hash."""


@dataclass(frozen=True)
class Wanted:
    """One file that a lock names, at its place in a bundle."""

    path: str
    """Relative to the bundle, with "/"."""
    size: int
    """Bytes."""
    sha256: str
    fill: Fill


@dataclass(frozen=True)
class Origins:
    """Where files come from."""

    indexes: Mapping[str, Index]
    client: httpx.Client
    hub: Hub | None
    """None where the lock has no models."""
    recipe_folder: Path
    """The folder that the recipe's patches are relative to."""


def wanted_files(recipe: Recipe, lock: SourceLock, target: Target, origins: Origins) -> tuple[Wanted, ...]:
    """All that a bundle for `target` holds by `lock`; MismatchError where a package has no file for it."""
    return tuple(_wanted(recipe, lock, target, origins))


def stored_files(recipe: Recipe, lock: SourceLock, target: Target, recipe_folder: Path) -> tuple[Wanted, ...]:
    """The same files, and nobody is asked: whoever fills another one than a patch is told that it is gone."""
    patches = {patch.path for patch in lock.patches}
    offline = Origins(indexes={}, client=httpx.Client(), hub=None, recipe_folder=recipe_folder)
    return tuple(
        file if file.path in patches else replace(file, fill=_gone(file.path))
        for file in _wanted(recipe, lock, target, offline)
    )


def _wanted(recipe: Recipe, lock: SourceLock, target: Target, origins: Origins) -> Iterator[Wanted]:
    for file in lock.select(target, GROUPS):
        fill = _from_git(recipe, lock, file) if file.index is None else _from_index(file, origins)
        yield Wanted(f"{FILES}/{file.filename}", file.size, file.sha256, fill)
    provided = {one.model.name for one in models_of_recipe(recipe, lock.models)}
    for model in lock.models:
        if model.name not in provided:
            yield from _of_model(model, origins)
    for patch in lock.patches:
        yield Wanted(patch.path, patch.size, patch.sha256, _from_folder(recipe, patch, origins.recipe_folder))


def _gone(path: str) -> Fill:
    def fill(part: Path, on_bytes: OnBytes) -> None:
        raise MismatchError(
            f"Another process has removed {path} from the store meanwhile.",
            remedy="Run the same command again.",
            context={"file": path},
        )

    return fill


def _from_index(file: LockedFile, origins: Origins) -> Fill:
    def fill(part: Path, on_bytes: OnBytes) -> None:
        assert file.index is not None  # the caller has looked
        offer = origins.indexes[file.index].offer_of(file)
        if offer.path is not None:
            copy_verified(offer.path, file.sha256, file.size, part, remedy=offer.remedy)
            on_bytes(file.size)
        else:
            download(
                origins.client, offer.url, sha256=file.sha256, size=file.size, part=part, on_bytes=on_bytes
            )

    return fill


def _from_git(recipe: Recipe, lock: SourceLock, file: LockedFile) -> Fill:
    def fill(part: Path, on_bytes: OnBytes) -> None:
        git = recipe.build[file.package].git
        if git is None:
            raise _moved_on(recipe, f"{file.package} is locked from git, and the recipe names no git source")
        with TemporaryDirectory(prefix=".git-", dir=part.parent) as folder:
            packed = Path(folder) / file.filename
            pack_tree(
                file.package,
                git,
                name=file.package,
                version=file.version,
                destination=packed,
                tree=lock.tree_of(file.package),
            )
            again = f"envbuilder lock recipes/{recipe.name}.toml"
            copy_verified(packed, file.sha256, file.size, part, remedy=again)
        on_bytes(file.size)

    return fill


def _of_model(model: LockedModel, origins: Origins) -> Iterator[Wanted]:
    for file in model.files:

        def fill(part: Path, on_bytes: OnBytes, file: LockedModelFile = file) -> None:
            assert origins.hub is not None  # there is one where the lock has models
            url = origins.hub.file_url(model, file)
            download(
                origins.hub.client, url, sha256=file.sha256, size=file.size, part=part, on_bytes=on_bytes
            )

        yield Wanted(f"{MODELS}/{model.name}/{file.name}", file.size, file.sha256, fill)


def _from_folder(recipe: Recipe, patch: LockedPatch, folder: Path) -> Fill:
    def fill(part: Path, on_bytes: OnBytes) -> None:
        if not (folder / patch.path).is_file():
            raise _moved_on(recipe, f"{folder / patch.path} is not there")
        again = f"envbuilder lock recipes/{recipe.name}.toml"
        copy_verified(folder / patch.path, patch.sha256, patch.size, part, remedy=again)
        on_bytes(patch.size)

    return fill


def _moved_on(recipe: Recipe, what: str) -> MismatchError:
    return MismatchError(
        f"The recipe {recipe.name} has moved on from its lock: {what}.",
        remedy=f"envbuilder lock recipes/{recipe.name}.toml",
    )
