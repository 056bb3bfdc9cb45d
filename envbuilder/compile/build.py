"""Builds one sdist into a wheel, and checks that the wheel holds what the recipe names."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from envbuilder.compile.buildenv import BuildRoom
from envbuilder.errors import BuildError
from envbuilder.fatbin import FatbinError, gpu_architectures
from envbuilder.gpu import architecture
from envbuilder.linkage import check_linkage
from envbuilder.lock import LockedFile
from envbuilder.model import Extension
from envbuilder.process import Cancel
from envbuilder.report import Reporter
from envbuilder.shared_object import SharedObjectError

_LAST_LINES = 12
"""How much of a failed build's log goes into the error."""
# "file.cu(132): error: …", "file.cpp:7:10: fatal error: …". Many compilers run at once, so that a log's last
# lines are seldom of one that failed.
_COMPILER_ERROR = re.compile(r"^\S[^\n]*?[:(]\d+[:)].*?\berror\b.*$", re.MULTILINE)


def build_wheel(
    source: Path,
    sdist: LockedFile,
    *,
    room: BuildRoom,
    variables: Mapping[str, str],
    log: Path,
    cancel: Cancel,
) -> Path:
    """The wheel that the build backend of the tree `source` makes, in a new folder of `room`.

    The backend runs in the room's sandbox, in the build environment as it is (no isolation in the sense of
    PEP 517), with `variables` on top of the room's. BuildError where it fails, with the first error that a
    compiler wrote and the log's end.
    """
    folder = room.folder / "wheel"
    folder.mkdir()
    inside = room.sandbox.inside
    script, library = room.folder / "frontend.py", room.folder / "frontend"
    done = room.sandbox.run(
        [room.python, "-I", *map(inside, (script, library, source, folder))],
        env={**room.variables, **variables},
        cwd=source,
        log=log,
        cancel=cancel,
    )
    named = folder / "built"
    name = named.read_text(encoding="utf-8") if named.is_file() and not named.is_symlink() else None
    # Listed, not joined: what the backend calls its wheel is no path to follow.
    wheel = next((path for path in folder.iterdir() if path.name == name and not path.is_symlink()), None)
    if done.returncode != 0 or wheel is None:
        raise BuildError(
            f"Building {sdist.package} {sdist.version} failed.",
            remedy=f"envbuilder doctor --log {log}",
            context={"log": log, "exit status": done.returncode, **_told_by(log)},
        )
    return wheel


@dataclass(frozen=True)
class Expected:
    """What a built wheel must hold, and what it will be loaded with."""

    modules: tuple[str, ...]
    """Extension modules by their import names."""
    capabilities: tuple[str, ...]
    """GPU architectures of their code, these and no other, e.g. "9.0"."""
    ptx: bool
    """Whether PTX may be there too."""
    libraries: tuple[Path, ...]
    """Folders of the libraries that torch and the CUDA packages bring."""
    interpreter: Path
    glibc: str
    """The target's."""


def check_wheel(
    wheel: Path, sdist: LockedFile, expected: Expected, *, folder: Path, log: Path, reporter: Reporter
) -> tuple[Extension, ...]:
    """The extension modules of `wheel`; they are unpacked into the new `folder` to look at them.

    BuildError where the wheel is of another name or version than the lock's, lacks an expected module, or has
    one with code for other architectures, or one that could not be loaded: a build can end well and have
    compiled nothing. One that needs a newer glibc than the target's is warned of.
    """
    modules, capabilities = expected.modules, expected.capabilities

    def refusal(why: str, **context: object) -> BuildError:
        return BuildError(
            f"The build of {sdist.package} {sdist.version} ended well, but {why}.",
            remedy=f"envbuilder doctor --log {log}",
            context={"log": log, "wheel": wheel.name, **context},
        )

    try:
        name, version, _, _ = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise refusal(f"its wheel has a wrong name: {error}") from error
    if name != canonicalize_name(sdist.package) or version != Version(sdist.version):
        raise refusal(f"it made {name} {version}", expected=f"{sdist.package} {sdist.version}")
    found = _extension_files(wheel)
    if missing := [module for module in modules if module not in found]:
        raise refusal(
            f"the wheel lacks {', '.join(missing)}", expected=", ".join(modules), got=", ".join(found)
        )
    extensions = []
    with zipfile.ZipFile(wheel) as archive:
        for module in sorted(found):
            file = Path(archive.extract(found[module], folder))
            try:
                made = gpu_architectures(file)
            except FatbinError as error:
                raise refusal(f"{module} can't be read: {error}") from error
            if module in modules and not _serves(made, capabilities, ptx=expected.ptx):
                raise refusal(
                    f"{module} has GPU code for {', '.join(made) or 'nothing'}",
                    expected=", ".join(f"sm_{architecture(c)}" for c in capabilities),
                    got=", ".join(made),
                )
            if module in modules:
                _check_linkage(file, module, expected, refusal, reporter)
            extensions.append(
                Extension(
                    module=module,
                    file=found[module],
                    sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                    architectures=made,
                )
            )
    return tuple(extensions)


def _extension_files(wheel: Path) -> dict[str, str]:
    """Import name → path in the wheel of each extension module."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    # module.cpython-312-x86_64-linux-gnu.so, module.abi3.so, module.so
    matches = (re.fullmatch(r"([A-Za-z_][\w/]*)(\.(cpython-[\w-]+|abi3))?\.so", name) for name in names)
    return {match[1].replace("/", "."): match[0] for match in matches if match}


def _check_linkage(
    file: Path, module: str, expected: Expected, refusal: Callable[..., BuildError], reporter: Reporter
) -> None:
    try:
        linkage = check_linkage(
            file, libraries=expected.libraries, glibc=expected.glibc, interpreter=expected.interpreter
        )
    except SharedObjectError as error:
        raise refusal(f"{module} can't be read: {error}") from error
    if not linkage.loads:
        raise refusal(f"{module} can't be loaded", found=linkage.describe())
    if linkage.newer_than_target:
        reporter.warn(f"{module} {linkage.describe()}: it may not load on other nodes")


def _serves(made: Sequence[str], capabilities: Sequence[str], *, ptx: bool) -> bool:
    """Whether `made` is code for `capabilities`, all of them and no other; "sm_90a" is code for 9.0 too."""
    if ptx:
        made = [code for code in made if not code.startswith("compute_")]
    wanted = {architecture(capability) for capability in capabilities}
    numbers = {code.removeprefix("sm_") for code in made}
    return wanted <= numbers | {number.rstrip("af") for number in numbers} and all(
        number in wanted or number.rstrip("af") in wanted for number in numbers
    )


def _told_by(log: Path) -> dict[str, str]:
    """What a failed build's log says: the first error of a compiler, if there is one, and the last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    first = _COMPILER_ERROR.search(text)
    return ({"first error": first[0]} if first else {}) | {"last lines": "\n".join(lines[-_LAST_LINES:])}
