"""The `lock` stage: recipe → the text of its source lock.

1. `target.narrow_target`: with a probed machine, for that one alone.
2. `resolve.sources`: what each source package requires, from its sdist or git tree, not run.
3. `resolve.groups`: a version of each package, for the three groups on each Python of the target; with a
   probed machine, `resolve.gpus` holds torch's CUDA against its driver and GPUs.
4. `resolve.files`: each package's files, with hash and size, and its license.
5. `hub`: each model's commit and files; `model_folder` where a model is on no hub.
6. `lock_text.compose_lock`: the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import httpx

from envbuilder.errors import InputError
from envbuilder.hash_record import HashRecord
from envbuilder.hub import Hub
from envbuilder.index import DEFAULT_INDEX, Index
from envbuilder.lock import LockedModel, LockedPatch, SourceLock
from envbuilder.lock_text import compose_lock
from envbuilder.machine import MachineRecord
from envbuilder.model_folder import lock_folder
from envbuilder.patches import locked_patches
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.requirements import current_digest
from envbuilder.resolve import Resolver
from envbuilder.resolve.files import choose_files
from envbuilder.resolve.gpus import check_capabilities, check_cuda
from envbuilder.resolve.groups import choose_sources, resolve_groups
from envbuilder.resolve.kept import kept_version, kept_versions
from envbuilder.resolve.sources import offered_sdists, read_source
from envbuilder.target import narrow_target, python_versions


def make_lock(
    recipe: Recipe,
    *,
    folder: Path,
    resolver: Resolver,
    indexes: Mapping[str, Index],
    client: httpx.Client,
    hub: Hub | None,
    cache: Path,
    reporter: Reporter,
    machine: MachineRecord | None = None,
    kept: SourceLock | None = None,
    upgrade: frozenset[str] = frozenset(),
) -> str:
    """The text of `recipe`'s source lock. `cache` is a folder that may be deleted at any time.

    `folder` is the recipe's, which its patches are relative to; `hub` is there if the recipe has models;
    `machine`, if given, is the one machine to lock for. What `kept` (the lock so far) holds stays where it
    still fits, but for the packages and models named in `upgrade`.

    InputError where the recipe can't be resolved or an sdist says too little, NetworkError where an index
    fails, IntegrityError where it sends other bytes than it announced, MismatchError where the recipe doesn't
    admit `machine`, compiles nothing that its GPUs run, or leads to a torch that can't run there.
    """
    if not python_versions(recipe.target):
        raise InputError(
            f"No Python version that envbuilder knows is {recipe.target.python}.",
            remedy=f'Write a range such as ">=3.11,<3.14" under [target] in recipes/{recipe.name}.toml.',
            context={"got": recipe.target.python},
        )
    patches = locked_patches(recipe, folder)
    digest = current_digest(recipe, patches)
    if machine:
        recipe = narrow_target(recipe, machine)
        check_capabilities(recipe, machine)
    elif kept and kept.target != recipe.target:
        reporter.note("The lock so far was for another target than the recipe's own [target], as it is now.")
    versions = kept_versions(kept, recipe.target, upgrade - recipe.model.keys())
    index_of = {name: indexes[recipe.index.get(name, DEFAULT_INDEX)] for name in sorted(recipe.build)}
    chosen = choose_sources(
        recipe,
        {
            name: _offered_versions(recipe, name, index, kept_version(versions, name))
            for name, index in index_of.items()
            if recipe.build[name].git is None
        },
        resolver=resolver,
        indexes=indexes,
        cache=cache,
        reporter=reporter,
    )
    sources = {
        name: read_source(
            recipe, name, index=index, client=client, cache=cache, kept=chosen.get(name), reporter=reporter
        )
        for name, index in index_of.items()
    }
    resolution = resolve_groups(
        recipe, sources, resolver=resolver, indexes=indexes, cache=cache, reporter=reporter, kept=versions
    )
    if machine:
        check_cuda(recipe, resolution, machine)
    entries = choose_files(
        recipe, resolution, sources, indexes=indexes, reporter=reporter, patches=_by_package(recipe, patches)
    )
    return compose_lock(
        recipe,
        digest=digest,
        resolver=resolver.name,
        entries=entries,
        models=_lock_models(recipe, hub, cache, kept, upgrade, reporter) if hub else (),
    )


def _offered_versions(recipe: Recipe, name: str, index: Index, kept: str | None) -> tuple[str, ...]:
    """The versions of which an sdist may be taken, newest first; `kept` alone if it is one of them."""
    offered = tuple(offered_sdists(recipe, name, index))
    return (kept,) if kept is not None and kept in offered else offered


def _lock_models(
    recipe: Recipe,
    hub: Hub,
    cache: Path,
    kept: SourceLock | None,
    upgrade: frozenset[str],
    reporter: Reporter,
) -> list[LockedModel]:
    before = {model.name: model for model in kept.models if model.name not in upgrade} if kept else {}
    # Kept when all is done too: the next lock of the same files need not read them.
    from_folder = partial(lock_folder, record=HashRecord(cache / "lock" / f"{recipe.name}.hashed"))
    return [
        (hub.lock_model if spec.repo else from_folder)(name, spec, kept=before.get(name), reporter=reporter)
        for name, spec in sorted(recipe.model.items())
    ]


def _by_package(recipe: Recipe, patches: Sequence[LockedPatch]) -> dict[str, tuple[LockedPatch, ...]]:
    by_path = {patch.path: patch for patch in patches}
    return {name: tuple(by_path[path] for path in build.patches) for name, build in recipe.build.items()}
