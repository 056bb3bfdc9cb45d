"""Proves on the login node that a bundle is closed: each of its environments resolves from its files alone.

A compute node has no index to ask for what is missing, so it is missed here, before a job waits in a queue.
For each group of the lock, uv resolves the group's own requirements against a folder that holds the group's
files and nothing else. It reads metadata only: nothing is installed, built or run, and no network is used.

- `runtime`: what the recipe and the trainer require, as `install` puts it into the env;
- `build`: what the source packages and the CUDA toolchain need, as `compile` puts it into its one venv;
- `tool`: what envbuilder itself needs on the compute node.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tomli_w
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from envbuilder import __version__
from envbuilder.bundle import path_in
from envbuilder.errors import InputError, MismatchError
from envbuilder.lock import FILES, GROUPS, Group, LockedFile, SourceLock
from envbuilder.process import run
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.requirements import BUILD_TOOLS, required_name, tool_requires, trainer_requires
from envbuilder.stubs import KnownPackage, write_stubs
from envbuilder.target import Target, target_for

# The lock has chosen its wheels for the target's glibc already; uv has names for some glibc versions only.
_ANY_GLIBC = "manylinux_2_40"
_NO_SOLUTION = "No solution found"
_DAMAGED = "has an invalid package format"


@dataclass(frozen=True)
class ClosureFact:
    """One environment that a bundle is enough for."""

    group: Group
    serves: tuple[str, ...]
    """What it is for: the recipe's name, or the source packages that are built in it."""
    versions: Mapping[str, str]
    """Package → version, as resolved: the lock's."""


@dataclass(frozen=True)
class _Need:
    """One requirement that an environment must meet."""

    owner: str
    """Who states it, for messages: "causal-conv1d 1.7.0"."""
    text: str
    package: str | None = None
    """The source package whose build needs it."""


def closure_key(recipe: Recipe, lock: SourceLock, *, python: str) -> str:
    """sha256 of all that a proof, and the look for downloads in `build_downloads`, depend on: where it is the
    same, both need not be repeated. The bundle is taken to hold the files that the lock names."""
    parts = {
        "lock": lock.digest,
        "python": python,
        "tool": __version__,
        "uv": version("uv"),
        "environments": {name: dict(build.env) for name, build in sorted(recipe.build.items())},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prove_closure(
    recipe: Recipe, lock: SourceLock, bundle: Path, *, python: str, reporter: Reporter
) -> tuple[ClosureFact, ...]:
    """Proves that the files in folder `bundle` are enough for every environment of `lock` on `python`.

    `python` is a minor version, "3.12". Raises InputError where a build needs a package that is locked as
    source only, MismatchError where the bundle lacks a file, or none in it meets a requirement; both name
    who requires what.
    """
    reporter.stage(f"proving that the bundle of {recipe.name} is enough without a network")
    target = target_for(lock.target, python)
    with tempfile.TemporaryDirectory(prefix="envbuilder-closure-") as temporary:
        proof = _Proof(recipe, lock, bundle, target, Path(temporary), reporter)
        return tuple(fact for group in GROUPS if (fact := proof.prove(group)))


class _Proof:
    """The environments of one lock on one target, and a folder to resolve them in."""

    def __init__(
        self,
        recipe: Recipe,
        lock: SourceLock,
        bundle: Path,
        target: Target,
        folder: Path,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.lock, self.bundle, self.target = recipe, lock, bundle, target
        self.folder, self.reporter = folder, reporter
        self.sources = [file for file in lock.select(target, ("runtime",)) if file.is_sdist]

    def prove(self, group: Group) -> ClosureFact | None:
        """The proof for `group`; None where nothing needs it."""
        needs = self._needs(group)
        if not needs:
            return None
        files = self.lock.select(self.target, (group,))
        if group == "build" and (source_only := [file for file in files if file.is_sdist]):
            raise self._source_only(source_only)
        self._lay_out(group, files)
        versions, said = self._resolve(group, [need.text for need in needs])
        if versions is None:
            unmet = _NO_SOLUTION in said and _DAMAGED not in said
            raise self._unmet(group, needs, said) if unmet else self._unreadable(group, said)
        if idle := sorted({file.package for file in files} - set(versions)):
            self.reporter.warn(
                f"The lock holds {', '.join(idle)} in its group {group}, where nothing requires it: "
                f"envbuilder lock recipes/{self.recipe.name}.toml"
            )
        serves = tuple(file.package for file in self.sources) if group == "build" else (self.recipe.name,)
        return ClosureFact(group, serves, versions)

    def _needs(self, group: Group) -> list[_Need]:
        recipe = self.recipe
        if group == "tool":
            return [_Need("envbuilder", text) for text in tool_requires()]
        if group == "runtime":
            own = [_Need(f"the recipe {recipe.name}", text) for text in recipe.requirements]
            return own + [_Need("the trainer", text) for text in trainer_requires() if recipe.trainer]
        if not self.sources:
            return []
        toolchain = recipe.cuda.toolchain_requirements if recipe.cuda else ()
        return [
            *(
                _Need(f"the build of {file.package} {file.version}", text, file.package)
                for file in self.sources
                for text in self.lock.package_table(file.package).get("build-requires", ())
            ),
            *(_Need("the CUDA toolchain of the recipe", text) for text in toolchain),
            *(_Need("every build", text) for text in BUILD_TOOLS),
        ]

    def _lay_out(self, group: Group, files: Sequence[LockedFile]) -> None:
        """A folder with the wheels of `group`, and stubs of its source packages and the machine's."""
        excluded = self._excluded(group)
        known = [
            KnownPackage(
                file.package,
                (file.version,),
                tuple(
                    text
                    for text in self.lock.package_table(file.package).get("requires", ())
                    if required_name(text) not in excluded
                ),
            )
            for file in files
            if file.is_sdist
        ]
        # What the machine has, it has with its requirements.
        known += [
            KnownPackage(name, (pinned,), ())
            for name, pinned in self._provided(group).items()
            if pinned is not None
        ]
        links = self.folder / group
        write_stubs(links, tuple(known), self.target)
        for file in files:
            place = path_in(self.bundle, f"{FILES}/{file.filename}", recipe=self.recipe.name)
            if not file.is_sdist:
                (links / file.filename).symlink_to(place.absolute())
        (self.folder / f"{group}.uv.toml").write_text(
            tomli_w.dumps({"exclude-dependencies": sorted(excluded)}), encoding="utf-8"
        )

    def _resolve(self, group: Group, requirements: Sequence[str]) -> tuple[dict[str, str] | None, str]:
        """The versions that meet `requirements`, or None; and what uv said."""
        excluded = self._excluded(group)
        asked = self.folder / "requirements.in"
        asked.write_text(
            "".join(f"{text}\n" for text in requirements if required_name(text) not in excluded),
            encoding="utf-8",
        )
        pins = self.folder / "pins.txt"
        machine = self.target.environment["platform_machine"]
        done = run(
            [
                *(find_uv_bin(), "pip", "compile", "--offline", "--no-index"),
                # This file alone: none of the user's or of the machine's.
                *("--config-file", self.folder / f"{group}.uv.toml"),
                *("--find-links", self.folder / group, "--only-binary", ":all:"),
                *("--python", sys.executable, "--python-version", self.target.python),
                *("--python-platform", f"{machine}-{_ANY_GLIBC}"),
                *("--cache-dir", self.folder / "cache"),
                *("--no-header", "--no-annotate", "--no-progress", "--color", "never"),
                *("--output-file", pins, asked),
            ],
            env=_environment(self.folder),
            cwd=self.folder,
        )
        if done.returncode != 0:
            return None, " ".join(done.output.replace("cause:", "").split()).removeprefix("error: ")
        found = [Requirement(line) for line in pins.read_text(encoding="utf-8").splitlines()]
        pins.unlink()
        left_out = self._provided(group)
        return {
            name: next(iter(requirement.specifier)).version
            for requirement in found
            if (name := canonicalize_name(requirement.name)) not in left_out
        }, ""

    def _provided(self, group: Group) -> dict[str, str | None]:
        """What the machine provides → the version that the lock was made for, if it names one."""
        # The tool runs on its own, without the machine's packages.
        return {
            canonicalize_name(requirement.name): next(
                (s.version for s in requirement.specifier if s.operator == "==" and "*" not in s.version),
                None,
            )
            for requirement in map(Requirement, self.lock.provided)
            if group != "tool"
        }

    def _excluded(self, group: Group) -> frozenset[str]:
        """What is not looked for: the exclusions, and what the machine provides in a version of its own."""
        if group == "tool":
            return frozenset()
        own = {name for name, pinned in self._provided(group).items() if pinned is None}
        return self.recipe.excluded_names | own

    def _source_only(self, files: Sequence[LockedFile]) -> InputError:
        return InputError(
            f"The build needs {', '.join(file.package for file in files)}, which is locked as source only.",
            remedy="Name a version that has wheels in build-requires, then "
            f"envbuilder lock recipes/{self.recipe.name}.toml",
            context={"lock": self.lock.name, "files": ", ".join(file.filename for file in files)},
        )

    def _unmet(self, group: Group, needs: Sequence[_Need], said: str) -> MismatchError:
        """Names the first of `needs` that nothing meets: with one version of each, it stands alone."""
        lock_again = f"envbuilder lock recipes/{self.recipe.name}.toml"
        for need in needs:
            versions, why = self._resolve(group, [need.text])
            if versions is not None:
                continue
            remedy = lock_again
            if need.package:
                remedy = (
                    f'Under [build.{need.package}] write build-requires = ["{need.text}"] in '
                    f"recipes/{self.recipe.name}.toml, then {lock_again}"
                )
            return MismatchError(
                f"{need.owner[0].upper()}{need.owner[1:]} requires {need.text}, and the bundle alone "
                f"doesn't meet that.",
                remedy=remedy,
                context={
                    "bundle": self.bundle,
                    "group": group,
                    "requirement": need.text,
                    "python": self.target.python,
                    "uv": why,
                },
            )
        return MismatchError(
            f"The {group} requirements of {self.recipe.name} don't fit together in the bundle.",
            remedy=lock_again,
            context={"bundle": self.bundle, "group": group, "python": self.target.python, "uv": said},
        )

    def _unreadable(self, group: Group, said: str) -> MismatchError:
        return MismatchError(
            f"uv can't read the {group} files of the bundle {self.bundle}.",
            remedy=f"envbuilder fetch recipes/{self.recipe.name}.toml --verify",
            context={"bundle": self.bundle, "group": group, "uv": said[-1000:]},
        )


def _environment(home: Path) -> dict[str, str]:
    """This process's variables without what sways uv, and with no home to find settings or caches in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_", "XDG_"))}
    return kept | {"HOME": str(home), "UV_PYTHON_DOWNLOADS": "never"}
