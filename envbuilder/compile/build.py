"""Builds one sdist into a wheel, and checks that the wheel holds what the recipe names."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from build import BuildBackendException, BuildException, ProjectBuilder
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version
from pydantic import ValidationError

from envbuilder.compile.buildenv import SOURCE_DATE_EPOCH, BuildEnv
from envbuilder.errors import BuildError
from envbuilder.fatbin import FatbinError, gpu_architectures
from envbuilder.gpu import architecture
from envbuilder.lock import LockedFile
from envbuilder.model import Extension, UnitTiming
from envbuilder.process import run
from envbuilder.report import Reporter

_NINJA_PROGRESS = re.compile(r"\[(\d+)/(\d+)\] ")
_LAST_LINES = 12
"""How much of a failed build's log goes into the error."""


def build_wheel(
    source: Path,
    sdist: LockedFile,
    *,
    env: BuildEnv,
    variables: Mapping[str, str],
    folder: Path,
    log: Path,
    reporter: Reporter,
) -> Path:
    """The wheel that the build backend of the tree `source` makes, put into the new `folder`.

    The backend runs in the sandbox, in the build environment as it is (no isolation in the sense of PEP 517),
    with `variables` on top of the environment's. BuildError, with the log's end, where it fails.
    """
    label = f"compiling {sdist.package}"

    def on_line(line: str) -> None:
        if match := _NINJA_PROGRESS.match(line):
            reporter.progress(label, int(match[1]), int(match[2]), "units")

    def in_sandbox(
        cmd: Sequence[str], cwd: str | None = None, extra_environ: Mapping[str, str] | None = None
    ) -> None:
        done = env.sandbox.run(
            cmd,
            env={**env.variables, **variables, **(extra_environ or {})},
            cwd=Path(cwd or source),
            log=log,
            on_line=on_line,
        )
        if done.returncode != 0:
            raise subprocess.CalledProcessError(done.returncode, list(cmd), done.output)

    folder.mkdir()
    try:
        with _warnings_in(log):
            builder = ProjectBuilder(source, python_executable=str(env.python), runner=in_sandbox)
            return Path(builder.build("wheel", folder))
    except (BuildException, BuildBackendException) as error:
        raise BuildError(
            f"Building {sdist.package} {sdist.version} failed.",
            remedy=f"envbuilder doctor --log {log}",
            context={"log": log, "reason": error, "last lines": _last_lines(log)},
        ) from error


@contextmanager
def _warnings_in(log: Path) -> Iterator[None]:
    """Puts Python warnings into `log`: pyproject_hooks repeats the backend's, which are for its authors."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            with log.open("a", encoding="utf-8") as file:
                file.writelines(f"{warning.category.__name__}: {warning.message}\n" for warning in told)


def check_wheel(
    wheel: Path,
    sdist: LockedFile,
    *,
    modules: Sequence[str],
    capabilities: Sequence[str],
    folder: Path,
    log: Path,
) -> tuple[Extension, ...]:
    """The extension modules of `wheel`; they are unpacked into the new `folder` to look at their GPU code.

    BuildError where the wheel is of another name or version than the lock's, lacks one of `modules`, or has
    one with code for other architectures than `capabilities`: a build can end well and have compiled nothing.
    """

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
            if module in modules and not _serves(made, capabilities):
                raise refusal(
                    f"{module} has GPU code for {', '.join(made) or 'nothing'}",
                    expected=", ".join(f"sm_{architecture(c)}" for c in capabilities),
                    got=", ".join(made),
                )
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


def _serves(made: Sequence[str], capabilities: Sequence[str]) -> bool:
    """Whether `made` is code for `capabilities`, all of them and no other; "sm_90a" is code for 9.0 too."""
    wanted = {architecture(capability) for capability in capabilities}
    numbers = {code.removeprefix("sm_") for code in made}
    return wanted <= numbers | {number.rstrip("af") for number in numbers} and all(
        number in wanted or number.rstrip("af") in wanted for number in numbers
    )


def tag_wheel(wheel: Path, build_tag: str) -> Path:
    """`wheel` renamed and rewritten with `build_tag` (PEP 427), so that two ABIs of one version differ."""
    done = run(
        [sys.executable, "-m", "wheel", "tags", "--remove", "--build", build_tag, wheel],
        env={**os.environ, "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH},
    )
    if done.returncode != 0:
        raise BuildError(
            f"The wheel {wheel.name} that was built is damaged.",
            remedy="Report it to whoever publishes the package.",
            context={"wheel": wheel.name, "output": done.output.strip()[-500:]},
        )
    return wheel.with_name(done.output.strip().rpartition("\n")[2])


def read_units(units_log: Path, source: Path) -> tuple[UnitTiming, ...]:
    """What the nvcc driver measured since the log was removed; sources are named from the tree `source`."""
    lines = units_log.read_text(encoding="utf-8").splitlines() if units_log.exists() else []
    try:
        units = [UnitTiming.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise BuildError(
            "The record of the compiled units is damaged.",
            remedy="Run the command again, and report it if it stays so.",
            context={"file": units_log},
        ) from error
    prefix = f"{source}/"
    return tuple(unit.model_copy(update={"source": unit.source.removeprefix(prefix)}) for unit in units)


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_LAST_LINES:])
