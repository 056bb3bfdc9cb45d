"""Cuts C++ and CUDA source text into tokens, as far as finding declarations at file scope needs it.

Literals, comments and line splices are the compiler's own (C++17, [lex]); preprocessor directives are one
token each. Text whose meaning hangs on rarer rules (trigraphs, digraphs) is refused rather than guessed at.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

_TRIGRAPH = re.compile(r"\?\?[=/'()!<>-]")
_RAW = re.compile(r'(?:u8|[uUL])?R"')
_RAW_OPENING = re.compile(r'(?:u8|[uUL])?R"([^ ()\\\t\v\f\n]{0,16})\(')
_STRING = re.compile(r'(?:u8|[uUL])?"(?:[^"\\\n]|\\[^\n])*"')
_CHARACTER = re.compile(r"(?:u8|[uUL])?'(?:[^'\\\n]|\\[^\n])+'")
_NUMBER = re.compile(r"\.?[0-9](?:[eEpP][+-]|'[0-9A-Za-z_]|[0-9A-Za-z_.])*")
_IDENTIFIER = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_PUNCTUATOR = re.compile(
    r"\.\.\.|->\*|->|<<=|<=>|<<|<=|>=|::|##|&&|\|\||==|!=|\+\+|--|[-+*/%^&|]=|[-+*/%^&|~!=<>?:;,.(){}\[\]#]"
)
"""`>>` is two tokens, since it may close two lists of template arguments."""
_DIGRAPH = re.compile(r"<%|%>|%:|:>|<:(?!:[^:>])")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class NotUnderstood(ValueError):
    """Source text that isn't understood well enough to be divided."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        """In the file, from 1."""


class Kind(Enum):
    """What a token is."""

    IDENTIFIER = "identifier"
    NUMBER = "number"
    STRING = "string"
    CHARACTER = "character"
    PUNCTUATOR = "punctuator"
    DIRECTIVE = "directive"


@dataclass(frozen=True)
class Token:
    """One token."""

    kind: Kind
    text: str
    """Without line splices; a directive also without comments."""
    line: int
    """Where it begins, from 1."""
    begin: int
    end: int
    """Its place in the original text; `end` is past its last character."""


@dataclass(frozen=True)
class _Spliced:
    """The text with its line splices taken out."""

    original: str
    text: str
    places: Sequence[int]
    """Where each character of `text`, and its end, is in the original."""
    newlines: Sequence[int]
    """Where the original's line ends are."""

    def token(self, kind: Kind, begin: int, end: int, text: str | None = None) -> Token:
        first, past = self.places[begin], self.places[end - 1] + 1
        return Token(kind, self.text[begin:end] if text is None else text, self.line(begin), first, past)

    def line(self, position: int) -> int:
        return bisect_left(self.newlines, self.places[position]) + 1


def tokenize(text: str, *, directives: bool = True) -> tuple[Token, ...]:
    """The tokens of `text`; NotUnderstood where it can't be cut with certainty.

    Without `directives` a `#` is an ordinary token, as in what a macro stands for.
    """
    return tuple(_tokens(_spliced(text), directives))


def matching(tokens: Sequence[Token], opening: int) -> int:
    """Index of the bracket that closes the one at `opening`; NotUnderstood where brackets don't pair up."""
    expected: list[str] = []
    for index in range(opening, len(tokens)):
        token = tokens[index]
        if token.kind is not Kind.PUNCTUATOR:
            continue
        if token.text in _CLOSING:
            expected.append(_CLOSING[token.text])
        elif token.text in _CLOSING.values():
            if not expected or token.text != expected.pop():
                raise NotUnderstood(f"a {token.text} closes nothing", token.line)
            if not expected:
                return index
    raise NotUnderstood("a bracket is never closed", tokens[opening].line)


def _spliced(text: str) -> _Spliced:
    newlines = [found.start() for found in re.finditer("\n", text)]

    def line(position: int) -> int:
        return bisect_left(newlines, position) + 1

    for pattern, reason in (
        (_TRIGRAPH, "a trigraph"),
        (re.compile("\r(?!\n)"), "a carriage return inside a line"),
        (re.compile(r"\\[ \t\v\f]+\r?\n"), "blanks between a backslash and the end of its line"),
        (re.compile("[\0\ufeff]"), "a character that is no text"),
    ):
        if found := pattern.search(text):
            raise NotUnderstood(reason, line(found.start()))
    characters: list[str] = []
    places: list[int] = []
    position = 0
    for splice in re.finditer(r"\\\r?\n", text):
        characters.append(text[position : splice.start()])
        places.extend(range(position, splice.start()))
        position = splice.end()
    characters.append(text[position:])
    places.extend(range(position, len(text) + 1))
    return _Spliced(text, "".join(characters), places, newlines)


def _tokens(source: _Spliced, directives: bool) -> Iterator[Token]:
    text, position, fresh = source.text, 0, True  # fresh: nothing but blanks and comments so far in the line
    while position < len(text):
        character = text[position]
        if character in " \t\r\n":
            fresh = fresh or character == "\n"
            position += 1
            continue
        if (past := _comment(source, position)) is not None:
            position = past
            continue
        if character == "#" and fresh and directives:
            content, past = _directive(source, position)
            yield source.token(Kind.DIRECTIVE, position, past, content)
        elif _RAW.match(text, position):
            past = _raw_string(source, position)
            yield source.token(Kind.STRING, position, past)
        else:
            token = _simple(source, position)
            yield token
            past = position + len(token.text)
        position, fresh = past, False


def _simple(source: _Spliced, position: int) -> Token:
    """The token at `position` that is neither a comment, a directive nor a raw string."""
    text = source.text
    if _DIGRAPH.match(text, position):
        raise NotUnderstood("a digraph", source.line(position))
    for kind, pattern in (
        (Kind.STRING, _STRING),
        (Kind.CHARACTER, _CHARACTER),
        (Kind.NUMBER, _NUMBER),
        (Kind.IDENTIFIER, _IDENTIFIER),
        (Kind.PUNCTUATOR, _PUNCTUATOR),
    ):
        if found := pattern.match(text, position):
            return source.token(kind, position, found.end())
    what = "a literal without an end" if text[position] in "\"'" else "an unknown character"
    raise NotUnderstood(what, source.line(position))


def _comment(source: _Spliced, position: int) -> int | None:
    """Where the comment at `position` ends; None where there is none."""
    text = source.text
    if text.startswith("//", position):
        end = text.find("\n", position)
        return len(text) if end < 0 else end
    if text.startswith("/*", position):
        end = text.find("*/", position + 2)
        if end < 0:
            raise NotUnderstood("a comment without an end", source.line(position))
        return end + 2
    return None


def _raw_string(source: _Spliced, position: int) -> int:
    """Where the raw string at `position` ends. Inside it a splice is none, so the original is searched."""
    opening = _RAW_OPENING.match(source.text, position)
    if opening is None:
        raise NotUnderstood("a raw string without a beginning", source.line(position))
    begin, past = source.places[position], source.places[opening.end() - 1] + 1
    if past - begin != len(opening[0]):
        raise NotUnderstood("a line splice at the beginning of a raw string", source.line(position))
    closing = f'){opening[1]}"'
    end = source.original.find(closing, past)
    if end < 0:
        raise NotUnderstood("a raw string without an end", source.line(position))
    return bisect_left(source.places, end + len(closing))


def _directive(source: _Spliced, position: int) -> tuple[str, int]:
    """Text of the directive at `position`, and where it ends (before its newline)."""
    text, parts, begin = source.text, [], position
    while position < len(text) and text[position] != "\n":
        if _RAW.match(text, position) and not text[position - 1].isalnum():
            raise NotUnderstood("a raw string in a directive", source.line(position))
        if (past := _comment(source, position)) is not None:
            parts.append(" ")
        elif text[position] in "\"'" and not re.match(r"#\s*(error|warning)\b", text[begin:position]):
            literal = _STRING.match(text, position) or _CHARACTER.match(text, position)
            # In a number it may separate digits.
            if literal is None and text[position] == "'" and text[position - 1].isalnum():
                past = position + 1
            elif literal is None:
                raise NotUnderstood("a literal without an end", source.line(position))
            else:
                past = literal.end()
            parts.append(text[position:past])
        else:
            past = position + 1
            parts.append(text[position])
        position = past
    return "".join(parts).strip(), position
