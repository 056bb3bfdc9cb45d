"""A definition file for Apptainer or Singularity: a SIF with the env in it, made from the bundle. Pure text.

The container brings its own system, so what was compiled must suit it: the bundle's wheels and those of the
wheelhouse are installed by the bundle's own start.py and `install`, offline, under the container's Python.
Apptainer's manual: "Definition Files".
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.lock import MODELS
from envbuilder.model import BuiltWheel, Bundle

PLACE = "/opt/envbuilder"
"""ROOT in the container."""


@dataclass(frozen=True)
class Base:
    """What the container is made from."""

    agent: str
    """Apptainer's bootstrap agent: localimage, docker, …"""
    source: str

    @classmethod
    def read(cls, text: str) -> Base:
        """`text` is AGENT:SOURCE or AGENT://SOURCE, or the path of an image on this disk."""
        agent, colon, source = text.partition(":")
        if colon and "/" not in agent and source.removeprefix("//"):
            return cls(agent, source.removeprefix("//"))
        if colon or not Path(text).exists():
            raise InputError(
                f"There is no image {text} to make the container from.",
                remedy="Give --base PATH of an image (.sif or folder), or as docker:NAME.",
                context={"base": text},
            )
        return cls("localimage", str(Path(text).absolute()))


def definition(bundle: Bundle, wheels: Iterable[BuiltWheel], base: Base, modules: Sequence[str]) -> str:
    """The text of a definition file.

    wheels: what was compiled for the bundle; the container's `install` takes those that suit it.
    modules: what its test imports.

    Raises InputError where a path can't be named in such a file.
    """
    name, python = bundle.record.recipe, f"python{bundle.record.python}"
    copied = {
        path: f"{PLACE}/bundles/{name}/{path.name}"
        for path in sorted(bundle.path.iterdir())
        if path.name != MODELS
    }
    for folder in sorted({wheel.path.parent for wheel in wheels}):
        copied[folder] = f"{PLACE}/wheelhouse/{folder.name}"
    for path in copied:
        if any(character.isspace() for character in str(path)):
            raise InputError(
                f"A definition file can't name the path {str(path)!r}: it has a space in it.",
                remedy="Use another ROOT: envbuilder --root FOLDER …",
                context={"path": path},
            )
    files = "\n".join(f"    {path} {there}" for path, there in copied.items())
    env = f"{PLACE}/envs/{name}"
    imports = "; ".join(f"import {module}" for module in modules)
    return f"""\
Bootstrap: {base.agent}
From: {base.source}

# Python {bundle.record.python} must be in the base, and nothing is taken from a network.
# Build it with:  apptainer build {name}.sif THIS-FILE

%files
{files}

%post
    set -e
    {python} {PLACE}/bundles/{name}/start.py {PLACE}/tool
    {PLACE}/tool/bin/envbuilder --root {PLACE} install {PLACE}/bundles/{name}/recipe.toml
    # The env needs neither of them.
    rm -rf {PLACE}/bundles {PLACE}/wheelhouse {PLACE}/tool
    chmod -R a+rX {PLACE}

%environment
    export VIRTUAL_ENV={env}
    export PATH={env}/bin:$PATH
    export PYTHONNOUSERSITE=1

%runscript
    exec {env}/bin/python "$@"

%test
    {env}/bin/python -c {shlex.quote(imports)}

%labels
    envbuilder.recipe {name}
    envbuilder.lock.sha256 {bundle.record.lock_sha256}
    envbuilder.python {bundle.record.python}
    envbuilder.tool {bundle.record.tool_version}
"""
