"""Which units are divided, into which texts; and, above all, which are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from envbuilder.compile.shards.plan import ShardPlan, Whole, plan_shards
from tests.compile.shard_texts import CAUSAL, HEADERS

UNIT = Path("/p/csrc/unit.cu")
TWO = "\ntemplate void f<float>(float *);\ntemplate void f<int>(int *);\n"
TEMPLATE = "template <typename T> void f(T *x) { *x = 0; }\n"


def plan(
    text: str,
    headers: Mapping[str, str] | None = None,
    *,
    most: int = 8,
    force: bool = False,
    defines: tuple[str, ...] = (),
) -> ShardPlan | Whole:
    files = {UNIT: text, **{Path(name): content for name, content in (headers or {}).items()}}
    return plan_shards(
        UNIT,
        read=files.get,
        include_folders=[Path("/p/include"), Path("/outside")],
        own=lambda path: path.is_relative_to("/p"),
        defines=defines,
        most=most,
        force=force,
    )


def divided(text: str, headers: Mapping[str, str] | None = None, **options: object) -> ShardPlan:
    result = plan(text, headers, **options)  # type: ignore[arg-type]
    assert isinstance(result, ShardPlan), result
    return result


def test_a_unit_as_packages_write_them_is_divided() -> None:
    made = divided(CAUSAL, HEADERS)
    assert made.instantiations == (
        ("template void f < float , float > ( Params & params , cudaStream_t stream ) ;",),
        ("template void f < at :: Half , float > ( Params & params , cudaStream_t stream ) ;",),
        ("template void f < std :: vector < std :: vector < int > > , float > "
         "( Params & params , cudaStream_t stream ) ;",),
    )  # fmt: skip


def test_the_texts_are_the_original_but_for_the_other_shards_instantiations() -> None:
    made = divided(CAUSAL, HEADERS)
    lines = CAUSAL.split("\n")
    kept: list[str] = []
    for text in made.texts:
        first, *rest = text.split("\n")
        assert first == '#line 1 "/p/csrc/unit.cu"'
        assert len(rest) == len(lines)
        differing = [number for number, line in enumerate(rest) if line != lines[number]]
        for number in differing:
            assert len(rest[number]) == len(lines[number])
            assert "template" not in rest[number]
            assert rest[number].strip() in ("", "/* kept */ using A = int;")
        kept += [line for line in rest if line.startswith("template void")]
        assert "".join(rest).count("using A = int;") == 1
    assert sorted(kept) == sorted(line for line in lines if line.startswith("template void"))


def test_line_ends_and_splices_inside_an_instantiation_are_kept() -> None:
    text = TEMPLATE + "template void f<float>( // a\r\n float *);\ntemplate \\\n void f<int>(int *);"
    one, two = divided(text).texts
    assert [each.count("\n") for each in (one, two)] == [text.count("\n") + 1] * 2
    assert "\r\n" in two
    assert one.splitlines()[4:] == [" " * 10, " " * 20]


def test_instantiations_are_dealt_out_in_turn_to_at_most_as_many_shards_as_allowed() -> None:
    text = TEMPLATE + "".join(f"template void f<T{number}>(T{number} *);\n" for number in range(5))
    made = divided(text, most=2)
    assert [[name.split()[4] for name in names] for names in made.instantiations] == [
        ["T0", "T2", "T4"],
        ["T1", "T3"],
    ]
    assert isinstance(plan(text, most=1), Whole)
    assert len(divided(text, most=100).texts) == 5


def test_heavy_instantiations_get_shards_of_their_own_and_light_ones_share_one() -> None:
    text = TEMPLATE + "".join(f"template void f<T{number}>(T{number} *);\n" for number in range(6))
    made = plan_shards(
        UNIT,
        read=lambda _: text,
        include_folders=[],
        own=lambda _: True,
        most=3,
        weight=lambda instantiation: 4.0 if "T1" in instantiation or "T4" in instantiation else 1.0,
    )
    assert isinstance(made, ShardPlan)
    assert [[name.split()[4] for name in names] for names in made.instantiations] == [
        ["T1"],
        ["T4"],
        ["T0", "T2", "T3", "T5"],
    ]


def test_classes_kernels_and_functions_in_namespaces_are_instantiated_too() -> None:
    text = """
    namespace x::y {
    template <typename T> __global__ void k(T *x) {}
    template <typename T> struct S { void m(); };
    template <typename T> void S<T>::m() {}
    template struct S<int>;
    template __global__ void k<float>(float *);
    }  // namespace
    template class x::y::S<char>;
    """
    assert len(divided(text).texts) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("static int calls;", "a variable"),
        ("int calls = 0;", "a variable"),
        ("static int calls = 0;", "a variable"),
        ("std::map<int, std::string> cache;", "a variable"),
        ("static std::vector<int> v{1, 2};", "a variable"),
        ("Registry<float> registry(kSize);", "either a function or a variable"),
        ("static Foo registry(kSize, 3);", "either a function or a variable"),
        ("static Foo registry(int(3));", "either a function or a variable"),
        ("Foo registry(a * b);", "either a function or a variable"),
        ("static auto registered = at::reg(3);", "a variable"),
        ('const char *names[] = {"a"};', "a variable"),
        ("const int size = now();", "a variable"),
        ("inline int shared = 3;", "a variable"),
        ("__device__ int counter;", "memory of the GPU"),
        ("__constant__ float table[4];", "memory of the GPU"),
        ("__managed__ int all;", "memory of the GPU"),
        ("__device__ constexpr int n = 3;", "memory of the GPU"),
        ("extern __device__ int counter;", "memory of the GPU"),
        ("thread_local int mine;", "memory of the GPU"),
        ("extern int elsewhere;", "extern"),
        ("template <typename T> T held;", "a variable"),
        ("template <typename T> __device__ T held;", "memory of the GPU"),
        ("struct A { static int n; };\nint A::n = 0;", "a variable"),
        ("template <typename T> int A<T>::n = 0;", "a variable"),
        ("struct A { inline static int n = 0; };", "a static variable"),
        ("struct A { static inline std::function<void(int)> n; };", "a static variable"),
        ("struct A { static thread_local int n; };", "thread_local"),
        ("struct A { mutable int n; };", "mutable"),
        ("namespace { struct A {}; }", "anonymous namespace"),
        ("namespace a { namespace { int x; } }", "anonymous namespace"),
        ("inline namespace { }", "anonymous namespace"),
        ("struct { int n; } one;", "variable"),
        ("struct A { int n; } one;", "a variable beside its class"),
        ("struct A one;", "spelled with its key"),
        ("struct A one{1};", "spelled with its key"),
        ("static union { int a; float b; };", "a variable"),
        ("enum { A, B } mode;", "a variable beside its class"),
        ("typedef struct { int a; } A, *B; int x;", "a variable"),
        ("void run() {}", "neither inline nor static"),
        ("__device__ int run(int x) { return x; }", "neither inline nor static"),
        ("__global__ void run(int *x) {}", "a kernel"),
        ("static __global__ void run(int *x) {}", "a kernel"),
        ("template <> void g<int>(int) {}", "a full specialization"),
        ("template <> template <> void A<int>::g<int>(int) {}", "a full specialization"),
        ("int A::get() { return 1; }", "neither inline nor static"),
        ("A::A() : x(1) {}", "without a type"),
        ("static int next() { static int n = 0; return ++n; }", "a static variable"),
        ("inline __device__ int next() { static int n; return ++n; }", "a static variable"),
        ("template <typename T> int next() { static T n; return ++n; }", "a static variable"),
        ("inline int next(struct S *s) { static int n; return ++n; }", "a static variable"),
        ("inline int next() { static const int n = now(); return n; }", "a static variable"),
        ("inline int next() { struct L { int get() { static int n; return ++n; } }; return 0; }", "static"),
        ("struct A { int next() { static int n; return ++n; } };", "a static variable"),
        ("inline int next() { thread_local int n; return ++n; }", "thread_local"),
        ("constexpr auto next = [] { static int n; return ++n; };", "a static variable"),
        ("inline int next() { static\n#ifdef A\nconstexpr\n#endif\nint n = 0; return n; }", "a directive"),
        ('extern "C" { int c_state; }', "a string in a declaration"),
        ('extern "C" void c_function();', "a string in a declaration"),
        ("const volatile int n = 3;", "volatile"),
        ("constexpr volatile int n = 3;", "volatile"),
        ("__attribute__((constructor)) static void run() {}", "attribute constructor"),
        ("[[gnu::constructor]] static void run() {}", "attribute constructor"),
        ("__attribute__((device)) constexpr int n = 3;", "attribute device"),
        ("struct A { __attribute__((device)) static int n; };", "attribute device"),
        ("inline int g(int x = [] { static int n; return n++; }()) { return x; }", "declaration's head"),
        ("struct A : decltype([] { static int n; }) {};", "declaration's head"),
        ("static_assert([] { static int n; return true; }());", "a static variable"),
        ("void f(int), *g;", "a variable"),
        ("int f(int a), g = 3;", "a variable"),
        ("const static int n = 3, m = now();", "a variable"),
        ("inline void g() { struct A { static inline int n; }; }", "a static variable"),
        ("struct A { friend int g() { static int n; return n; } };", "a static variable"),
        ("inline void g() try { static int n; } catch (...) {}", "a static variable"),
        ('asm(".globl x");', "asm"),
        ("TORCH_LIBRARY(a, m) { m.def(1); }", "unknown macro"),
        ("DEFINE_COUNTER(x);", "unknown macro"),
        ("DEFINE_COUNTER(x) inline void g() {}", "a variable, or a declaration that isn't known"),
        ("DEFINE_STATE\ntemplate <typename T> void g(T) {}", "unknown macro before a template"),
        ("DEFINE_STATE using A = int;", "a variable"),
        ("CUB_NAMESPACE_BEGIN struct A {};", "a variable"),
        ("#define STATE static int n;\nSTATE", "unknown macro before a template"),
        ("#define OPEN namespace {\nOPEN struct A {}; }", "closes nothing"),
        ("#define OPEN namespace {\nOPEN;", "a variable|macro OPEN"),
        ("#define KIND static\ninline int next() { KIND int n; return ++n; }", "macro KIND holds a static"),
        ("#define BEGIN {\n#define END }\ninline void g() BEGIN END", "macro"),
        ("#define MAYBE inline\n#undef MAYBE\n#define MAYBE\nMAYBE void g() {}", "neither inline"),
        ("#define NAME(x) sta ## tic x\ninline void g() { NAME(int) n; }", "puts a keyword together"),
        ("#define inline\ninline void g() {}", "changes the language"),
        ("#define float double", "changes the language"),
        ("#undef static", "changes the language"),
        ("#define ONE int one\nONE;", "a variable"),
        ("inline int g() { return __COUNTER__; }", "__COUNTER__"),
        ("#define UNIQUE(x) x ## __COUNTER__\n", "a macro that hangs on the unit"),
        ("inline const char *g() { return __BASE_FILE__; }", "__BASE_FILE__"),
        ("#if __INCLUDE_LEVEL__ == 0\n#endif", "a macro that hangs on the unit"),
        ("#line 7", "#line"),
        ('# 7 "x.cu"', "#7"),
        ("#pragma pack(1)", "#pragma pack"),
        ('#pragma GCC optimize("O0")', "#pragma GCC optimize"),
        ('_Pragma("once")', "a string|without a type|unknown macro|_Pragma"),
        ("#include_next <x.h>", "#include_next"),
        ("#include HEADER", "#include of a macro"),
        ('#include "unit.cu"', "included again"),
        ('inline void g() {\n#include "body.inc"\n}', "#include inside a body"),
        (
            "#ifdef A\ninline void g() {\n#else\ninline void h() {\n#endif\n}",
            "inside a bracket|condition divides",
        ),
        ("#ifdef A\ninline\n#endif\nvoid g() {}", "a directive inside a declaration"),
        ("import std;", "a variable"),
        ("inline void g() {", "inside a bracket|condition divides"),
        ("inline void g() {\n#ifdef A\n}\n#else\n}\n#endif", "a } closes nothing|condition divides"),
        ("inline void g() {\n#ifdef A\nif (1) {\n#endif\n}}", "condition divides"),
        ("#ifdef A\nnamespace a {\n#endif\n}", "condition divides"),
        ("}", "closes nothing"),
        ("template <bool B = 1 < 2> void g() {}", "without its >"),
        ("int x = 'a", "literal without an end"),
        ('const char *x = R"("; template void f<char>(char *);)";', "a variable"),
        ("char c = u8'??/'';", "trigraph"),
        ("template <typename T> void g(T) {} ;; int", "unknown macro before a template"),
        ("export template <typename T> void g(T) {}", "macro before a template"),
    ],
)
def test_state_and_what_is_not_understood_keep_a_unit_whole(text: str, reason: str) -> None:
    result = plan(text + "\n" + TEMPLATE + TWO)
    assert isinstance(result, Whole), text
    assert re.search(reason, result.reason), result
    assert result.file == str(UNIT)
    # What is in the file is as bad in a header of the package, at its own place.
    if "unit.cu" not in text:
        header = "\n\n" + text + "\n"
        result = plan('#include "h.h"\n' + TEMPLATE + TWO, {"/p/include/h.h": header})
        assert isinstance(result, Whole), text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TEMPLATE + "#ifdef A" + TWO + "#endif\n", "inside a condition"),
        (TEMPLATE + TWO + "template void f<int>(int *);", "written twice"),
        (
            TEMPLATE + TWO + "inline void g() {\n#if A\n}\n#else\ntemplate void f<char>(char *);\n#endif",
            "divides",
        ),
        (TEMPLATE + TWO + "template void f<char>(\n#ifdef A\nchar *);\n#endif\n", "a condition divides"),
        (TEMPLATE + TWO + "MACRO template void f<char>(char *);", "inside a declaration"),
        (TEMPLATE + "template void f<float>(float *);", "one instantiation"),
        (TEMPLATE, "no instantiation"),
        (TEMPLATE + "#define I(T) template void f<T>(T *);\nI(int) I(char)\n", "no instantiation"),
        ("int x;", "no instantiation"),
        (TEMPLATE + "#if 0\n" + "it's\n" + "#endif" + TWO, "literal without an end"),
    ],
)
def test_instantiations_that_cannot_be_taken_apart_keep_a_unit_whole(text: str, reason: str) -> None:
    result = plan(text)
    assert isinstance(result, Whole)
    assert reason in result.reason
    assert isinstance(plan(text, force=True), Whole)


def test_a_specialization_after_an_instantiation_keeps_a_unit_whole() -> None:
    # Only in the whole text would the compiler object.
    result = plan(TEMPLATE + TWO + "template <> inline void g<int>(int) {}")
    assert isinstance(result, Whole)
    assert (result.reason, result.line) == ("a specialization after an instantiation", 5)


def test_an_instantiation_macro_beside_plain_ones_is_not_overlooked() -> None:
    text = TEMPLATE + "#define I(T) template void f<T>(T *);\nI(int)\n" + TWO
    result = plan(text)
    assert isinstance(result, Whole)


def test_headers_of_the_package_are_read_through_each_other_and_named() -> None:
    headers = {"/p/csrc/a.h": '#include <sub/b.h>\n#include "a.h"', "/p/include/sub/b.h": "\nint state;\n"}
    result = plan('#ifdef X\n#include "a.h"\n#endif\n' + TEMPLATE + TWO, headers)
    assert result == Whole("a variable, or a declaration that isn't known", "/p/include/sub/b.h", 2)


def test_headers_from_outside_are_trusted_and_shadow_what_comes_after_them() -> None:
    outside = {"/outside/torch.h": "static int state; #line"}
    assert divided("#include <torch.h>\n#include <absent.h>\n" + TEMPLATE + TWO, outside)


@pytest.mark.parametrize(
    "text", ["typedef struct A", "template <int n>", "inline", "using A =", "struct A {}", "A::A() :"]
)
def test_a_declaration_that_goes_on_after_its_file_keeps_a_unit_whole(text: str) -> None:
    result = plan('#include "h.h"\n;' + TEMPLATE + TWO, {"/p/csrc/h.h": text})
    assert isinstance(result, Whole)
    assert result.file == "/p/csrc/h.h"


def test_an_explicit_instantiation_in_a_header_keeps_the_unit_whole() -> None:
    result = plan(
        '#include "h.h"\n' + TEMPLATE + TWO, {"/p/csrc/h.h": TEMPLATE + "template void g<int>(int);"}
    )
    assert result == Whole("an explicit instantiation in a header", "/p/csrc/h.h", 2)


def test_definitions_of_the_command_line_count_as_the_files_own() -> None:
    text = "API inline void g() {}\n" + TEMPLATE + TWO
    assert divided(text, defines=("API=__host__ __device__", "NDEBUG"))
    assert isinstance(plan(text, defines=("API=static int n;",)), Whole)
    assert isinstance(plan(text, defines=("inline",)), Whole)


def test_a_file_that_cannot_be_read_is_whole() -> None:
    result = plan_shards(UNIT, read=lambda _: None, include_folders=[], own=lambda _: True, most=2)
    assert result == Whole("the file can't be read", str(UNIT), None)


def test_force_waives_the_judgement_and_nothing_else() -> None:
    text = 'static int state;\n#include "h.h"\nnamespace {\nvoid g() { }\n}\n' + TEMPLATE + TWO
    assert isinstance(plan(text, {"/p/csrc/h.h": "int state;"}), Whole)
    made = divided(text, {"/p/csrc/h.h": "int state;"}, force=True)
    assert len(made.texts) == 2
    assert isinstance(plan(text + "int a<:3:>;", force=True), Whole)


def test_the_name_in_the_line_directive_is_escaped_and_as_given() -> None:
    source = Path('a/../we "quote"\\.cu')
    made = plan_shards(source, read=lambda _: TEMPLATE + TWO, include_folders=[], own=lambda _: True, most=2)
    assert isinstance(made, ShardPlan)
    assert made.texts[0].startswith('#line 1 "a/../we \\"quote\\"\\\\.cu"\n')
