"""What is inside the braces of functions and classes: whether anything in it outlives a call."""

from __future__ import annotations

from collections.abc import Sequence

from envbuilder.compile.shards.cpp_heads import (
    ATTRIBUTE_WORDS,
    angle_end,
    check_attribute,
    plain_items,
    read_function,
    read_head,
)
from envbuilder.compile.shards.cpp_macros import STATE, directive
from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, Token

CLASS_KEYS = frozenset({"class", "struct", "union"})
_CONDITIONALS = frozenset({"if", "ifdef", "ifndef", "elif", "elifdef", "elifndef", "else", "endif"})


def is_conditional(token: Token) -> bool:
    return token.kind is Kind.DIRECTIVE and directive(token)[0] in _CONDITIONALS


def check_body(tokens: Sequence[Token], *, of_class: bool) -> None:
    """That `tokens`, a body without its braces, hold no state that outlives a call; NotUnderstood.

    State is static variables that aren't constexpr, and what is thread_local, in constant or managed memory.
    A class's static members that aren't inline are only declared in it, so they pass.
    """
    kinds = [of_class]
    begin = 0
    for index, token in enumerate(tokens):
        text = token.text
        if token.kind is Kind.DIRECTIVE:
            if directive(token)[0] == "include":
                raise NotUnderstood("#include inside a body", token.line)
        elif text == "{":
            kinds.append(_opens_class(tokens[begin:index]))
            begin = index + 1
        elif text == "}":
            if len(kinds) == 1:
                raise NotUnderstood("a } closes nothing", token.line)
            kinds.pop()
            begin = index + 1
        elif text == ";" or (text == ":" and tokens[index - 1].text in ("public", "private", "protected")):
            begin = index + 1
        elif token.kind is not Kind.IDENTIFIER:
            continue
        elif text in ATTRIBUTE_WORDS and tokens[index + 1 : index + 2] and tokens[index + 1].text == "(":
            check_attribute(tokens, index + 1)
        elif text in STATE - {"__shared__"}:
            raise NotUnderstood(f"a {text} variable", token.line)
        elif text == "mutable" and kinds[-1]:
            raise NotUnderstood("a mutable member", token.line)
        elif text == "static":
            _check_static(tokens, begin, index, in_class=kinds[-1])


def _opens_class(head: Sequence[Token]) -> bool:
    """Whether the brace after `head` is a class's. Where it isn't plain, no: that is judged more strictly."""
    index = 0
    while index < len(head):
        text = head[index].text
        if text == "template" and index + 1 < len(head) and head[index + 1].text == "<":
            index = angle_end(head, index + 1)
        elif text in ("typedef", "friend") or head[index].kind is Kind.DIRECTIVE:
            index += 1
        elif text in CLASS_KEYS:
            rest = [token.text for token in head[index + 1 :]]
            bases = rest.index(":") if ":" in rest else len(rest)
            return not {"(", "="} & set(rest[:bases])
        else:
            return False
    return False


def _check_static(tokens: Sequence[Token], begin: int, at: int, *, in_class: bool) -> None:
    """That the declaration with the `static` at index `at` (it begins at `begin`) is no state."""
    line = tokens[at].line
    before = tokens[begin:at]
    if any(is_conditional(token) for token in before[_last_of_before(before) :]):
        raise NotUnderstood("a static whose declaration hangs on a condition", line)
    head = read_head(tokens, at)
    words = head.words | {token.text for token in before if token.kind is Kind.IDENTIFIER}
    if "constexpr" in head.words or (before and before[-1].text == "constexpr"):
        return
    if in_class and "inline" not in words and not words & {"__device__", "__inline__", "__inline"}:
        return  # a function, or a variable that is only declared here
    function = read_function(plain_items(head, tokens))
    if in_class and function is not None and (function.type_items or before):
        return
    raise NotUnderstood("a static variable", line)


def _last_of_before(before: Sequence[Token]) -> int:
    """Where the specifiers right before a `static` begin: past the last token that is none."""
    index = len(before)
    while index and (before[index - 1].kind is Kind.IDENTIFIER or is_conditional(before[index - 1])):
        index -= 1
    # A condition that ends right before the specifiers encloses whole declarations.
    while index < len(before) and is_conditional(before[index]):
        index += 1
    return index
