"""Versions for the three groups of a lock, on each Python of its target.

Runtime is resolved first; build and tool follow with the versions found so far as constraints, so that one
version of a package serves all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from envbuilder.errors import InputError
from envbuilder.index import DEFAULT_INDEX, Index, IndexFile
from envbuilder.lock import GROUPS, Group
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.requirements import tool_requires, trainer_requires
from envbuilder.resolve.protocol import KnownPackage, Request, Resolver, Versions
from envbuilder.resolve.sources import Source
from envbuilder.target import python_versions, target_for

# What torch's extension builder and every setup.py use without saying so.
_BUILD_TOOLS = ("ninja", "setuptools", "wheel")

Resolution = Mapping[Group, Mapping[str, Versions]]
"""Group → Python → the version of each package that the lock holds."""


def resolve_groups(
    recipe: Recipe,
    sources: Mapping[str, Source],
    *,
    resolver: Resolver,
    indexes: Mapping[str, Index],
    cache: Path,
    reporter: Reporter,
) -> Resolution:
    """All that the lock of `recipe` holds: without what the machine provides, and what is excluded.

    InputError where there is no solution, or the recipe contradicts itself.
    """
    groups = _Groups(recipe, sources, resolver, indexes, cache, reporter)
    groups.check_requirements()
    resolution: dict[Group, dict[str, Versions]] = {group: {} for group in GROUPS}
    for python in python_versions(recipe.target):
        found: Versions = {}
        for group in GROUPS:
            resolution[group][python] = groups.resolve(group, python, found)
            found = {**found, **resolution[group][python]}
    groups.check_result(resolution)
    return resolution


class _Groups:
    """The requirements of a recipe's groups, and whom to ask about them."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, Source],
        resolver: Resolver,
        indexes: Mapping[str, Index],
        cache: Path,
        reporter: Reporter,
    ) -> None:
        self.recipe = recipe
        self.sources = sources
        self.resolver = resolver
        self.indexes = indexes
        self.cache = cache
        self.reporter = reporter
        self.requirements: dict[Group, tuple[str, ...]] = {
            "runtime": (*recipe.requirements, *(trainer_requires() if recipe.trainer else ())),
            "build": tuple(_build_requirements(recipe, sources)),
            "tool": tool_requires(),
        }
        self.known_sources = tuple(
            KnownPackage(name, (source.metadata.version,), source.metadata.requires)
            for name, source in sources.items()
        )
        self.provided = tuple(self._provided())

    def resolve(
        self, group: Group, python: str, found: Versions, excluded: frozenset[str] | None = None
    ) -> Versions:
        """The versions that `group` needs on `python`, given those `found` for the groups before it."""
        if not self.requirements[group]:
            return {}
        self.reporter.stage(f"resolving {group} for Python {python} with {self.resolver.name}")
        # The tool runs on its own: without the machine's packages, and with all that it requires.
        provided = self.provided if group != "tool" else ()
        if excluded is None:
            excluded = self.recipe.excluded_names if group != "tool" else frozenset()
        versions = self.resolver.resolve(
            Request(
                what=f"the {group} requirements of {self.recipe.name}",
                remedy=f"Change the requirements that it names in recipes/{self.recipe.name}.toml.",
                requirements=self.requirements[group],
                constraints=(
                    *(f"{name}=={version}" for name, version in sorted(found.items())),
                    *(self._provided_constraints() if provided else ()),
                ),
                known=(*(_without(package, excluded) for package in self.known_sources), *provided),
                excluded=excluded,
                target=target_for(self.recipe.target, python),
                glibc=self.recipe.target.glibc,
                indexes={name: index.url for name, index in self.indexes.items()},
                bindings=self.recipe.index,
                cache=self.cache,
            )
        )
        left_out = {package.name for package in provided}
        return {name: version for name, version in sorted(versions.items()) if name not in left_out}

    def check_requirements(self) -> None:
        """InputError where the recipe excludes, or binds to an index, what it can't."""
        file = f"recipes/{self.recipe.name}.toml"
        direct = {_name(text) for text in (*self.requirements["runtime"], *self.requirements["build"])}
        if both := sorted(direct & self.recipe.excluded_names):
            raise InputError(
                f"The recipe {self.recipe.name} both requires and excludes {', '.join(both)}.",
                remedy=f"Delete it from requirements or from [[exclude]] in {file}.",
                context={"packages": ", ".join(both)},
            )
        if indirect := sorted(set(self.recipe.index) - direct):
            raise InputError(
                f"[index] names {', '.join(indirect)}, which {self.recipe.name} doesn't require itself.",
                remedy=f"Add it to requirements in {file}, or delete it from [index].",
                context={"packages": ", ".join(indirect)},
            )

    def check_result(self, resolution: Resolution) -> None:
        """InputError for a [build] table that serves nothing; a warning for such an exclusion."""
        for name in self.sources:
            if not any(name in versions for pythons in resolution.values() for versions in pythons.values()):
                raise InputError(
                    f"Nothing in {self.recipe.name} requires {name}, so [build.{name}] is in vain.",
                    remedy=f"Require {name} in recipes/{self.recipe.name}.toml, or delete [build.{name}].",
                    context={"package": name},
                )
        for name in sorted(self._vain_exclusions()):
            self.reporter.warn(f"[[exclude]] names {name}, which nothing in {self.recipe.name} requires.")

    def _vain_exclusions(self) -> set[str]:
        required = {_name(text) for package in self.known_sources for text in package.requires}
        unseen = self.recipe.excluded_names - required
        if not unseen:
            return set()
        python = python_versions(self.recipe.target)[0]
        try:
            versions = self.resolve("runtime", python, {}, excluded=self.recipe.excluded_names - unseen)
        except InputError:
            return set()  # without the exclusions there is no solution: they are not in vain
        return set(unseen - set(versions))

    def _provided(self) -> Iterator[KnownPackage]:
        """The machine's packages, without requirements: the machine has those too."""
        for text in self.recipe.provided.packages if self.recipe.provided else ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            versions = tuple(
                s.version for s in requirement.specifier if s.operator == "==" and "*" not in str(s)
            )
            if not versions:
                # Any that the machine may have: which it is, `compile` and `install` look.
                index = self.indexes[self.recipe.index.get(name, DEFAULT_INDEX)]
                released = {version for file in index.files(name) if (version := _wheel_version(file))}
                versions = tuple(map(str, sorted(requirement.specifier.filter(released))))
            yield KnownPackage(name, versions, ())

    def _provided_constraints(self) -> Iterator[str]:
        for text in self.recipe.provided.packages if self.recipe.provided else ():
            requirement = Requirement(text)
            yield f"{requirement.name}{requirement.specifier}"


def _build_requirements(recipe: Recipe, sources: Mapping[str, Source]) -> Iterable[str]:
    if recipe.cuda:
        yield from recipe.cuda.toolchain_requirements
    for name, source in sources.items():
        yield from source.metadata.build_requires
        yield from recipe.build[name].build_requires
    if sources:
        yield from _BUILD_TOOLS


def _without(package: KnownPackage, excluded: frozenset[str]) -> KnownPackage:
    requires = tuple(text for text in package.requires if _name(text) not in excluded)
    return KnownPackage(package.name, package.versions, requires)


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _wheel_version(file: IndexFile) -> Version | None:
    try:
        return parse_wheel_filename(file.filename)[1]
    except InvalidWheelFilename:
        return None
