"""The `lock` stage: recipe → the text of its source lock.

1. `resolve.sources`: what each source package requires, read from its sdist without running it.
2. `resolve.groups`: a version of each package, for the three groups on each Python of the target.
3. `resolve.files`: each package's files, with hash and size.
4. `lock.compose_lock`: the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx

from envbuilder.errors import InputError
from envbuilder.index import DEFAULT_INDEX, Index
from envbuilder.lock import compose_lock, recipe_digest
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.requirements import tool_requires, trainer_requires
from envbuilder.resolve import Resolver
from envbuilder.resolve.files import choose_files
from envbuilder.resolve.groups import resolve_groups
from envbuilder.resolve.sources import read_source
from envbuilder.target import python_versions


def make_lock(
    recipe: Recipe,
    *,
    resolver: Resolver,
    indexes: Mapping[str, Index],
    client: httpx.Client,
    cache: Path,
    reporter: Reporter,
) -> str:
    """The text of `recipe`'s source lock. `cache` is a folder that may be deleted at any time.

    InputError where the recipe can't be resolved or an sdist says too little, NetworkError where an index
    fails, IntegrityError where it sends other bytes than it announced.
    """
    if not python_versions(recipe.target):
        raise InputError(
            f"No Python version that envbuilder knows is {recipe.target.python}.",
            remedy=f'Write a range such as ">=3.11,<3.14" under [target] in recipes/{recipe.name}.toml.',
            context={"got": recipe.target.python},
        )
    sources = {
        name: read_source(
            recipe,
            name,
            index=indexes[recipe.index.get(name, DEFAULT_INDEX)],
            client=client,
            reporter=reporter,
        )
        for name in sorted(recipe.build)
    }
    resolution = resolve_groups(
        recipe, sources, resolver=resolver, indexes=indexes, cache=cache, reporter=reporter
    )
    return compose_lock(
        recipe,
        digest=recipe_digest(recipe, trainer_requires(), tool_requires()),
        resolver=resolver.name,
        entries=choose_files(recipe, resolution, sources, indexes=indexes, reporter=reporter),
    )
