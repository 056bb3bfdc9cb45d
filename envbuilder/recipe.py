"""The recipe: what a person wants, as TOML. Parses and validates; touches nothing else.

Keys are written in kebab-case. An unknown key, a wrong type and an impossible value are all errors
(exit 3) that name the file and the key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, Field, model_validator

from envbuilder.toml_input import AbsolutePath, EnvName, Table, load_table, pattern


def _requirement(text: str) -> str:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"not a PEP 508 requirement: {error}") from error
    if requirement.url is not None:
        raise ValueError("a requirement can't carry a URL: name an index instead")
    return text


def _specifiers(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(f"not a version specifier: {error}") from error
    return text


def _version(text: str) -> str:
    try:
        return str(Version(text))
    except InvalidVersion as error:
        raise ValueError(f"not a PEP 440 version: {error}") from error


RequirementText = Annotated[str, AfterValidator(_requirement)]
ComputeCapability = Annotated[str, pattern(r"\d{1,2}\.\d[af]?", 'a compute capability such as "9.0"')]
# No dot: PEP 751 allows none in the NAME of pylock.NAME.toml.
RecipeName = Annotated[str, pattern(r"[a-z0-9][a-z0-9_-]*", "a name of a-z, 0-9, - and _")]
ModelName = Annotated[
    str, pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a model's name of letters, digits, ., - and _")
]
RepoName = Annotated[
    str, pattern(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", 'a repository on the hub, "owner/name"')
]
# A branch or a tag can move; a commit can't.
Commit = Annotated[str, pattern(r"[0-9a-f]{40}", "a full commit of 40 hexadecimal digits")]
# Below the recipe's folder, so that a bundle can hold it at the same place.
PatchPath = Annotated[
    str,
    pattern(
        r"patches/(?!.*(?:^|/)\.\.?(?:/|$))[\w.+-]+(?:/[\w.+-]+)*", "a path below patches/ beside the recipe"
    ),
]
TreePath = Annotated[
    str, pattern(r"(?!.*(?:^|/)\.\.?(?:/|$))[\w.+-]+(?:/[\w.+-]+)*", "a path inside the source tree")
]
GitUrl = Annotated[
    str,
    pattern(
        r"(?:https|http|ssh|file)://[^\s@]+|ssh://\w+@\S+|\w+@[\w.-]+:\S+", "a git URL without credentials"
    ),
]
IndexName = Annotated[str, pattern(r"[a-z0-9][a-z0-9-]*", "an index's name of a-z, 0-9 and -")]


class TargetSpec(Table):
    """`[target]`: the machines that the lock is for."""

    python: Annotated[str, AfterValidator(_specifiers)] = ">=3.11,<3.14"
    """Python versions that one lock serves."""
    machine: Literal["x86_64", "aarch64"] = "x86_64"
    glibc: Annotated[str, pattern(r"2\.\d+", 'a glibc version such as "2.28"')] = "2.28"
    """The oldest glibc that the environment must run on."""


class CudaSpec(Table):
    """`[cuda]`: GPU code in what is compiled."""

    compute_capabilities: tuple[ComputeCapability, ...] = Field(default=("9.0",), min_length=1)
    ptx: bool = False
    """Add PTX of the newest of them, from which newer GPUs compile for themselves."""
    detect: bool = False
    """Where a GPU is present, compile for its compute capability instead."""
    toolchain: Literal["packages", "system"] = "packages"
    """nvcc from locked packages, whatever is on the PATH; or the machine's own (CUDA_HOME, else PATH)."""
    toolchain_requirements: tuple[RequirementText, ...] = ()
    """The packages that hold nvcc and the CUDA headers, for `toolchain = "packages"`."""

    @model_validator(mode="after")
    def _toolchain_has_packages(self) -> CudaSpec:
        if (self.toolchain == "packages") != bool(self.toolchain_requirements):
            raise ValueError('toolchain-requirements goes with toolchain = "packages", and only with it')
        return self


class GitSource(Table):
    """`[build.PACKAGE.git]`: the source tree of one commit, in place of an sdist from an index."""

    url: GitUrl
    """Where to clone from; never written into a lock. ENVBUILDER_GIT_<PACKAGE>_URL stands in for it."""
    commit: Commit
    subdirectory: TreePath | None = None
    """Where the project lies in the tree, if not at its top."""


class SourceBuild(Table):
    """`[build.PACKAGE]`: one package that is compiled from its sdist."""

    git: GitSource | None = None
    version: Annotated[str, AfterValidator(_version)] | None = None
    """Of a git source whose files don't state it."""
    patches: tuple[PatchPath, ...] = ()
    """Patches in git's format, applied in this order with their first path component dropped (`-p1`)."""

    requires: tuple[RequirementText, ...] | None = None
    """What the built wheel needs at run time, where the sdist's own metadata can't be believed."""
    build_requires: tuple[RequirementText, ...] = ()
    """Build requirements beside those of the sdist's pyproject.toml."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Variables for the build, e.g. those that stop a setup.py from guessing a download's URL."""
    modules: tuple[str, ...] = ()
    """Extension modules that the wheel must hold, by their import names."""
    gpu: bool = True
    """Whether those modules hold GPU code."""
    shards: Literal["auto", "never", "force"] = "auto"
    """Compile a CUDA unit's explicit instantiations apart: where that is provably the same, never, or
    wherever the text can be cut and the objects don't contradict it."""


class ModelSpec(Table):
    """`[model.NAME]`: a model's files: from the hub, in a bundle's `models/NAME/`, or the machine's own."""

    repo: RepoName | None = None
    """Without one it is on no hub, and the folder's own files are what is locked."""
    revision: Commit | None = None
    """The commit; without one, `lock` takes the newest and keeps it until `lock --upgrade`."""
    remote_code: tuple[str, ...] | None = None
    """The repository's Python files to bring; an empty list says that the model runs without them."""
    provided: AbsolutePath | None = None
    """The folder in which the machine has it: verified there, never copied."""

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> ModelSpec:
        if self.repo is None and self.provided is None:
            raise ValueError("name a repo on the hub, a folder that is provided, or both")
        if self.repo is None and self.revision is not None:
            raise ValueError("revision goes with repo")
        return self

    @property
    def commit(self) -> str | None:
        """The commit that is asked for: `revision`, else that of a snapshot in the hub library's cache."""
        if self.revision is not None or self.repo is None:
            return self.revision
        found = re.search(r"/snapshots/([0-9a-f]{40})/*\Z", self.provided or "")
        return found[1] if found else None


class Exclusion(Table):
    """`[[exclude]]`: a requirement that a package declares and this use never imports."""

    package: str
    reason: Annotated[str, Field(min_length=1)]


class Provided(Table):
    """`[provided]`: packages of the machine (a module, a venv, a container), left out of the bundle."""

    python: str = "python3"
    """The interpreter that has them: a path, or a name on the PATH."""
    packages: tuple[RequirementText, ...] = Field(min_length=1)


class Recipe(Table):
    """A recipe file. `load_recipe` reads one."""

    name: RecipeName
    description: str = ""
    requirements: tuple[RequirementText, ...] = Field(min_length=1)
    trainer: bool = True
    """Install the bundled trainer and what it needs."""
    target: TargetSpec = TargetSpec()
    cuda: CudaSpec | None = None
    build: dict[str, SourceBuild] = Field(default_factory=dict)
    exclude: tuple[Exclusion, ...] = ()
    provided: Provided | None = None
    model: dict[ModelName, ModelSpec] = Field(default_factory=dict)
    index: dict[str, IndexName] = Field(default_factory=dict)
    """`[index]`: package → the name of the index that it comes from (all others: `default`)."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for table in (self.build, self.index):
            for name in table:
                if name != canonicalize_name(name):
                    raise ValueError(f"write the package's normalised name: {canonicalize_name(name)!r}")
        for name, build in self.build.items():
            if len(set(build.patches)) < len(build.patches):
                raise ValueError(f"build.{name}.patches names a patch twice")
            if build.version is not None and build.git is None:
                raise ValueError(
                    f"build.{name}.version is for git sources: write {name}==… into requirements"
                )
        if self.cuda is None and any(build.modules and build.gpu for build in self.build.values()):
            raise ValueError("[build] names extension modules, so a [cuda] table must say for which GPUs")
        return self

    @property
    def provided_names(self) -> frozenset[str]:
        """Normalised names of the packages that the machine provides."""
        if self.provided is None:
            return frozenset()
        return frozenset(canonicalize_name(Requirement(text).name) for text in self.provided.packages)

    @property
    def excluded_names(self) -> frozenset[str]:
        """Normalised names of the excluded packages."""
        return frozenset(canonicalize_name(exclusion.package) for exclusion in self.exclude)


def load_recipe(path: Path) -> Recipe:
    """The recipe in the TOML file `path`; InputError names the key that is wrong."""
    return load_table(path, Recipe, example="recipes/quickstart.toml", manual="docs/recipes.md")
