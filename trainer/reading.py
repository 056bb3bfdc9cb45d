"""YAML file and overrides → `Config`, with the line and the dotted key of every mistake, all at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config import Config
from trainer.errors import ConfigError

Key = tuple[str | int, ...]

TARGETS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained": ("model", {}),
    "nemo_automodel._transformers.auto_model.NeMoAutoModelForCausalLM.from_pretrained": ("model", {}),
    "nemo_automodel.components._peft.lora.PeftConfig": ("peft", {}),
    "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset": ("dataset", {"kind": "chat"}),
    "nemo_automodel.components.distributed.fsdp2.FSDP2Manager": ("distributed", {"strategy": "fsdp2"}),
    "torch.optim.AdamW": ("optimizer", {"name": "adamw"}),
    "torch.optim.Adam": ("optimizer", {"name": "adam"}),
}
"""NeMo Automodel's `_target_` → the section it belongs in and the keys it stands for here."""

SAME_SECTION = {"validation_dataset": "dataset"}


class _Loader(yaml.SafeLoader):
    """Plain YAML values, and `1e-5` is a number (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclass
class _Source:
    """What was read, where each key stands, and what is wrong so far."""

    file: Path
    lines: dict[Key, int] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def mistake(self, key: Key, text: str) -> None:
        line, dotted = self.line_of(key), ".".join(map(str, key))
        place = f"line {line}" if line else "--set"
        self.mistakes.append((line, f"{place}: {dotted}: {text}" if dotted else f"{place}: {text}"))

    def line_of(self, key: Key) -> int:
        """The line of `key`, or of the nearest section that holds it; 0 for one that came from `--set`."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def raise_if_wrong(self) -> None:
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


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `file` with `overrides` ("section.key=value", value in YAML) on top.

    Raises ConfigError with every mistake's line and key.
    """
    source = _Source(file)
    tree = _read_yaml(source)
    for override in overrides:
        _apply_override(tree, override, source)
    _map_targets(tree, source)
    config: Config | None = None
    try:
        config = Config.model_validate(tree, context={"folder": file.resolve().parent})
    except ValidationError as problem:
        for error in problem.errors():
            source.mistake(error["loc"], _plain_words(error["type"], error["msg"]))
    source.raise_if_wrong()
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """The config as YAML that runs again from any folder: every value written out, paths absolute."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(source: _Source) -> dict[str, Any]:
    try:
        text = source.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"The training config can't be read: {problem}",
            remedy=f"ls -l {source.file}",
            context={"file": source.file},
        ) from problem
    try:
        node = yaml.compose(text, Loader=_Loader)
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


def _construct(node: yaml.Node | None, key: Key, source: _Source) -> Any:
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
    return None if node is None else _Loader("").construct_object(node)


def _apply_override(tree: dict[str, Any], override: str, source: _Source) -> None:
    dotted, equals, text = override.partition("=")
    names = tuple(dotted.strip().split("."))
    if not equals or not all(names):
        source.lines[(override,)] = 0
        source.mistake((override,), "an override is section.key=value")
        return
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    place = tree
    for depth, name in enumerate(names[:-1], start=1):
        if not isinstance(place.get(name), dict):
            place[name] = {}
            source.lines[names[:depth]] = 0
        place = place[name]
    place[names[-1]] = value
    for key in [key for key in source.lines if key[: len(names)] == names]:
        del source.lines[key]
    source.lines[names] = 0


def _map_targets(tree: dict[str, Any], source: _Source) -> None:
    """Replaces each section's `_target_` by the keys it stands for."""
    for name, section in tree.items():
        if not isinstance(section, dict) or "_target_" not in section:
            continue
        target = section.pop("_target_")
        wanted, implied = TARGETS.get(str(target), (None, {}))
        if wanted != SAME_SECTION.get(name, name):
            known = sorted(
                key for key, (place, _) in TARGETS.items() if place == SAME_SECTION.get(name, name)
            )
            hint = f"known here: {', '.join(known)}" if known else "this section takes no _target_"
            source.mistake((name, "_target_"), f"{target} is not supported; {hint}")
            continue
        for key, value in implied.items():
            section.setdefault(key, value)


def _plain_words(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is missing"
    return message.removeprefix("Value error, ")
