"""YAML file and overrides → `Config`, with the line and the dotted key of every mistake, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trainer.config import Config
from trainer.nemo import translate
from trainer.source import Loader, Source, read_yaml


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `file` with `overrides` ("section.key=value", value in YAML) on top.

    Raises ConfigError with every mistake's line and key.
    """
    source = Source(file)
    tree = read_yaml(source)
    for override in overrides:
        _apply_override(tree, override, source)
    notes = translate(tree, source)
    config: Config | None = None
    try:
        config = Config.model_validate(tree, context={"folder": file.resolve().parent, "notes": notes})
    except ValidationError as problem:
        for error in problem.errors():
            source.mistake(error["loc"], _plain_words(error["type"], error["msg"]))
    source.raise_if_wrong()
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """The config as YAML that runs again from any folder: every value written out, paths absolute."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str, source: Source) -> None:
    dotted, equals, text = override.partition("=")
    names = tuple(dotted.strip().split("."))
    if not equals or not all(names):
        source.lines[(override,)] = 0
        source.mistake((override,), "an override is section.key=value")
        return
    try:
        value = yaml.load(text, Loader=Loader)
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


def _plain_words(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is missing"
    return message.removeprefix("Value error, ")
