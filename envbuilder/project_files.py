"""What pyproject.toml and setup.py say, from their text alone. Pure.

InputError is for the caller to raise, who knows the archive: here what is wrong is a ValueError.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from envbuilder.licenses import license_name
from envbuilder.toml import tomllib

# PEP 517: what builds a project without a pyproject.toml, or with one that names no requirements.
_LEGACY_BUILD_REQUIRES = ("setuptools", "wheel")


@dataclass(frozen=True)
class StaticProject:
    """The `[project]` table of a pyproject.toml, as far as it is not dynamic (PEP 621)."""

    name: str
    version: str | None
    requires: tuple[str, ...] | None
    """PEP 508; those of extras carry the extra in their marker. None where they are dynamic."""
    dynamic_extras: bool
    """The requirements of the extras are not among `requires`: they are dynamic."""
    license: str | None


def read_pyproject(text: str) -> tuple[StaticProject | None, tuple[str, ...]]:
    """The `[project]` table and `build-system.requires`; ValueError where they are none."""
    table = tomllib.loads(text)
    build_system = _table(table, "build-system")
    requires = _texts(build_system.get("requires", _LEGACY_BUILD_REQUIRES), "build-system.requires")
    return _static_project(_table(table, "project")) if "project" in table else None, requires


def setup_requires(source: bytes) -> tuple[str, ...] | None:
    """The setup_requires that a setup.py hands to setup(); None where it isn't written out as texts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, for the file's author: invalid escapes and such
            tree = ast.parse(source)
        return tuple(text for call in _setup_calls(tree) for text in _setup_requires(call))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _static_project(table: Mapping[str, Any]) -> StaticProject:
    dynamic = set(_texts(table.get("dynamic", ()), "project.dynamic"))
    name, version = table.get("name"), table.get("version")
    if not isinstance(name, str) or not isinstance(version, (str, type(None))):
        raise ValueError("its [project] table has no name, or a version that is no text")
    requires: tuple[str, ...] | None = None
    if "dependencies" not in dynamic:
        requires = _texts(table.get("dependencies", ()), "project.dependencies")
        for extra, texts in _table(table, "optional-dependencies").items():
            requires += tuple(
                _of_extra(text, extra) for text in _texts(texts, "project.optional-dependencies")
            )
    license_ = table.get("license")
    expression = license_ if isinstance(license_, str) else None
    stated = license_.get("text") if isinstance(license_, dict) else None
    classifiers = _texts(table.get("classifiers", ()), "project.classifiers")
    return StaticProject(
        name,
        version if "version" not in dynamic else None,
        requires,
        "optional-dependencies" in dynamic,
        license_name(expression, stated if isinstance(stated, str) else None, classifiers),
    )


def _of_extra(text: str, extra: str) -> str:
    requirement, _, marker = text.partition(";")
    condition = f'extra == "{extra}"'
    return f"{requirement.strip()} ; " + (f"({marker.strip()}) and {condition}" if marker else condition)


def _setup_calls(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            if name == "setup":
                yield node


def _setup_requires(call: ast.Call) -> tuple[str, ...]:
    for keyword in call.keywords:
        if keyword.arg == "setup_requires":
            value = ast.literal_eval(keyword.value)
            # setuptools takes one text too, with a requirement on each line.
            texts = value.splitlines() if isinstance(value, str) else value
            return tuple(filter(None, map(str.strip, _texts(texts, "setup_requires"))))
    return ()


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not a table")
    return value


def _texts(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{what} is not a list of texts")
    return tuple(value)
