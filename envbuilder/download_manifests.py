"""What CMake files and the manifests of other build tools would fetch: read as text, nothing is run. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import PurePosixPath

_COMMAND = re.compile(
    r"\b(FetchContent_Declare|ExternalProject_Add|CPM(?:Add|Find|Declare)Package|file|execute_process)\s*\(",
    re.IGNORECASE,
)
_SPELLINGS = {
    name.lower(): name
    for name in (
        "FetchContent_Declare",
        "ExternalProject_Add",
        "CPMAddPackage",
        "CPMFindPackage",
        "CPMDeclarePackage",
    )
}
# A URL that is a plain path is a file of the sdist.
_FROM_AFAR = re.compile(
    r"\b(?:GIT_REPOSITORY|HG_REPOSITORY|SVN_REPOSITORY|CVS_REPOSITORY)\b|\bURL\s+\"?(?:\w+://|\$)"
)
_FETCHERS = re.compile(
    r"\bgit\"?\s+(?:clone|fetch|pull|submodule\s+update)\b|\b(?:curl|wget|aria2c)\b", re.IGNORECASE
)
_DIRECTORY_VARIABLE = re.compile(r"ENV\{(\w+_(?:DIR|PATH|ROOT|SRC|SOURCE))\}")

# What only the tests of a project fetch.
_FOR_TESTS = re.compile(r"(?:ADD|FIND)?(?:(?:G|GOOGLE)(?:TEST|BENCHMARK)|BENCHMARK|CATCH2?|DOCTEST)(?:EP)?")
_LONGEST_BODY = 20_000
"""Characters of one command that are read."""


def scan_cmake(text: str) -> Iterator[tuple[int, str, str | None]]:
    """Line, what is fetched, and the environment variable that names a local copy instead, if any."""
    text = _without_comments(text)
    variables = sorted(set(_DIRECTORY_VARIABLE.findall(text)))
    for match in _COMMAND.finditer(text):
        command, body = match[1].lower(), _body(text, match.end())
        line = text.count("\n", 0, match.start()) + 1
        name = re.split(r"\s", body.strip() + " ", maxsplit=1)[0].strip('"')
        if command == "file":
            if name == "DOWNLOAD":
                yield line, "file(DOWNLOAD)", None
        elif command == "execute_process":
            if fetcher := _FETCHERS.search(body):
                yield line, f"execute_process({' '.join(fetcher[0].replace(chr(34), ' ').split())})", None
        elif command.startswith("cpm") or _FROM_AFAR.search(body):
            if command.startswith("cpm") and (stated := re.search(r"\bNAME\s+(\S+)", body)):
                name = stated[1]
            folded = _folded(name)
            if _FOR_TESTS.fullmatch(folded):
                continue
            local = next((variable for variable in variables if folded in _folded(variable)), None)
            yield line, f"{_SPELLINGS[command]}({name})", local


def is_for_tests(file: str) -> bool:
    """Whether the CMake file's name says that it brings a framework for tests."""
    return _FOR_TESTS.fullmatch(_folded(PurePosixPath(file).stem)) is not None


def scan_manifests(texts: Mapping[str, str], names: frozenset[str]) -> Iterator[tuple[str, int, str]]:
    """File, line and what: submodules that an sdist lacks, crates, Meson wraps and Go modules.

    `texts` are the manifests by path, `names` all files of the sdist.
    """
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for file, text in sorted(texts.items()):
        path = PurePosixPath(file)
        if path.name == ".gitmodules":
            for match in re.finditer(r"^\s*path\s*=\s*(\S+)", text, re.MULTILINE):
                if str(path.parent / match[1]) not in folders:
                    yield (
                        file,
                        text.count("\n", 0, match.start(1)) + 1,
                        f"submodule {match[1]}, which is not in it",
                    )
        elif path.suffix == ".wrap" and path.parent.name == "subprojects":
            yield from _wrap(file, text, folders)
        elif (
            path.name == "go.mod"
            and re.search(r"^require\b", text, re.MULTILINE)
            and str(path.parent / "vendor") not in folders
        ):
            yield file, 0, "Go modules that it requires"
    yield from _crates(texts)


def _crates(texts: Mapping[str, str]) -> Iterator[tuple[str, int, str]]:
    """One entry for all Cargo manifests, unless the crates' sources lie beside them."""
    vendored = any(
        PurePosixPath(file).parent.name == ".cargo" and "vendored-sources" in text
        for file, text in texts.items()
    )
    asking = [
        file
        for file, text in sorted(texts.items(), key=lambda item: (item[0].count("/"), item[0]))
        if PurePosixPath(file).name == "Cargo.toml" and re.search(r"^\[.*dependencies", text, re.MULTILINE)
    ]
    if asking and not vendored:
        yield asking[0], 0, "crates that Cargo fetches"


def _wrap(file: str, text: str, folders: set[str]) -> Iterator[tuple[str, int, str]]:
    parser = ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(text)
    except ConfigError:
        return
    for kind in ("wrap-file", "wrap-git"):
        if not parser.has_section(kind) or not ({"source_url", "url"} & set(parser[kind])):
            continue
        folder = parser[kind].get("directory", PurePosixPath(file).stem)
        if str(PurePosixPath(file).parent / folder) not in folders:
            yield file, 0, f"Meson's subproject {PurePosixPath(file).stem}"


def _without_comments(text: str) -> str:
    """CMake text with its comments blanked, line by line as it was."""
    text = re.sub(r"#\[(=*)\[.*?\]\1\]", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r'^((?:[^"#\n]|"[^"\n]*")*)#.*$', r"\1", text, flags=re.MULTILINE)


def _body(text: str, start: int) -> str:
    """What stands between the parenthesis that ends before `start` and the one that closes it."""
    depth = 1
    end = min(len(text), start + _LONGEST_BODY)
    for index in range(start, end):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return text[start:end]


def _folded(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())
