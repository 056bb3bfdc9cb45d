"""Which files of a model's repository `from_pretrained(folder)` of transformers reads; what is refused. Pure.

Weights are taken as safetensors only: unpickling others can run any code (Python manual, `pickle`). Python
code is taken only where the recipe lists it, and only whole: on a machine without a network nothing can be
fetched later. Code is read here as text and never run.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from envbuilder.errors import InputError

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WITH_AUTO_MAP = (
    _CONFIG,
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""The files in which `auto_map` names the classes that a repository brings itself."""
_SAFE_PATH = re.compile(r"(?:\w[\w.+-]*/)*\w[\w.+ -]*", re.ASCII)
"""No file beside, above or hidden in a model's folder, on any system."""
_TEXT = re.compile(
    r"[^/]+\.(?:json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja"
    r"|README\.md|(?:LICEN[CS]E|NOTICE|COPYING)(?:[ _-][\w -]*)?(?:\.(?:md|pdf|html))?"
)
"""Configuration, tokenizer, chat templates, and what one must know of the licence."""
_SHARD_LIST = ".index.json"
_ADAPTER = "adapter_config.json"
"""It would send `from_pretrained` to another repository, for the model that the adapter is for."""
_OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
)


@dataclass(frozen=True)
class ModelRepository:
    """One commit of a model's repository, or a model's folder, as seen from the recipe's `[model.NAME]`."""

    name: str
    """The recipe's name for it."""
    repo: str
    """"owner/name", or the folder's path."""
    files: Collection[str]
    """The names of all its files."""
    read: Callable[[str], bytes]
    """The content of one of them."""
    is_folder: bool = False

    @property
    def whole(self) -> str:
        """The remedy where something is missing or damaged in it."""
        if self.is_folder:
            return (
                f"Copy it there again from where it was saved, or correct `provided` of [model.{self.name}]."
            )
        return f"Name a commit that is whole as the `revision` of [model.{self.name}], or another repository."

    def refusal(self, why: str, remedy: str, **context: object) -> InputError:
        return InputError(
            f"The model {self.repo} {why}.",
            remedy=remedy,
            context={"key": f"model.{self.name}", "repo": self.repo, **context},
        )

    def table(self, name: str) -> dict[str, object]:
        """The JSON object in the file `name`."""
        try:
            content = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise self.refusal(f"has a damaged {name}: {error}", self.whole, file=name) from error
        if not isinstance(content, dict):
            raise self.refusal(f"has a {name} that is no JSON object", self.whole, file=name)
        return content


@dataclass(frozen=True)
class Choice:
    """What a bundle takes of a repository."""

    files: tuple[str, ...]
    """Sorted."""
    remote_code: tuple[str, ...]
    """Those of `files` that are Python code."""
    left_out: tuple[str, ...]
    """Weights in the repository that `from_pretrained` does not read beside those of `files`."""


def choose_files(repository: ModelRepository, remote_code: Sequence[str] | None) -> Choice:
    """The files to take; `remote_code` is the recipe's.

    InputError for a repository without safetensors weights, without a shard that its index names, without a
    config.json, or whose classes need code that the recipe doesn't list.
    """
    if _CONFIG not in repository.files:
        raise repository.refusal(
            f"has no {_CONFIG}, so transformers can't load it",
            "Choose a repository in the format of transformers.",
        )
    weights = _weights(repository)
    code = _code(repository, remote_code)
    texts = {
        name
        for name in repository.files
        if _TEXT.fullmatch(name)
        and _SAFE_PATH.fullmatch(name)
        and not name.endswith(_SHARD_LIST)
        and name != _ADAPTER
    }
    left_out = {name for name in repository.files if name.endswith((".safetensors", *_OTHER_WEIGHTS))}
    return Choice(
        files=tuple(sorted({*weights, *code, *texts})),
        remote_code=tuple(sorted(code)),
        left_out=tuple(sorted(left_out - weights)),
    )


def license_of(card: dict[str, object]) -> str | None:
    """The model card's licence: an identifier, several, or the name of one that has no identifier."""
    found = card.get("license")
    if found == "other":
        found = card.get("license_name") or found
    if isinstance(found, list):
        found = ", ".join(map(str, found))
    return found if isinstance(found, str) and found else None


def _weights(repository: ModelRepository) -> set[str]:
    """The weights that transformers looks for, in its order, and their index."""
    files = repository.files
    named = repository.table(_CONFIG).get("transformers_weights")
    entry = named if isinstance(named, str) else _WEIGHTS if _WEIGHTS in files else _INDEX
    if entry in files and "/" not in entry and _SAFE_PATH.fullmatch(entry):
        if entry.endswith(f".safetensors{_SHARD_LIST}"):
            return {entry, *_shards(repository, entry)}
        if entry.endswith(".safetensors"):
            return {entry}
    if not any(name.endswith(".safetensors") for name in files):
        why = "has no safetensors weights"
        if any(name.endswith(_OTHER_WEIGHTS) for name in files):
            why += "; other formats can run code when they are loaded"
    else:
        wanted = entry if isinstance(named, str) else f"{_WEIGHTS} or {_INDEX}"
        why = f"has safetensors weights, but not under the name that transformers reads: {wanted}"
    raise repository.refusal(
        why,
        f"Name a commit that has {_WEIGHTS} or {_INDEX} as the `revision` of [model.{repository.name}], or "
        "another repository; weights that you trust can be converted with `save_pretrained` and published.",
    )


def _shards(repository: ModelRepository, index: str) -> set[str]:
    weight_map = repository.table(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise repository.refusal(f"has an {index} without a weight_map", repository.whole, file=index)
    shards = set(map(str, weight_map.values()))
    for shard in sorted(shards):
        if not shard.endswith(".safetensors") or "/" in shard or not _SAFE_PATH.fullmatch(shard):
            raise repository.refusal(
                f"has an {index} that names {shard!r}, which is no safetensors file beside it",
                repository.whole,
                file=index,
            )
    if missing := sorted(shards.difference(repository.files)):
        raise repository.refusal(
            f"lacks {len(missing)} of the {len(shards)} shards that its {index} names",
            repository.whole,
            file=index,
            missing=_some(missing),
        )
    return shards


def _code(repository: ModelRepository, listed: Sequence[str] | None) -> set[str]:
    """The Python files to take: those that the recipe lists, if nothing is missing among them."""
    if listed is not None and not listed:
        return set()
    named, elsewhere = _auto_map(repository)
    if listed is None:
        if not named and not elsewhere:
            return set()
        found = _with_imports(repository, named.intersection(repository.files))
        take = f" Else read {', '.join(sorted(found))}, and if you trust it: {_key(found)}" if found else ""
        raise repository.refusal(
            "wants to run Python code of its own, and the recipe doesn't say whether it may",
            f"If transformers has this architecture itself, write remote-code = [] into "
            f"[model.{repository.name}].{take}",
            code=_some(sorted(named | {f"{other} (another repository)" for other in elsewhere})),
        )
    for name in listed:
        if not name.endswith(".py") or not _SAFE_PATH.fullmatch(name) or name not in repository.files:
            raise repository.refusal(
                f"has no Python file {name!r}, which the recipe's remote-code lists",
                f"Correct remote-code in [model.{repository.name}].",
                got=_some(sorted(name for name in repository.files if name.endswith(".py")))
                or "no Python file",
            )
    if elsewhere:
        raise repository.refusal(
            "takes its code from another repository, which a folder on disk can't do",
            f"If transformers has this architecture itself, write remote-code = [] into "
            f"[model.{repository.name}]; else choose another repository.",
            code=_some(sorted(elsewhere)),
        )
    needed = _with_imports(repository, {*listed, *named.intersection(repository.files)})
    if absent := sorted(needed.difference(repository.files)):
        raise repository.refusal(
            "imports Python files that it doesn't have", repository.whole, missing=_some(absent)
        )
    if unlisted := sorted(needed.difference(listed)):
        raise repository.refusal(
            "needs more Python files than the recipe lists",
            f"Read {', '.join(unlisted)}; if you trust it, write into [model.{repository.name}]: "
            f"{_key(needed)}",
            missing=_some(unlisted),
        )
    return set(listed)


def _auto_map(repository: ModelRepository) -> tuple[set[str], set[str]]:
    """The Python files that `auto_map` names, and the repositories whose code it names ("owner/name--…")."""
    files: set[str] = set()
    repositories: set[str] = set()
    for config in _WITH_AUTO_MAP:
        if config not in repository.files:
            continue
        for reference in _texts(repository.table(config).get("auto_map")):
            elsewhere, separator, class_path = reference.rpartition("--")
            if separator:
                repositories.add(elsewhere)
            else:
                files.add(f"{class_path.rpartition('.')[0]}.py")
    return files, repositories


def _texts(value: object) -> Iterator[str]:
    """All texts in nested lists and tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _with_imports(repository: ModelRepository, names: Collection[str]) -> set[str]:
    """`names` and all that they import from their own repository, whether it has that or not."""
    found: set[str] = set()
    left = sorted(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            if name in repository.files:
                left += _relative_imports(repository, name)
    return found


def _relative_imports(repository: ModelRepository, name: str) -> Iterator[str]:
    try:
        # What Python would warn of (an unknown escape) is its author's matter.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(repository.read(name))))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise repository.refusal(
            f"has a {name} that can't be parsed: {error}", repository.whole, file=name
        ) from error
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = name.split("/")[: -node.level]
        # `from . import x` may name a module or something in the package's __init__.py.
        for module in [node.module] if node.module else [alias.name for alias in node.names]:
            path = "/".join([*folder, *module.split(".")])
            package = f"{path}/__init__.py"
            yield package if package in repository.files else f"{path}.py"


def _key(files: Collection[str]) -> str:
    return f"remote-code = {json.dumps(sorted(files))}"


def _some(names: Sequence[str]) -> str:
    """The first few of `names`."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
