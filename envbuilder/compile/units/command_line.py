"""What a compiler's command line means: does it compile one translation unit, and from what to what? Pure."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from envbuilder.compile.units.nvcc_options import plan

Tool = Literal["nvcc", "c++", "cc"]

_CUDA = (".cu",)
_HOST = (".cpp", ".cc", ".cxx", ".c++", ".C", ".c")
_COMPILE = frozenset({"-c", "--compile", "-dc", "--device-c", "-dw", "--device-w"})
_OUTPUT = ("-o", "--output-file")
_DEPFILE = ("-MF", "--dependency-output")
_DEPTARGET = ("-MT", "-MQ", "--dependency-target-name")
_DEPS_TOO = frozenset(
    {"-MD", "-MMD", "--generate-dependencies-with-compile", "--generate-nonsystem-dependencies-with-compile"}
)
# Without an object as their result, or with several files as one: these are run as they are.
_NO_UNIT = frozenset(
    {"-E", "-S", "-M", "-MM", "--preprocess", "--generate-dependencies", "-fsyntax-only", "-", "-flto"}
    | {"--cubin", "-cubin", "--ptx", "-ptx", "--fatbin", "-fatbin", "--dryrun", "-dryrun", "--run", "-run"}
    | {"--keep", "-keep", "-save-temps", "--save-temps", "-gsplit-dwarf"}
)
# Options whose value may be the next word: that word is no source. Of gcc(1), clang and `nvcc --help`.
_OPTIONS = """
    -I -L -D -U -l -x -m -t -T -u -z -A -std -isystem -iquote -idirafter -isysroot -include -imacros -target
    -Xcompiler -Xptxas -Xlinker -Xcudafe -Xfatbinary -Xnvlink -Xarchive -Xassembler -Xpreprocessor -Xclang
    -Xcicc -ccbin -arch -code -gencode -maxrregcount -rdc -cudart -cudadevrt -odir -split-compile
    -diag-suppress -diag-error -diag-warn -time --param --std --x --include-path
    --system-include --pre-include --define-macro --undefine-macro --library --library-path
    --compiler-bindir --compiler-options
    --ptxas-options --linker-options --cudafe-options --threads --gpu-architecture --gpu-code
    --generate-code --diag-suppress --diag-error --diag-warn --split-compile --output-directory
    --maxrregcount --relocatable-device-code --cudart --time
"""
_WITH_VALUE = frozenset(_OPTIONS.split())
_INCLUDES = ("-I", "-isystem", "-iquote", "-idirafter", "--include-path", "--system-include")
_DEFINES = ("-D", "--define-macro")
# With these, a unit's text is not all of its text, or its objects are not what they look like.
_NOT_IN_SHARDS = frozenset(
    {"-include", "--pre-include", "-imacros", "-iquote", "-idirafter", "-x", "--x", "-dc", "--device-c"}
    | {
        "-dw",
        "--device-w",
        "-rdc",
        "--relocatable-device-code",
        "-dlto",
        "-ewp",
        "-static-global-template-stub",
    }
    | {"--static-global-template-stub", "--extensible-whole-program", "--dlink-time-opt"}
)
_RESPONSE = ("--options-file", "-optf")


@dataclass(frozen=True)
class Unit:
    """A command that compiles one translation unit into one object file."""

    arguments: tuple[str, ...]
    """All but those for the output and the dependency file, the source included: what decides the object."""
    source: str
    """As it was given."""
    output: str
    depfile: str | None
    deptarget: str | None
    """The object's name in the dependency file, if not `output`."""
    includes: tuple[str, ...]
    """Folders that headers are looked for in, in order."""
    defines: tuple[str, ...]
    """Macros that it defines, as NAME or NAME=VALUE."""
    kept: tuple[str, ...]
    """Architectures that it is compiled for, e.g. "sm_90"."""
    dropped: tuple[str, ...]

    @property
    def cuda(self) -> bool:
        return self.source.endswith(_CUDA)

    def hinders_shards(self, variables: Mapping[str, str]) -> str | None:
        """An option, given here or by nvcc's own `variables`, with which the unit must be compiled whole."""
        flags = (variables.get(f"NVCC_{place}_FLAGS", "").split() for place in ("PREPEND", "APPEND"))
        words = (*self.arguments, *chain.from_iterable(flags))
        return next((word for word in words if word.partition("=")[0] in _NOT_IN_SHARDS), None)

    def command(
        self, compiler: str, *, source: str, output: str, depfile: str, more: Sequence[str] = ()
    ) -> list[str]:
        """The command that compiles `source` in place of this unit's, to `output` and `depfile`."""
        words = [source if word == self.source else word for word in self.arguments]
        return [compiler, *words, *more, "-MD", "-MF", depfile, "-o", output]


@dataclass(frozen=True)
class Other:
    """Any other command: linking, `--version`, preprocessing. It is run as it is."""

    arguments: tuple[str, ...]


def read_command(
    tool: Tool,
    arguments: Sequence[str],
    *,
    wanted: Sequence[str],
    ptx: str | None = None,
    response_file: Callable[[str], str | None],
) -> Unit | Other:
    """What `arguments` ask of `tool`, for the `wanted` architectures ("90") where it is nvcc.

    `response_file` gives a response file's text, None where it can't be read.
    """
    words = list(_expanded(arguments, response_file))
    kept: list[str] = []
    dropped: list[str] = []
    if tool == "nvcc":
        planned = plan(words, wanted, ptx=ptx)
        words, kept, dropped = planned.arguments, planned.kept, planned.dropped
    rest: list[str] = []
    sources: list[str] = []
    includes: list[str] = []
    defines: list[str] = []
    output = depfile = deptarget = None
    stream = iter(words)
    for word in stream:
        option, value, given = _option(word, stream)
        if option in _OUTPUT:
            output = value
        elif option in _DEPFILE:
            depfile = value
        elif option in _DEPTARGET:
            deptarget = value
        elif word in _DEPS_TOO:
            depfile = depfile or ""
        else:
            rest += given
            if option in _INCLUDES and value is not None:
                includes.append(value)
            elif option in _DEFINES and value is not None:
                defines.append(value)
            elif option is None and not word.startswith("-") and word.endswith((*_CUDA, *_HOST)):
                sources.append(word)
    asked = set(words)
    if len(sources) != 1 or not asked & _COMPILE or asked & _NO_UNIT or rest.count(sources[0]) != 1:
        return Other(tuple(words))
    stem = posixpath.splitext(posixpath.basename(sources[0]))[0]
    output = output or f"{stem}.o"
    if depfile == "":  # the compiler's own name for it
        depfile = posixpath.splitext(output)[0] + ".d"
    return Unit(
        arguments=tuple(rest),
        source=sources[0],
        output=output,
        depfile=depfile,
        deptarget=deptarget,
        includes=tuple(includes),
        defines=tuple(defines),
        kept=tuple(kept),
        dropped=tuple(dropped),
    )


def _option(word: str, stream: Iterator[str]) -> tuple[str | None, str | None, list[str]]:
    """The option at `word`, its value, and the words that it was; (None, None, …) for any other word."""
    if word in _OUTPUT or word in _DEPFILE or word in _DEPTARGET or word in _WITH_VALUE:
        value = next(stream, "")
        return word, value, [word, value]
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        return option, value, [word]
    for short in ("-isystem", "-iquote", "-idirafter", "-MF", "-MT", "-MQ", "-I", "-D", "-o"):
        if word.startswith(short) and len(word) > len(short) and not word.startswith(("-odir", "-optf")):
            return short, word[len(short) :].removeprefix("="), [word]
    return None, None, [word]


def _expanded(arguments: Sequence[str], response_file: Callable[[str], str | None]) -> Iterator[str]:
    """`arguments` with the words of response files in their places, as far as they can be read."""
    stream = iter(arguments)
    for word in stream:
        name: str | None = None
        given = [word]
        option, equals, value = word.partition("=")
        if word in _RESPONSE:
            name = next(stream, "")
            given.append(name)
        elif equals and option in _RESPONSE:
            name = value
        elif word.startswith("@") and len(word) > 1:
            name = word[1:]
        text = response_file(name) if name else None
        if text is None:
            yield from given
        else:
            yield from _expanded(shlex.split(text), response_file)
