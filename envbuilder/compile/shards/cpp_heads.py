"""The head of a C++ declaration: what stands before its body, its initializer or its semicolon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from envbuilder.compile.shards.cpp_macros import KEYWORDS, SPECIFIERS, TYPES
from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, Token, matching

_WITH_ARGUMENTS = frozenset({
    "__attribute__", "__launch_bounds__", "__align__", "__declspec", "alignas", "explicit", "noexcept",
    "__maxnreg__", "__cluster_dims__", "__block_size__",
})  # fmt: skip
"""Specifiers that take a parenthesis: neither is part of the declarator."""
ATTRIBUTE_WORDS = frozenset({"__attribute__", "__declspec"})
_ATTRIBUTES = frozenset({
    "maybe_unused", "nodiscard", "deprecated", "noreturn", "gnu", "likely", "unlikely", "unused",
    "__unused__", "noinline", "__noinline__", "always_inline", "__always_inline__", "aligned", "hot", "cold",
})  # fmt: skip
"""Those that change nothing about where a thing is, and when it runs."""
_TYPE_OF = frozenset({"decltype", "typeof", "__typeof__"})
_AFTER_PARAMETERS = frozenset({"const", "volatile", "&", "&&", "override", "final", "noexcept"})


@dataclass(frozen=True)
class Item:
    """One token at the head's own level, or a whole bracket."""

    text: str
    """Of a bracket its two characters, "()", "[]" or "<>"; of an operator's name "operator"."""
    begin: int
    end: int
    """Indexes of its tokens; `end` is past the last."""

    @property
    def is_name(self) -> bool:
        return (self.text[0].isalpha() or self.text[0] in "_$") and self.text not in KEYWORDS - {"operator"}


@dataclass(frozen=True)
class Head:
    """A declaration's head."""

    items: tuple[Item, ...]
    stop: str
    """What ends it: ";", "{" or "="."""
    end: int
    """Index of the token that ends it."""

    @property
    def words(self) -> frozenset[str]:
        return frozenset(item.text for item in self.items)


@dataclass(frozen=True)
class Function:
    """A head that declares a function, or a variable made with parentheses."""

    before: tuple[Item, ...]
    """Specifiers and return type."""
    name: tuple[Item, ...]
    parameters: Item
    has_initializers: bool
    """Whether a constructor's list (`: a(1), b{2}`) begins at the head's end."""

    @property
    def type_items(self) -> tuple[Item, ...]:
        return tuple(item for item in self.before if item.text not in SPECIFIERS | {"static", "extern"})


def read_head(tokens: Sequence[Token], begin: int) -> Head:
    """The head at `begin`; NotUnderstood where the text ends first, or a directive is inside."""
    items: list[Item] = []
    index = begin
    while index < len(tokens):
        token = tokens[index]
        text = token.text
        if token.kind is Kind.DIRECTIVE:
            raise NotUnderstood("a directive inside a declaration", token.line)
        if text in (";", "{", "="):
            return Head(tuple(items), text, index)
        if text in ("(", "["):
            end = matching(tokens, index) + 1
            text = "()" if text == "(" else "[]"
        elif text == "operator":
            end = _operator_end(tokens, index)
        elif text == "<":
            if not items or not (items[-1].is_name or items[-1].text == "template"):
                raise NotUnderstood("a < that opens nothing", token.line)
            end = angle_end(tokens, index)
            text = "<>"
        elif text in (")", "]", "}"):
            raise NotUnderstood(f"a {text} closes nothing", token.line)
        elif token.kind is Kind.IDENTIFIER or token.kind is Kind.PUNCTUATOR:
            end = index + 1
        else:
            raise NotUnderstood(f"a {token.kind.value} in a declaration", token.line)
        for inner in tokens[index:end]:
            if inner.kind is Kind.DIRECTIVE:
                raise NotUnderstood("a directive inside a declaration", inner.line)
            if inner.text in ("static", "thread_local", "__thread") and inner is not token:
                raise NotUnderstood("a static variable in a declaration's head", inner.line)
        items.append(Item(text, index, end))
        index = end
    raise NotUnderstood("a declaration without an end", tokens[begin].line)


def check_attribute(tokens: Sequence[Token], opening: int) -> None:
    """That the attributes in the bracket at `opening` make no state and run nothing; NotUnderstood."""
    for token in tokens[opening : matching(tokens, opening)]:
        if token.kind is Kind.IDENTIFIER and token.text not in _ATTRIBUTES:
            raise NotUnderstood(f"the attribute {token.text}", token.line)


def angle_end(tokens: Sequence[Token], opening: int) -> int:
    """Index past the > of the template list at `opening`; NotUnderstood where it's no such list."""
    depth, index = 0, opening
    while index < len(tokens):
        text = tokens[index].text
        if text in ("(", "["):
            index = matching(tokens, index)
        elif text == "<":
            depth += 1
        elif text == ">":
            depth -= 1
            if depth == 0:
                return index + 1
        elif text in (";", "{", "}", ")", "]"):
            break
        index += 1
    raise NotUnderstood("a < without its >", tokens[opening].line)


def _operator_end(tokens: Sequence[Token], index: int) -> int:
    """Index of the parenthesis of the parameters of the operator at `index`."""
    end = index + 1
    if [token.text for token in tokens[end : end + 2]] == ["(", ")"]:
        end += 2
    while end < len(tokens) and tokens[end].text not in ("(", ";", "{", "}"):
        end += 1
    if end == len(tokens) or tokens[end].text != "(":
        raise NotUnderstood("an operator without parameters", tokens[index].line)
    return end


def plain_items(head: Head, tokens: Sequence[Token]) -> tuple[Item, ...]:
    """The head's items without attributes, and specifiers that take parentheses; a decltype is one name."""
    kept: list[Item] = []
    items = list(head.items)
    while items:
        item = items.pop(0)
        bracket = bool(items) and items[0].text == "()"
        if item.text in _WITH_ARGUMENTS and bracket:
            if item.text in ATTRIBUTE_WORDS:
                check_attribute(tokens, items[0].begin)
            items.pop(0)
        elif item.text in _TYPE_OF and bracket:
            kept.append(Item("decltype", item.begin, items.pop(0).end))
        elif item.text == "[]" and tokens[item.begin + 1].text == "[":
            check_attribute(tokens, item.begin)
        else:
            kept.append(item)
    return tuple(kept)


def read_function(items: Sequence[Item]) -> Function | None:
    """`items` (plain ones) as a function's head; None where they are none."""
    at = next((index for index, item in enumerate(items) if item.text == "()"), None)
    if at is None:
        return None
    begin = at
    while begin and (items[begin - 1].text in ("::", "~", "<>") or items[begin - 1].is_name):
        # Two names in a row: the first belongs to the type.
        if begin < at and items[begin - 1].is_name and items[begin].is_name:
            break
        # So does what ends in template arguments, unless a `::` follows.
        if begin < at and items[begin - 1].text == "<>" and items[begin].text not in ("::",):
            break
        begin -= 1
    name, after = items[begin:at], items[at + 1 :]
    if not name or not (name[-1].is_name or name[-1].text == "<>"):
        return None
    has_initializers = False
    for index, item in enumerate(after):
        if item.text == ":":
            has_initializers = True
            break
        if item.text == "->":
            if any(rest.text in ("()", ":") for rest in after[index:]):
                return None
            break
        if item.text not in _AFTER_PARAMETERS:
            return None
    return Function(tuple(items[:begin]), tuple(name), items[at], has_initializers)


def surely_a_function(function: Function, tokens: Sequence[Token]) -> bool:
    """Whether a head that ends in `;` can't be a variable made from arguments, as `Type name(value);` is."""
    types = [item.text for item in function.type_items]
    if types in (["void"], ["const", "void"]):
        return True
    inner = tokens[function.parameters.begin + 1 : function.parameters.end - 1]
    if not inner or any(token.kind is Kind.IDENTIFIER and token.text == "typename" for token in inner[:1]):
        return True
    return any(_is_a_type(parameter) for parameter in _divided(inner))


def _divided(tokens: Sequence[Token]) -> list[list[Token]]:
    """`tokens` between commas outside of round and square brackets."""
    parts: list[list[Token]] = [[]]
    index = 0
    while index < len(tokens):
        if tokens[index].text in ("(", "[", "{"):
            end = matching(tokens, index) + 1
            parts[-1].extend(tokens[index:end])
            index = end
            continue
        if tokens[index].text == ",":
            parts.append([])
        else:
            parts[-1].append(tokens[index])
        index += 1
    return parts


def _is_a_type(parameter: Sequence[Token]) -> bool:
    """Whether `parameter` is no expression: it begins with a built-in type, or has two names in a row."""
    texts = [token.text for token in parameter]
    if texts and texts[0] in TYPES:
        return len(texts) == 1 or texts[1] not in ("(", "{")
    words = [token.kind is Kind.IDENTIFIER for token in parameter]
    return (
        len(texts) > 1 and words[0] and words[1] and texts[0] not in ("sizeof", "new", "co_await", "alignof")
    )
