"""The macros that a package's own files define, and which of them could hide what a declaration is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, Token, tokenize

# fmt: off
SPECIFIERS = frozenset({
    "inline", "constexpr", "__inline__", "__inline", "__forceinline__", "__noinline__", "__host__",
    "__device__", "__global__",
})
"""Words that may stand before a function and hold no state by themselves."""
TYPES = frozenset({
    "void", "bool", "char", "short", "int", "long", "float", "double", "signed", "unsigned", "const",
    "volatile", "auto", "char8_t", "char16_t", "char32_t", "wchar_t",
})
STATE = frozenset({
    "thread_local", "__thread", "__constant__", "__managed__", "__shared__",
})
"""Words that make a variable whose copies would differ."""
UNIT_WIDE = frozenset({
    "__COUNTER__", "__BASE_FILE__", "__INCLUDE_LEVEL__", "__TIMESTAMP__",
})
"""Macros whose value hangs on the whole unit, or on the file that the compiler is given."""
_OTHERS = frozenset({
    "_Pragma", "__align__", "__asm", "__asm__", "__attribute__", "__launch_bounds__", "alignas", "alignof",
    "asm", "break", "case", "catch", "class", "co_await", "co_return", "co_yield", "concept", "consteval",
    "constinit", "continue", "decltype", "default", "delete", "do", "dynamic_cast", "else", "enum",
    "explicit", "export", "extern", "false", "final", "for", "friend", "goto", "if", "import", "module",
    "mutable", "namespace", "new", "noexcept", "nullptr", "operator", "override", "private", "protected",
    "public", "register", "reinterpret_cast", "requires", "return", "sizeof", "static", "static_assert",
    "static_cast", "struct", "switch", "template", "this", "throw", "true", "try", "typedef", "typeid",
    "typename", "union", "using", "virtual", "while",
})
# fmt: on
KEYWORDS = SPECIFIERS | TYPES | STATE | _OTHERS
_DIRECTIVE = re.compile(r"#\s*(\w+)\s*(.*)", re.DOTALL)
_DEFINITION = re.compile(r"([A-Za-z_]\w*)(\([^()]*\))?(.*)", re.DOTALL)
_PLAIN = frozenset({"::", "<", ">", ",", "*", "&"})


@dataclass(frozen=True)
class Macro:
    """One definition."""

    name: str
    body: tuple[Token, ...]
    """What it stands for."""
    line: int

    @property
    def words(self) -> frozenset[str]:
        return frozenset(token.text for token in self.body)


Macros = Mapping[str, Sequence[Macro]]
"""Every definition of each name."""


def directive(token: Token) -> tuple[str, str]:
    """Name and rest of a directive; both empty for a lone `#`."""
    found = _DIRECTIVE.fullmatch(token.text)
    if found is None and token.text != "#":
        raise NotUnderstood("an unknown directive", token.line)
    return (found[1], found[2]) if found else ("", "")


def read_macros(tokens: Iterable[Token], options: Iterable[str] = ()) -> dict[str, list[Macro]]:
    """What the directives in `tokens` define, and the compiler's `options` ("NAME", "NAME=VALUE").

    NotUnderstood where one gives a keyword another meaning.
    """
    macros: dict[str, list[Macro]] = {}
    definitions = [
        (rest, token.line)
        for token in tokens
        if token.kind is Kind.DIRECTIVE
        for name, rest in [directive(token)]
        if name in ("define", "undef")
    ]
    definitions += [(re.sub("=", " ", option, count=1), 0) for option in options]
    for text, line in definitions:
        found = _DEFINITION.fullmatch(text)
        if found is None or found[1] in KEYWORDS:
            raise NotUnderstood(
                f"#define {text.split()[0] if text.split() else ''} changes the language", line
            )
        body = tuple(Token(token.kind, token.text, line, 0, 0) for token in _tokens(found[3], line))
        macros.setdefault(found[1], []).append(Macro(found[1], body, line))
    return macros


def _tokens(text: str, line: int) -> tuple[Token, ...]:
    try:
        return tokenize(text, directives=False)
    except NotUnderstood as error:
        raise NotUnderstood(f"{error.reason} in a macro", line) from error


def check_macros(macros: Macros, used: frozenset[str]) -> None:
    """That no macro of which the name is in `used` hides state or a bracket; NotUnderstood."""
    everywhere = used | {word for of_name in macros.values() for macro in of_name for word in macro.words}
    for name in sorted(everywhere & macros.keys()):
        for macro in macros[name]:
            if reason := _hazard(macro):
                raise NotUnderstood(f"macro {name} {reason}", macro.line)


def _hazard(macro: Macro) -> str | None:
    texts = [token.text for token in macro.body]
    open_brackets: list[str] = []
    for index, text in enumerate(texts):
        if text in ("(", "[", "{"):
            open_brackets.append({"(": ")", "[": "]", "{": "}"}[text])
        elif text in (")", "]", "}") and (not open_brackets or open_brackets.pop() != text):
            return "holds a bracket without its other"
        elif text in STATE - {"__shared__"} or text in UNIT_WIDE:
            return f"holds {text}"
        elif text == "static" and "constexpr" not in texts[max(index - 1, 0) : index + 2]:
            return "holds a static variable or function"
        elif text == "##" and 0 < index < len(texts) - 1 and texts[index - 1] + texts[index + 1] in KEYWORDS:
            return "puts a keyword together"
    return "holds a bracket without its other" if open_brackets else None


def expanded(token: Token, macros: Macros) -> tuple[str, ...] | None:
    """The specifiers that `token`, at file scope, stands for; None where it's no macro of specifiers.

    Where a name has several definitions, the words that all of them have. NotUnderstood where the macro could
    be something other than specifiers or part of a type.
    """
    if token.kind is not Kind.IDENTIFIER or token.text not in macros:
        return None
    words = _specifiers(token.text, macros, frozenset())
    if words is not None:
        return tuple(sorted(words))
    if all(_plain(each, macros) for macro in macros[token.text] for each in macro.body):
        return None
    raise NotUnderstood(f"macro {token.text} at file scope", token.line)


def _specifiers(name: str, macros: Macros, inside: frozenset[str]) -> frozenset[str] | None:
    """The specifiers that every definition of macro `name` has, those of macros in it too; None where one has
    anything else, or names a macro of `inside`."""
    found: list[frozenset[str]] = []
    for macro in macros[name]:
        words: set[str] = set()
        for word in macro.words:
            inner = frozenset({word}) if word in SPECIFIERS else None
            if inner is None and word in macros and word not in inside | {name}:
                inner = _specifiers(word, macros, inside | {name})
            if inner is None:
                return None
            words |= inner
        found.append(frozenset(words))
    return frozenset.intersection(*found)


def _plain(token: Token, macros: Macros) -> bool:
    if token.kind is Kind.IDENTIFIER:
        return token.text not in macros and (token.text in TYPES or token.text not in KEYWORDS)
    return token.kind is Kind.NUMBER or token.text in _PLAIN
