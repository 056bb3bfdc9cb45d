"""What in an sdist may download while it is built, found without running any of it.

Build scripts guess a release wheel's URL, clone submodules, or let CMake fetch sources. On a node without a
network they fail, or hang, long after the job began. Here its build files are read: setup.py, an in-tree
backend (PEP 517) and what those import, shell scripts that they call, CMake files, and the manifests of other
tools. What a build puts together at run time can't be seen; what is there but never reached may be reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Literal

from packaging.utils import canonicalize_name, parse_sdist_filename

from envbuilder.archive import archive_members
from envbuilder.download_calls import PythonFindings, scan_python, scan_shell
from envbuilder.download_manifests import is_for_tests, scan_cmake, scan_manifests
from envbuilder.toml import tomllib

_FILE = 2 << 20
"""Most bytes of a file that is looked at."""
_KEPT = 128 << 20
"""Most bytes of all files that are looked at."""
_LOOKED_AT = re.compile(
    r"(?:.*/)?(?:[^/]+\.(?:py|cmake|sh|wrap)|CMakeLists\.txt|Cargo\.toml|\.gitmodules|go\.mod)"
    r"|pyproject\.toml|setup\.cfg|(?:.*/)?\.cargo/config(?:\.toml)?"
)
_LEFT_ALONE = re.compile(
    r"\.?(?:(?:manual |unit[ _]?)?tests?|test cases|testing|docs?|examples?|samples|bench(?:marks?)?|github)"
)
# Build scripts of backends that are not setuptools, by the backend's first word.
_SCRIPTS = {"hatchling": "hatch_build.py", "pdm": "pdm_build.py", "poetry": "build.py"}
# In the order of preference, where one file has several.
_SWITCH_NAMES = (
    re.compile(r"[A-Z][A-Z0-9_]*_FORCE_BUILD"),
    re.compile(r"[A-Z][A-Z0-9_]*_OFFLINE(?:_BUILD|_MODE)?"),
    re.compile(r"[A-Z][A-Z0-9_]*_(?:NO|SKIP|DISABLE)_(?:DOWNLOADS?|FETCH|NETWORK|PREBUILT|PRECOMPILED)"),
    re.compile(r"[A-Z][A-Z0-9_]*_(?:BUILD_)?FROM_SOURCE"),
)
_NO = frozenset({"", "0", "false", "no", "off"})
_DEPTH = 2
"""How many imports away from setup.py a file may be: it may import the whole package that it builds."""

How = Literal["set", "contains", "unset"]


@dataclass(frozen=True)
class Switch:
    """A variable of the build's environment that keeps it from downloading."""

    variable: str
    value: str
    """What it must be, or hold; "*" is anything that says yes."""
    how: How = "set"
    """ "unset": the download is made only where the variable says yes."""

    def is_off(self, environment: Mapping[str, str]) -> bool:
        """Whether a build with `environment` does without the download."""
        got = environment.get(self.variable, "")
        if self.how == "contains":
            return self.value in got
        if self.value == "*" or self.how == "unset":
            return (got.lower() in _NO) == (self.how == "unset")
        return got.lower() == self.value.lower()


@dataclass(frozen=True)
class BuildDownload:
    """One place in an sdist that would download while it is built."""

    file: str
    """Its path below the sdist's top folder."""
    line: int
    """Counted from 1; 0 where it is the file as a whole."""
    what: str
    """What it calls or declares, e.g. "urllib.request.urlretrieve", "FetchContent_Declare(cutlass)"."""
    switch: Switch | None = None
    """What turns it off, if that is known."""
    requires: tuple[str, ...] = ()
    """Not empty for `setup_requires`: nothing is downloaded where the build environment has all of them."""
    unread: bool = False
    """The file can't be read, so whether it downloads is not known; `what` says why."""


def scan_sdist(path: Path) -> tuple[BuildDownload, ...]:
    """What the build files of the sdist (.tar.gz) at `path` would download, by file and line.

    Nothing of it is run, imported or unpacked. A file that can't be parsed is told as `unread`. InputError
    where the archive is no sound sdist or far too large.
    """
    package = canonicalize_name(parse_sdist_filename(path.name)[0])
    names, texts = _read(path)
    found = [*_scan_build_scripts(texts)]
    if _uses_cmake(texts):
        for file, text in texts.items():
            if file.endswith((".cmake", "CMakeLists.txt")) and not (
                _beside_the_build(file) or is_for_tests(file)
            ):
                for line, what, variable in scan_cmake(_text(text)):
                    switch = Switch(variable, "*") if variable else None
                    found.append(BuildDownload(file, line, what, switch))
    manifests = {
        file: _text(text)
        for file, text in texts.items()
        if not file.endswith(".py") and not _beside_the_build(file)
    }
    found += [BuildDownload(file, line, what) for file, line, what in scan_manifests(manifests, names)]
    known = [replace(item, switch=item.switch or _known_switch(package, item.what)) for item in found]
    return tuple(sorted(known, key=lambda item: (item.file, item.line, item.what)))


def _scan_build_scripts(texts: Mapping[str, bytes]) -> Iterator[BuildDownload]:
    """What setup.py, or the backend's script, and all that these lead to would download."""
    starts, folders = _entry_points(texts)
    waiting = [(file, 0) for file in starts if file in texts]
    seen = set(starts)
    while waiting:
        file, depth = waiting.pop(0)
        if file.endswith(".sh"):
            yield from (BuildDownload(file, call.line, call.what) for call in scan_shell(_text(texts[file])))
            continue
        try:
            findings = scan_python(texts[file])
        except (SyntaxError, ValueError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            yield BuildDownload(file, 0, f"can't be parsed ({reason})", unread=True)
            continue
        switch = _switch_in(findings)
        for call in findings.calls:
            yield BuildDownload(file, call.line, call.what, switch)
        if findings.setup_requires:
            names = ", ".join(findings.setup_requires)
            yield BuildDownload(
                file,
                findings.setup_requires_line,
                f"setup_requires ({names})",
                requires=findings.setup_requires,
            )
        for led_to in _led_to(file, findings, folders, at_once=depth > 0):
            if depth < _DEPTH and led_to in texts and led_to not in seen:
                seen.add(led_to)
                waiting.append((led_to, depth + 1))


def _entry_points(texts: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """The files that a build frontend has run first, and the folders that the backend imports from."""
    try:
        build_system = tomllib.loads(_text(texts.get("pyproject.toml", b""))).get("build-system", {})
    except tomllib.TOMLDecodeError:
        build_system = {}
    if not isinstance(build_system, dict):
        build_system = {}
    backend = str(build_system.get("build-backend", "setuptools"))
    listed = build_system.get("backend-path", [])
    folders = [str(PurePosixPath(str(folder))) for folder in listed] if isinstance(listed, list) else []
    module = backend.partition(":")[0]
    starts = [file for folder in folders for file in _module_files(module, [folder])]
    first = module.partition(".")[0].partition("_")[0]
    # An in-tree backend mostly goes on to setuptools.
    starts.append(_SCRIPTS.get(first, "") if first in _SCRIPTS and not folders else "setup.py")
    if first not in {"setuptools", *_SCRIPTS} and not folders:
        starts.remove("setup.py")
    return starts, folders


def _led_to(file: str, findings: PythonFindings, folders: list[str], *, at_once: bool) -> Iterator[str]:
    """Where the files would lie that `file` imports, or names in a text: it may run those.

    at_once: leave out what only its functions import.
    """
    here = str(PurePosixPath(file).parent)
    for module in sorted(findings.imports_at_once if at_once else findings.imports):
        yield from _module_files(module, [".", here, *folders])
    for word in sorted(findings.words):
        if word.endswith((".py", ".sh")) and not _beside_the_build(word):
            yield _joined(here, word)
            yield _joined(".", word)


def _module_files(module: str, folders: list[str]) -> Iterator[str]:
    """Where the module and the packages that it is in may lie."""
    parts = module.split(".")
    for folder in folders:
        for count in range(1, len(parts) + 1):
            stem = _joined(folder, "/".join(parts[:count]))
            yield f"{stem}.py"
            yield f"{stem}/__init__.py"


def _joined(folder: str, path: str) -> str:
    return str(PurePosixPath(folder) / path)


def _switch_in(findings: PythonFindings) -> Switch | None:
    """The variable by which the file's own code can be kept from downloading, if its name tells so."""
    for pattern in _SWITCH_NAMES:
        names = sorted(word for word in findings.words if pattern.fullmatch(word))
        if names:
            return Switch(names[0], findings.expected.get(names[0], "1"))
    return None


def _uses_cmake(texts: Mapping[str, bytes]) -> bool:
    """Whether the build calls CMake: else the CMake files are for those who build it in other ways."""
    asked = (
        text for file, text in texts.items() if re.fullmatch(r"setup\.py|pyproject\.toml|[^/]+\.sh", file)
    )
    return any(re.search(rb"cmake|scikit[-_]build|skbuild", text, re.IGNORECASE) for text in asked)


def _beside_the_build(file: str) -> bool:
    """Whether a file lies in a folder that builds leave alone."""
    return any(_LEFT_ALONE.fullmatch(part) for part in PurePosixPath(file.lower()).parts[:-1])


@dataclass(frozen=True)
class _KnownSwitch:
    package: str
    what: str
    variable: str
    value: str
    how: How
    seen: str


@cache
def _known_switches() -> tuple[_KnownSwitch, ...]:
    text = files("envbuilder").joinpath("build_downloads.toml").read_text(encoding="utf-8")
    return tuple(_KnownSwitch(**entry) for entry in tomllib.loads(text)["switch"])


def _known_switch(package: str, what: str) -> Switch | None:
    for known in _known_switches():
        if fnmatchcase(package, known.package) and re.fullmatch(known.what, what):
            return Switch(known.variable, known.value, known.how)
    return None


def _read(path: Path) -> tuple[frozenset[str], dict[str, bytes]]:
    """The paths of all files of the archive below its top folder, and the bytes of those looked at."""
    names: set[str] = set()
    texts: dict[str, bytes] = {}
    kept = 0
    with archive_members(path) as members:
        for member in members:
            if not member.is_file:
                continue
            names.add(member.path)
            if _LOOKED_AT.fullmatch(member.path) and member.size <= _FILE and kept + member.size <= _KEPT:
                texts[member.path] = member.read()
                kept += member.size
    return frozenset(names), texts


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
