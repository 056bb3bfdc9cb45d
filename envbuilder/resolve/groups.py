"""Versions for the three groups of a lock, on each Python of its target.

Runtime is resolved first; build and tool follow with the versions found so far as constraints, so that one
version of a package serves all groups. Where that can't be, the tool alone has versions of its own: it never
runs in the same environment as the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from envbuilder.errors import EnvbuilderError, InputError
from envbuilder.index import DEFAULT_INDEX, Index, IndexFile
from envbuilder.lock import GROUPS, Group
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.requirements import BUILD_TOOLS, required_name, tool_requires, trainer_requires
from envbuilder.resolve.combined_index import CombinedIndex, open_combined_index
from envbuilder.resolve.diagnosis import explained, releases_above
from envbuilder.resolve.kept import Resolution
from envbuilder.resolve.protocol import NoSolution, Request, Resolver, Versions
from envbuilder.resolve.sources import Source
from envbuilder.stubs import KnownPackage
from envbuilder.target import python_versions, target_for


def resolve_groups(
    recipe: Recipe,
    sources: Mapping[str, Source],
    *,
    resolver: Resolver,
    indexes: Mapping[str, Index],
    cache: Path,
    reporter: Reporter,
    kept: Resolution | None = None,
) -> Resolution:
    """All that the lock of `recipe` holds: without what the machine provides, and what is excluded.

    A version in `kept` (`kept_versions` of the old lock) stays where it still fits. InputError where there is
    no solution, or the recipe contradicts itself.
    """
    wanted = _wanted(recipe, sources, indexes)
    with _asked(recipe, indexes, cache) as index:
        groups = _GroupResolver(recipe, wanted, resolver, indexes, index, kept or {}, reporter)
        resolution = groups.resolution()
        groups.warn_of_newer(resolution["runtime"])
        _check_result(recipe, sources, resolution)
        for name in sorted(groups.vain_exclusions()):
            reporter.warn(f"[[exclude]] names {name}, which nothing in {recipe.name} requires.")
    return resolution


def choose_sources(
    recipe: Recipe,
    offered: Mapping[str, tuple[str, ...]],
    *,
    resolver: Resolver,
    indexes: Mapping[str, Index],
    cache: Path,
    reporter: Reporter,
) -> Versions:
    """A version of each source package in `offered` (name → versions, newest first): the newest that the
    runtime's other packages admit; without a solution the newest of all, for `resolve_groups` to explain."""
    chosen = {name: versions[0] for name, versions in offered.items()}
    if all(len(versions) == 1 for versions in offered.values()):
        return chosen
    # What each of them requires is known only once it has been read.
    sources = tuple(KnownPackage(name, versions, ()) for name, versions in offered.items())
    wanted = replace(_wanted(recipe, {}, indexes), sources=sources)
    reporter.stage(f"choosing the versions of {', '.join(offered)}")
    with _asked(recipe, indexes, cache) as index:
        groups = _GroupResolver(recipe, wanted, resolver, indexes, index, {}, reporter)
        try:
            found = groups.answer("runtime", python_versions(recipe.target)[0], {})
        except InputError:
            return chosen
    return {
        name: found[name] if found.get(name) in versions else chosen[name]
        for name, versions in offered.items()
    }


@dataclass(frozen=True)
class _Wanted:
    """What is resolved."""

    requirements: Mapping[Group, tuple[str, ...]]
    sources: tuple[KnownPackage, ...]
    provided: tuple[KnownPackage, ...]
    """The machine's packages, without requirements: the machine has those too."""


@dataclass(frozen=True)
class _Asked:
    """Where a resolver looks."""

    url: str
    cache: Path
    combined: CombinedIndex | None = None


@dataclass(frozen=True)
class _GroupResolver:
    """Asks the resolver, group by group."""

    recipe: Recipe
    wanted: _Wanted
    resolver: Resolver
    indexes: Mapping[str, Index]
    asked: _Asked
    kept: Resolution
    reporter: Reporter

    def resolution(self) -> Resolution:
        resolution: dict[Group, dict[str, Versions]] = {group: {} for group in GROUPS}
        for python in python_versions(self.recipe.target):
            found: Versions = {}
            for group in GROUPS:
                resolution[group][python] = self.resolve(group, python, found)
                found = {**found, **resolution[group][python]}
        return resolution

    def resolve(
        self, group: Group, python: str, found: Versions, excluded: frozenset[str] | None = None
    ) -> Versions:
        """The versions that `group` needs on `python`, given those `found` for the groups before it."""
        if not self.wanted.requirements[group]:
            return {}
        self.reporter.stage(f"resolving {group} for Python {python} with {self.resolver.name}")
        try:
            return self.answer(group, python, found, excluded)
        except NoSolution as error:
            if group == "tool" and found:
                return self.answer(group, python, {}, excluded)
            raise explained(error, self.recipe, python, self.index_of) from error

    def answer(
        self, group: Group, python: str, found: Versions, excluded: frozenset[str] | None = None
    ) -> Versions:
        """As `resolve`, in one question, and with the resolver's own error."""
        # The tool runs on its own: without the machine's packages, and with all that it requires.
        provided = self.wanted.provided if group != "tool" else ()
        if excluded is None:
            excluded = self.recipe.excluded_names if group != "tool" else frozenset()
        known = (*(_without(package, excluded) for package in self.wanted.sources), *provided)
        kept = self.kept.get(group, {}).get(python, {})
        request = Request(
            what=f"the {group} requirements of {self.recipe.name}",
            remedy=f"Change the requirements that it names in recipes/{self.recipe.name}.toml.",
            requirements=self.wanted.requirements[group],
            constraints=(
                *(f"{name}=={version}" for name, version in sorted(found.items())),
                *(self.only_sdists(source) for source in self.wanted.sources),
                *(_provided_requirements(self.recipe) if provided else ()),
            ),
            known=known,
            excluded=excluded,
            target=target_for(self.recipe.target, python),
            glibc=self.recipe.target.glibc,
            index_url=self.asked.url,
            preferences={
                name: found.get(name, version)
                for name, version in kept.items()
                if name not in {package.name for package in known}
            },
            cache=self.asked.cache,
        )
        versions = self.ask(request)
        left_out = {package.name for package in provided}
        return {name: version for name, version in sorted(versions.items()) if name not in left_out}

    def ask(self, request: Request) -> Versions:
        try:
            return self.resolver.resolve(request)
        except EnvbuilderError as error:
            if self.asked.combined and self.asked.combined.failure:
                raise self.asked.combined.failure from error
            raise

    def index_of(self, name: str) -> Index:
        return _index_of(self.recipe, self.indexes, name)

    def only_sdists(self, source: KnownPackage) -> str:
        """Bars the wheels that the index may have of other versions than those of the sdists."""
        if len(source.versions) == 1:
            return f"{source.name}=={source.versions[0]}"
        files = self.index_of(source.name).files(source.name)
        released = {version for file in files if (version := _wheel_version(file))}
        others = sorted(released - set(map(Version, source.versions)))
        return source.name + ",".join(f"!={version}" for version in others)

    def warn_of_newer(self, runtime: Mapping[str, Versions]) -> None:
        """Warns where a package that the recipe requires isn't the newest that it admits, and says why; not
        where it was kept."""
        compiled = {source.name for source in self.wanted.sources}
        told: set[tuple[str, str, str]] = set()
        for python, versions in runtime.items():
            kept = self.kept.get("runtime", {}).get(python, {})
            for requirement in map(Requirement, self.recipe.requirements):
                name = canonicalize_name(requirement.name)
                if name in compiled or name not in versions or versions[name] == kept.get(name):
                    continue
                newer = releases_above(
                    self.index_of(name).files(name), requirement.specifier, versions[name], python
                )
                if newer and (key := (name, versions[name], str(newer[-1]))) not in told:
                    told.add(key)
                    # The next one too: what keeps the newest away may be another thing.
                    reasons = dict.fromkeys(self.why_not(name, newer[i], python) for i in (-1, 0))
                    self.reporter.warn(
                        f"{name} {versions[name]} is locked, though {self.recipe.name} admits {newer[-1]}. "
                        + " ".join(reasons)
                    )

    def why_not(self, name: str, version: Version, python: str) -> str:
        try:
            self.answer("runtime", python, {name: str(version)})
        except NoSolution as error:
            reason = explained(error, self.recipe, python, self.index_of)
            if "no wheel" in reason.context:
                return f"{version}: {reason.context['no wheel']}. {reason.remedy}"
            return f"{version}: {error.said.removeprefix('No solution found when resolving dependencies ')}"
        return f"{version} fits, with older versions of others: require {name}=={version} to have it."

    def vain_exclusions(self) -> set[str]:
        required = {required_name(text) for package in self.wanted.sources for text in package.requires}
        unseen = self.recipe.excluded_names - required
        if not unseen:
            return set()
        python = python_versions(self.recipe.target)[0]
        try:
            versions = self.resolve("runtime", python, {}, excluded=self.recipe.excluded_names - unseen)
        except InputError:
            return set()  # without the exclusions there is no solution: they are not in vain
        return set(unseen - set(versions))


@contextmanager
def _asked(recipe: Recipe, indexes: Mapping[str, Index], cache: Path) -> Iterator[_Asked]:
    """The default index; where the recipe binds packages to others, one index of them all."""
    if not recipe.index:
        yield _Asked(indexes[DEFAULT_INDEX].url, cache)
        return
    # Its URL is another one each time, and a resolver's cache is by URL: it would only grow.
    with (
        TemporaryDirectory(prefix="envbuilder-cache-") as folder,
        open_combined_index(indexes, recipe.index) as combined,
    ):
        yield _Asked(combined.url, Path(folder), combined)


def _wanted(recipe: Recipe, sources: Mapping[str, Source], indexes: Mapping[str, Index]) -> _Wanted:
    requirements: dict[Group, tuple[str, ...]] = {
        "runtime": (*recipe.requirements, *(trainer_requires() if recipe.trainer else ())),
        "build": tuple(_build_requirements(recipe, sources)),
        "tool": tool_requires(),
    }
    direct = {required_name(text) for text in (*requirements["runtime"], *requirements["build"])}
    if both := sorted(direct & recipe.excluded_names):
        raise InputError(
            f"The recipe {recipe.name} both requires and excludes {', '.join(both)}.",
            remedy=f"Delete it from requirements or from [[exclude]] in recipes/{recipe.name}.toml.",
            context={"packages": ", ".join(both)},
        )
    known = tuple(
        KnownPackage(name, (source.metadata.version,), source.metadata.requires)
        for name, source in sources.items()
    )
    return _Wanted(requirements, known, tuple(_provided(recipe, indexes)))


def _check_result(recipe: Recipe, sources: Mapping[str, Source], resolution: Resolution) -> None:
    """InputError for a [build] table, or an entry of [index], that serves nothing."""
    needed = {name for pythons in resolution.values() for versions in pythons.values() for name in versions}
    file = f"recipes/{recipe.name}.toml"
    for name in sources:
        if name not in needed:
            raise InputError(
                f"Nothing in {recipe.name} requires {name}, so [build.{name}] is in vain.",
                remedy=f"Require {name} in {file}, or delete [build.{name}].",
                context={"package": name},
            )
    # A binding in vain may be one that was meant for another package, which then came from elsewhere.
    if vain := sorted(set(recipe.index) - needed - recipe.provided_names):
        raise InputError(
            f"[index] names {', '.join(vain)}, which nothing in {recipe.name} requires.",
            remedy=f"Write its right name, or delete it from [index] in {file}.",
            context={"packages": ", ".join(vain)},
        )


def _provided(recipe: Recipe, indexes: Mapping[str, Index]) -> Iterator[KnownPackage]:
    for text in _provided_requirements(recipe):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        versions = tuple(s.version for s in requirement.specifier if s.operator == "==" and "*" not in str(s))
        if not versions:
            # Any that the machine may have: which it is, `compile` and `install` look.
            files = _index_of(recipe, indexes, name).files(name)
            released = {version for file in files if (version := _wheel_version(file))}
            versions = tuple(map(str, sorted(requirement.specifier.filter(released))))
        yield KnownPackage(name, versions, ())


def _provided_requirements(recipe: Recipe) -> Iterator[str]:
    for text in recipe.provided.packages if recipe.provided else ():
        requirement = Requirement(text)
        yield f"{requirement.name}{requirement.specifier}"


def _build_requirements(recipe: Recipe, sources: Mapping[str, Source]) -> Iterable[str]:
    if recipe.cuda:
        yield from recipe.cuda.toolchain_requirements
    for name, source in sources.items():
        yield from source.metadata.build_requires
        yield from recipe.build[name].build_requires
    if sources:
        yield from BUILD_TOOLS


def _index_of(recipe: Recipe, indexes: Mapping[str, Index], name: str) -> Index:
    return indexes[recipe.index.get(name, DEFAULT_INDEX)]


def _without(package: KnownPackage, excluded: frozenset[str]) -> KnownPackage:
    requires = tuple(text for text in package.requires if required_name(text) not in excluded)
    return KnownPackage(package.name, package.versions, requires)


def _wheel_version(file: IndexFile) -> Version | None:
    try:
        return parse_wheel_filename(file.filename)[1]
    except InvalidWheelFilename:
        return None
