"""A YAML file as plain values, with the line of every key and what is found wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError

Key = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """Plain YAML values, and `1e-5` is a number (YAML 1.1 takes it for text)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass
class Source:
    """What was read, where each key stands, and what is wrong so far."""

    file: Path
    lines: dict[Key, int] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)
    refused: set[Key] = field(default_factory=set)
    """Sections that are wrong as a whole: what else is wrong in them says nothing."""

    def refuse(self, section: Key, key: Key, text: str) -> None:
        """Notes a mistake at `key` that makes all of `section` wrong."""
        self.mistake(key, text)
        self.refused.add(section)

    def mistake(self, key: Key, text: str) -> None:
        """Notes one mistake, told by `raise_if_wrong`."""
        if any(key[: len(section)] == section for section in self.refused):
            return
        line, dotted = self.line_of(key), ".".join(map(str, key))
        place = f"line {line}" if line else "--set"
        self.mistakes.append((line, f"{place}: {dotted}: {text}" if dotted else f"{place}: {text}"))

    def line_of(self, key: Key) -> int:
        """The line of `key`, or of the nearest section that holds it; 0 for one that came from `--set`."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def raise_if_wrong(self) -> None:
        """ConfigError with all mistakes in the order of their lines, if there are any."""
        if not self.mistakes:
            return
        found = [text for _, text in sorted(self.mistakes)]
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        in_file = any(line for line, _ in self.mistakes)
        raise ConfigError(
            f"{self.file.name} has {count}: {'; '.join(found)}",
            remedy=f"edit {self.file}" if in_file else "change what --set says",
            context={"file": self.file} | {f"mistake {n}": text for n, text in enumerate(found, start=1)},
        )


def read_yaml(source: Source) -> dict[str, Any]:
    """The file's sections. Raises ConfigError for one that can't be read, isn't YAML or has no sections."""
    try:
        text = source.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"The training config can't be read: {problem}",
            remedy=f"ls -l {source.file}",
            context={"file": source.file},
        ) from problem
    try:
        node = yaml.compose(text, Loader=Loader)
        tree = _construct(node, (), source)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{source.file.name} is not YAML: line {line}: {getattr(problem, 'problem', problem)}",
            remedy=f"edit {source.file}",
            context={"file": source.file, "line": line},
        ) from problem
    if not isinstance(tree, dict):
        source.mistake((), "the file must hold sections such as model, peft and dataset")
        source.raise_if_wrong()
        raise AssertionError
    return tree


def _construct(node: yaml.Node | None, key: Key, source: Source) -> Any:
    """The value of a YAML node; notes the line of every key on the way."""
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            below = (*key, name)
            if name in mapping:
                source.lines[below] = name_node.start_mark.line + 1
                source.mistake(below, "is given twice")
            source.lines[below] = name_node.start_mark.line + 1
            mapping[name] = _construct(value_node, below, source)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            source.lines[(*key, number)] = item.start_mark.line + 1
            items.append(_construct(item, (*key, number), source))
        return items
    return None if node is None else Loader("").construct_object(node)
