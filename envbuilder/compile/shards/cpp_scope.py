"""What stands at file scope in a C++ or CUDA file: its explicit instantiations, and nothing that keeps state.

Everything here that isn't recognized is refused, with its line: the text may be copied into several objects
only where every declaration in it may be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from envbuilder.compile.shards.cpp_bodies import CLASS_KEYS, check_body, is_conditional
from envbuilder.compile.shards.cpp_heads import (
    Function,
    Head,
    angle_end,
    plain_items,
    read_function,
    read_head,
    surely_a_function,
)
from envbuilder.compile.shards.cpp_macros import (
    SPECIFIERS,
    STATE,
    TYPES,
    UNIT_WIDE,
    Macros,
    directive,
    expanded,
)
from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, Token, matching

_PRAGMA = re.compile(
    r"once|message\b.*|unroll\b.*|nounroll|(GCC|clang)\s+diagnostic\s+(push|pop|ignored|warning|error)\b.*"
    r"|nv_(diagnostic|diag_\w+|exec_check_disable)\b.*|hd_warning_disable|diag_\w+\b.*|(end)?region\b.*|mark\b.*",
    re.DOTALL,
)
_KNOWN = frozenset({"", "include", "define", "undef", "error", "warning", "pragma"})
_WEAK = frozenset(["inline", "constexpr", "consteval", "static", "__inline__", "__inline", "__forceinline__"])
"""Each copy of such a function is either merged with the others or belongs to its object."""
_LITERAL = frozenset(["+", "-", "*", "/", "%", "<<", "(", ")", "|", "&", "^", "~", "true", "false"])


@dataclass(frozen=True)
class Instantiation:
    """An explicit instantiation definition, `template void f<int>(int);`."""

    text: str
    """Its tokens with one space between."""
    begin: int
    end: int
    """Its place in the file's text."""
    line: int


def check_directives(tokens: Sequence[Token]) -> None:
    """That no directive or word means something else in another file; NotUnderstood."""
    for token in tokens:
        if token.kind is Kind.IDENTIFIER and token.text in UNIT_WIDE:
            raise NotUnderstood(f"{token.text} is used", token.line)
        if token.kind is not Kind.DIRECTIVE:
            continue
        name, rest = directive(token)
        if name not in _KNOWN and not is_conditional(token):
            raise NotUnderstood(f"#{name} is not understood", token.line)
        if UNIT_WIDE & set(re.findall(r"\w+", rest)):
            raise NotUnderstood("a directive uses a macro that hangs on the unit", token.line)
        if name == "pragma" and not _PRAGMA.fullmatch(rest):
            raise NotUnderstood(f"#pragma {rest} is not understood", token.line)


def check_conditions(tokens: Sequence[Token]) -> None:
    """That brackets pair up, and that each branch of a condition holds whole ones; NotUnderstood."""
    brackets: list[str] = []
    levels: list[list[str]] = []
    for token in tokens:
        if token.kind is Kind.PUNCTUATOR and token.text in ("(", "[", "{"):
            brackets.append(token.text)
        elif token.kind is Kind.PUNCTUATOR and token.text in (")", "]", "}"):
            opening = brackets.pop() if brackets else ""
            if opening + token.text not in ("()", "[]", "{}"):
                raise NotUnderstood(f"a {token.text} closes nothing", token.line)
        elif _step(token) > 0:
            levels.append(list(brackets))
        elif is_conditional(token):
            if not levels or levels[-1] != brackets:
                raise NotUnderstood("a condition divides brackets", token.line)
            if _step(token) < 0:
                levels.pop()
    if brackets or levels:
        raise NotUnderstood("the file ends inside a bracket or a condition", tokens[-1].line)


def read_scope(tokens: Sequence[Token], macros: Macros) -> tuple[Instantiation, ...]:
    """The explicit instantiations at file scope of `tokens`; NotUnderstood where anything may keep state."""
    check_directives(tokens)
    check_conditions(tokens)
    try:
        return _Scope(tokens, macros).read()
    except IndexError as error:
        raise NotUnderstood("the file ends inside a declaration", tokens[-1].line) from error


def find_instantiations(tokens: Sequence[Token]) -> tuple[Instantiation, ...]:
    """The same without a judgement of the rest.

    NotUnderstood where brackets and conditions don't pair up, or where an instantiation hangs on a condition
    or doesn't begin a declaration.
    """
    check_conditions(tokens)
    found: list[Instantiation] = []
    index, begin, depth = 0, 0, 0
    while index < len(tokens):
        token = tokens[index]
        depth += _step(token)
        if token.kind is Kind.DIRECTIVE or token.text in (";", "}"):
            begin = index + 1
        elif token.text == "{":
            if "namespace" in {each.text for each in tokens[begin:index]}:
                begin = index + 1
            else:
                index = matching(tokens, index)
                begin = index + 1
        elif token.text == "template" and tokens[index + 1 : index + 2] and tokens[index + 1].text != "<":
            previous = tokens[index - 1].text if index else ""
            if previous not in ("::", ".", "->", "extern"):
                if index != begin:
                    raise NotUnderstood("an explicit instantiation inside a declaration", token.line)
                found.append(_instantiation(tokens, index, depth))
        index += 1
    return tuple(found)


def _step(token: Token) -> int:
    """By how many conditions `token` goes deeper."""
    if token.kind is not Kind.DIRECTIVE:
        return 0
    name = directive(token)[0]
    return 1 if name in ("if", "ifdef", "ifndef") else -1 if name == "endif" else 0


def _instantiation(tokens: Sequence[Token], begin: int, depth: int) -> Instantiation:
    line = tokens[begin].line
    head = read_head(tokens, begin)
    if head.stop != ";" or "template" in [item.text for item in head.items[1:]]:
        raise NotUnderstood("an explicit instantiation that isn't plain", line)
    if depth:
        raise NotUnderstood("an explicit instantiation inside a condition", line)
    text = " ".join(token.text for token in tokens[begin : head.end + 1])
    return Instantiation(text, tokens[begin].begin, tokens[head.end].end, line)


class _Scope:
    """Walks over the declarations of one file."""

    def __init__(self, tokens: Sequence[Token], macros: Macros) -> None:
        self._tokens = tokens
        self._macros = macros
        self._found: list[Instantiation] = []

    def read(self) -> tuple[Instantiation, ...]:
        index, spaces, depth = 0, 0, 0
        while index < len(self._tokens):
            token = self._tokens[index]
            if token.kind is Kind.DIRECTIVE:
                depth += _step(token)
                index += 1
            elif token.text == ";":
                index += 1
            elif token.text == "}" and spaces:
                spaces, index = spaces - 1, index + 1
            elif token.text == "namespace" or self._texts(index, 2) == ["inline", "namespace"]:
                index, opened = self._namespace(index)
                spaces += opened
            elif token.text == "template" and self._texts(index + 1, 1) != ["<"]:
                self._found.append(_instantiation(self._tokens, index, depth))
                index = self._judged(index, read_head(self._tokens, index).end + 1)
            else:
                index = self._declaration(index)
        return tuple(self._found)

    def _texts(self, begin: int, count: int) -> list[str]:
        return [token.text for token in self._tokens[begin : begin + count]]

    def _judged(self, begin: int, end: int) -> int:
        """`end`, once no macro from `begin` to it hides a declaration."""
        for token in self._tokens[begin:end]:
            expanded(token, self._macros)
            if token.text in ("asm", "__asm__", "__asm", "_Pragma"):
                raise NotUnderstood(f"{token.text} at file scope", token.line)
        return end

    def _namespace(self, begin: int) -> tuple[int, bool]:
        """Index past a namespace's opening brace, or past an alias, and which of the two."""
        head = read_head(self._tokens, begin)
        self._judged(begin, head.end)
        names = [item for item in plain_items(head, self._tokens) if item.text not in ("inline", "namespace")]
        if not names or not all(item.is_name or item.text == "::" for item in names):
            raise NotUnderstood("an anonymous namespace", self._tokens[begin].line)
        if any(left.is_name and right.is_name for left, right in zip(names, names[1:])):
            raise NotUnderstood("a macro in a namespace's name", self._tokens[begin].line)
        if head.stop == "{":
            return head.end + 1, True
        return self._past_semicolon(head.end), False

    def _past_semicolon(self, index: int) -> int:
        """Index past the next `;` outside of brackets; what is in braces on the way is a function's body."""
        while self._tokens[index].text != ";":
            token = self._tokens[index]
            if token.kind is Kind.DIRECTIVE:
                raise NotUnderstood("a directive inside a declaration", token.line)
            if token.text in ("(", "[", "{"):
                end = matching(self._tokens, index)
                check_body(self._tokens[index + 1 : end], of_class=False)
                self._judged(index, end)
                index = end
            index += 1
            if index == len(self._tokens):
                raise NotUnderstood("a declaration without an end", token.line)
        return index + 1

    def _declaration(self, begin: int) -> int:
        """Index past the declaration at `begin`."""
        token = self._tokens[begin]
        index, groups = begin, []
        if token.text in ("using", "static_assert", "typedef"):
            return self._named(token, begin)
        if token.text == "extern" and self._texts(begin + 1, 1) == ["template"]:
            return self._judged(begin, self._past_semicolon(begin))
        while self._tokens[index].text == "template":
            if self._texts(index + 1, 1) != ["<"]:
                raise NotUnderstood("a template that isn't plain", token.line)
            end = angle_end(self._tokens, index + 1)
            groups.append(end - index - 3)
            self._judged(index, end)
            index = end
            if index == len(self._tokens):
                raise NotUnderstood("a declaration without an end", token.line)
        if groups and self._texts(index, 1)[0] in ("using", "concept"):
            return self._judged(index, self._past_semicolon(index))
        if self._texts(index, 1)[0] in CLASS_KEYS | {"enum"}:
            return self._class(index)
        head = read_head(self._tokens, index)
        if "template" in head.words:
            raise NotUnderstood("an unknown macro before a template", token.line)
        self._judged(index, head.end)
        template = bool(groups) and any(groups)
        function = read_function(plain_items(head, self._tokens))
        if function is not None and (function.has_initializers or head.stop in "{;" or self._deleted(head)):
            return self._function(head, function, template=template, full=bool(groups) and not template)
        return self._variable(head)

    def _named(self, token: Token, begin: int) -> int:
        end = begin
        if token.text == "typedef" and set(self._texts(begin + 1, 1)) & (CLASS_KEYS | {"enum"}):
            while self._tokens[end].text not in (";", "{"):
                end += 1
            if self._tokens[end].text == "{":
                close = matching(self._tokens, end)
                check_body(self._tokens[end + 1 : close], of_class=True)
                self._judged(begin, end)
                end = close + 1
                begin = end
        past = self._past_semicolon(end)
        texts = set(self._texts(end, past - end))
        if "{" in texts or (token.text != "static_assert" and "=" in texts and token.text == "typedef"):
            raise NotUnderstood(f"a {token.text} that isn't plain", token.line)
        return self._judged(begin, past)

    def _class(self, begin: int) -> int:
        """Index past the class or enumeration at `begin`."""
        line = self._tokens[begin].line
        head = read_head(self._tokens, begin)
        self._judged(begin, head.end)
        names = list(plain_items(head, self._tokens))
        colon = next((index for index, item in enumerate(names) if item.text == ":"), len(names))
        chain = [item for item in names[1:colon] if item.text not in ("final", "class", "struct")]
        if any(not (item.is_name or item.text in ("::", "<>")) for item in chain) or any(
            left.is_name and right.is_name for left, right in zip(chain, chain[1:])
        ):
            raise NotUnderstood("a variable or function whose type is spelled with its key", line)
        if head.stop == ";":
            return head.end + 1
        if head.stop != "{" or (not chain and names[0].text != "enum"):
            raise NotUnderstood("a variable of an unnamed class", line)
        end = matching(self._tokens, head.end)
        check_body(self._tokens[head.end + 1 : end], of_class=names[0].text != "enum")
        if self._texts(end + 1, 1) != [";"]:
            raise NotUnderstood("a variable beside its class", line)
        return end + 2

    def _deleted(self, head: Head) -> bool:
        return head.stop == "=" and self._texts(head.end + 1, 2) == ["delete", ";"]

    def _words(self, head: Head) -> frozenset[str]:
        """The head's words, macros of specifiers replaced."""
        words: set[str] = set()
        for item in head.items:
            got = expanded(self._tokens[item.begin], self._macros) if item.is_name else None
            words.update([item.text] if got is None else got)
        return frozenset(words)

    def _function(self, head: Head, function: Function, *, template: bool, full: bool) -> int:
        """Index past a function. One that isn't a template, inline or static is a strong symbol."""
        line = self._tokens[head.items[0].begin].line
        words = self._words(head)
        types = [
            item
            for item in function.type_items
            if expanded(self._tokens[item.begin], self._macros) is None
            or not all(word in SPECIFIERS for word in expanded(self._tokens[item.begin], self._macros) or ())
        ]
        if not types and not (template and any(item.text == "::" for item in function.name)):
            raise NotUnderstood("an unknown macro, or a function without a type", line)
        if words & STATE and not (head.stop == ";" and "extern" in words):
            raise NotUnderstood("a variable in a memory of the GPU", line)
        if head.stop != "{" and not function.has_initializers:
            if "constexpr" not in words and not surely_a_function(function, self._tokens):
                raise NotUnderstood("either a function or a variable", line)
            return head.end + (3 if head.stop == "=" else 1)
        if words & {"extern", "__global__"} and not template:
            raise NotUnderstood("a kernel, or an extern function, that is no template", line)
        if not template and not words & _WEAK:
            what = "a full specialization of a function" if full else "a function"
            raise NotUnderstood(f"{what} that is neither inline nor static", line)
        opening = self._body(head) if function.has_initializers else head.end
        end = matching(self._tokens, opening)
        check_body(self._tokens[opening + 1 : end], of_class=False)
        return end + 1

    def _body(self, head: Head) -> int:
        """Index of the brace of a constructor's body, past its list of initializers."""
        index = next(item.end for item in head.items if item.text == ":")
        while True:
            while self._tokens[index].text not in ("(", "{"):
                if self._tokens[index].kind is not Kind.IDENTIFIER and self._tokens[index].text not in (
                    "::",
                    "<",
                ):
                    raise NotUnderstood("a list of initializers that isn't plain", self._tokens[index].line)
                index = angle_end(self._tokens, index) if self._texts(index, 1) == ["<"] else index + 1
            index = matching(self._tokens, index) + 1
            after = self._texts(index, 1)
            if after == ["{"]:
                return index
            if after != [","]:
                raise NotUnderstood("a list of initializers that isn't plain", self._tokens[index - 1].line)
            index += 1

    def _variable(self, head: Head) -> int:
        """Index past a variable that can't change: constexpr, or a const number."""
        line = self._tokens[head.items[0].begin if head.items else head.end].line
        words = self._words(head)
        if "extern" in words and "__shared__" in words and head.stop == ";":
            return head.end + 1  # its memory is given by each launch
        plain_items(head, self._tokens)  # judges the attributes
        if words & (STATE | {"__device__", "extern"}):
            raise NotUnderstood("a variable in a memory of the GPU, or an extern one", line)
        end = self._past_semicolon(head.end)
        if "volatile" in words:
            raise NotUnderstood("a volatile variable", line)
        if "constexpr" in words and head.stop != ";":
            return self._judged(head.end, end)
        names = [item for item in head.items if item.text not in TYPES | {"static"}]
        value = self._tokens[head.end + 1 : end - 1]
        if (
            "const" in words
            and "*" not in words
            and "&" not in words
            and head.stop == "="
            and len(names) == 1
            and names[0].is_name
            and "," not in [token.text for token in value]
            and all(token.kind in (Kind.NUMBER, Kind.CHARACTER) or token.text in _LITERAL for token in value)
        ):
            return end
        raise NotUnderstood("a variable, or a declaration that isn't known", line)
