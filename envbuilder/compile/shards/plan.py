"""Divides a CUDA translation unit with several explicit instantiations into shards that compile at once.

A shard is the unit's own text with the other shards' instantiations blanked, newlines kept. Joining the
shards' objects is the same as compiling the unit only where nothing else in it makes a difference between one
copy and several: so the file, and every header of its package that it reaches, is read, and what isn't
understood keeps the unit whole. `shard_objects.py` looks at the result once more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from envbuilder.compile.shards.cpp_macros import check_macros, directive, read_macros
from envbuilder.compile.shards.cpp_scope import (
    Instantiation,
    check_directives,
    find_instantiations,
    read_scope,
)
from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, Token, tokenize

_INCLUDED = re.compile(r'"([^"\n]+)"|<([^<>\n]+)>')


@dataclass(frozen=True)
class ShardPlan:
    """How a unit is divided."""

    texts: tuple[str, ...]
    """One source text for each shard, to be written beside the original."""
    instantiations: tuple[tuple[str, ...], ...]
    """What each instantiates, as normalized text."""


@dataclass(frozen=True)
class Whole:
    """Why a unit is compiled whole."""

    reason: str
    file: str
    line: int | None


class _InFile(Exception):
    """A NotUnderstood with its file."""

    def __init__(self, file: Path, error: NotUnderstood) -> None:
        super().__init__(error.reason)
        self.whole = Whole(error.reason, str(file), error.line)


@dataclass(frozen=True)
class _Header:
    """A header of the package."""

    path: Path
    text: str
    line: int
    """Of the directive that includes it."""


@dataclass
class _Files:
    """The unit's own files: itself and the headers of its package that it reaches."""

    read: Callable[[Path], str | None]
    include_folders: Sequence[Path]
    own: Callable[[Path], bool]
    tokens: dict[Path, tuple[Token, ...]] = field(default_factory=dict)

    def add(self, file: Path, text: str, root: Path) -> None:
        try:
            self.tokens[file] = tokens = tokenize(text)
            found = [self._header(file, token) for token in tokens if token.kind is Kind.DIRECTIVE]
        except NotUnderstood as error:
            raise _InFile(file, error) from error
        for header in found:
            if header is None:
                continue
            if header.path == root:
                raise _InFile(file, NotUnderstood("the unit is included again", header.line))
            if header.path not in self.tokens:
                self.add(header.path, header.text, root)

    def _header(self, file: Path, token: Token) -> _Header | None:
        """The package's own header that the directive `token` of `file` includes, and its text."""
        name, rest = directive(token)
        if name != "include":
            return None
        included = _INCLUDED.fullmatch(rest.strip())
        if included is None:
            raise NotUnderstood("#include of a macro", token.line)
        quoted, angled = included.groups()
        folders = [*([file.parent] if quoted else []), *self.include_folders]
        for folder in folders:
            path = Path(os.path.normpath(folder / (quoted or angled)))
            text = self.read(path)
            if text is not None:
                return _Header(path, text, token.line) if self.own(path) else None
        return None


def plan_shards(
    source: Path,
    *,
    read: Callable[[Path], str | None],
    include_folders: Sequence[Path],
    own: Callable[[Path], bool],
    defines: Sequence[str] = (),
    most: int,
    weight: Callable[[str], float] = lambda _: 1.0,
    force: bool = False,
) -> ShardPlan | Whole:
    """How to divide the unit `source` into at most `most` shards of about the same length, or why not to.

    `read` gives a file's text, or None where there is none. `own` says whether a header belongs to the
    package: others are made to be included in many units, and trusted. `defines` are the command line's
    ("NAME=VALUE"). `weight` says how long an instantiation takes beside the others.
    `force` trusts the file and its headers too, and divides wherever the instantiations can be found.
    """
    text = read(source)
    if text is None:
        return Whole("the file can't be read", str(source), None)
    root = Path(os.path.normpath(source))
    try:
        found = (
            _forced(root, text) if force else _judged(root, text, _Files(read, include_folders, own), defines)
        )
    except _InFile as error:
        file = str(source) if error.whole.file == str(root) else error.whole.file
        return Whole(error.whole.reason, file, error.whole.line)
    if min(len(found), most) < 2:
        reason = "one instantiation" if len(found) == 1 else "no instantiation" if not found else "one shard"
        return Whole(reason, str(source), None)
    for index, each in enumerate(found):
        if each.text in [earlier.text for earlier in found[:index]]:
            return Whole("an instantiation is written twice", str(source), each.line)
    shards = _share_out(found, [weight(each.text) for each in found], min(len(found), most))
    return ShardPlan(
        tuple(_shard_text(source, text, [each for each in found if each not in kept]) for kept in shards),
        tuple(tuple(each.text for each in kept) for kept in shards),
    )


def _share_out(
    found: Sequence[Instantiation], weights: Sequence[float], count: int
) -> list[tuple[Instantiation, ...]]:
    """`found` in `count` shards: the heaviest first, each to the lightest shard; in each, as in the text."""
    shards: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(found)), key=lambda index: -weights[index]):
        lightest = min(shards, key=lambda shard: (sum(weights[each] for each in shard), len(shard)))
        lightest.append(index)
    return [tuple(found[index] for index in sorted(shard)) for shard in shards]


def _forced(source: Path, text: str) -> tuple[Instantiation, ...]:
    try:
        return find_instantiations(tokenize(text))
    except NotUnderstood as error:
        raise _InFile(source, error) from error


def _judged(source: Path, text: str, files: _Files, defines: Sequence[str]) -> tuple[Instantiation, ...]:
    divisible = _forced(source, text)
    if len(divisible) < 2:
        return divisible
    files.add(source, text, source)
    found: tuple[Instantiation, ...] = ()
    everything = [token for tokens in files.tokens.values() for token in tokens]
    used = frozenset(token.text for token in everything if token.kind is Kind.IDENTIFIER)
    for file, tokens in files.tokens.items():
        try:
            check_directives(tokens)
            read_macros(tokens)
        except NotUnderstood as error:
            raise _InFile(file, error) from error
    try:
        macros = read_macros(everything, defines)
    except NotUnderstood as error:
        raise _InFile(source, NotUnderstood(f"{error.reason} (on the command line)")) from error
    for file, tokens in files.tokens.items():
        try:
            instantiations = read_scope(tokens, macros)
            if file == source:
                found = instantiations
                check_macros(macros, used)
                _check_order(tokens, found)
            elif instantiations:
                raise NotUnderstood("an explicit instantiation in a header", instantiations[0].line)
        except NotUnderstood as error:
            raise _InFile(file, error) from error
    if found != divisible:
        raise _InFile(source, NotUnderstood("two readings of the file disagree"))
    return found


def _check_order(tokens: Sequence[Token], found: Sequence[Instantiation]) -> None:
    """That nothing is specialized after the first instantiation: a shard's compiler wouldn't object."""
    for first, second, third in zip(tokens, tokens[1:], tokens[2:]):
        if (
            found
            and first.begin > found[0].begin
            and (first.text, second.text, third.text)
            == (
                "template",
                "<",
                ">",
            )
        ):
            raise NotUnderstood("a specialization after an instantiation", first.line)


def _shard_text(source: Path, text: str, blanked: Sequence[Instantiation]) -> str:
    """`text` without the instantiations `blanked`; diagnostics and line tables name the original."""
    parts, position = [], 0
    for each in blanked:
        parts += [text[position : each.begin], re.sub(r"[^\r\n]", " ", text[each.begin : each.end])]
        position = each.end
    name = str(source).replace("\\", "\\\\").replace('"', '\\"')
    return f'#line 1 "{name}"\n' + "".join([*parts, text[position:]])
