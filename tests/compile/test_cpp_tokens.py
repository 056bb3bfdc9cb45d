"""The lexer: what is one token, where it is, and what it refuses to read."""

from __future__ import annotations

import pytest

from envbuilder.compile.shards.cpp_tokens import Kind, NotUnderstood, matching, tokenize


def texts(source: str) -> list[str]:
    return [token.text for token in tokenize(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/* x */b // y\nc", ["a", "b", "c"]),
        ("a // one \\\n still a comment\nb", ["a", "b"]),
        ("int lo\\\nng;", ["int", "long", ";"]),
        ("int lo\\\r\nng;", ["int", "long", ";"]),
        ('f("a;//b\\"{")', ["f", "(", '"a;//b\\"{"', ")"]),
        ("c = '\"' + '\\'';", ["c", "=", "'\"'", "+", "'\\''", ";"]),
        ("1'000'000 0x1p-3 .5f 1e+5", ["1'000'000", "0x1p-3", ".5f", "1e+5"]),
        ('u8R"x(a)" )x" L"b" fooR"(c)"', ['u8R"x(a)" )x"', 'L"b"', "fooR", '"(c)"']),
        ("a<b<c>>::d", ["a", "<", "b", "<", "c", ">", ">", "::", "d"]),
        ("x->*y->z...a<=>b", ["x", "->*", "y", "->", "z", "...", "a", "<=>", "b"]),
        ("v<::at::Half>", ["v", "<", "::", "at", "::", "Half", ">"]),
        ("  # define A \\\n b /* c\n d */ e // f\ng", ["# define A  b   e", "g"]),
        ('#include "a//b.h"\n#error don\'t\nx', ['#include "a//b.h"', "#error don't", "x"]),
        ("#if 1'000 > 2\n#endif", ["#if 1'000 > 2", "#endif"]),
        ("a # b", ["a", "#", "b"]),
        ('/* é */ "é"', ['"é"']),
        ("", []),
    ],
)
def test_text_is_cut_as_a_compiler_cuts_it(source: str, expected: list[str]) -> None:
    assert texts(source) == expected


def test_a_splice_inside_a_raw_string_is_text_and_brackets_in_it_are_none() -> None:
    source = 'auto s = R"(\n};\\\n{)"; int x;'
    tokens = tokenize(source)
    assert [token.text for token in tokens][:3] == ["auto", "s", "="]
    assert [token.text for token in tokens][4:] == [";", "int", "x", ";"]
    assert source[tokens[3].begin : tokens[3].end] == 'R"(\n};\\\n{)"'


def test_tokens_know_their_line_and_place_in_the_original() -> None:
    source = '/* 1\n2 */ a\\\nb\n#define X \\\n 1\n  R"(\n\n)" c'
    found = [(token.kind, token.line, source[token.begin : token.end]) for token in tokenize(source)]
    assert found == [
        (Kind.IDENTIFIER, 2, "a\\\nb"),
        (Kind.DIRECTIVE, 4, "#define X \\\n 1"),
        (Kind.STRING, 6, 'R"(\n\n)"'),
        (Kind.IDENTIFIER, 8, "c"),
    ]


@pytest.mark.parametrize(
    ("source", "reason", "line"),
    [
        ("a\nb ??/\n", "trigraph", 2),
        ("int a<:3:>;", "digraph", 1),
        ("<% %>", "digraph", 1),
        ("\n/* x", "comment without an end", 2),
        ('"abc\n"', "literal without an end", 1),
        ("'a", "literal without an end", 1),
        ('R"(abc', "raw string without an end", 1),
        ('R"a b(x)a b"', "raw string without a beginning", 1),
        ('R"a\\\nb(x)ab"', "line splice at the beginning of a raw string", 1),
        ('#define A R"(\n)"', "raw string in a directive", 1),
        ('#define A "b', "literal without an end", 1),
        ("a\\ \nb", "blanks between", 1),
        ("a\rb", "carriage return", 1),
        ("\ufeffint x;", "no text", 1),
        ("int é;", "unknown character", 1),
        ("a @ b", "unknown character", 1),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(source: str, reason: str, line: int) -> None:
    with pytest.raises(NotUnderstood, match=reason) as caught:
        tokenize(source)
    assert caught.value.line == line


@pytest.mark.parametrize("source", ["(a]", "(a", "{(})"])
def test_brackets_that_do_not_pair_up_are_refused(source: str) -> None:
    with pytest.raises(NotUnderstood):
        matching(tokenize(source), 0)
