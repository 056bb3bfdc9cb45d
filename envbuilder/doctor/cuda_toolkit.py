"""The CUDA toolkit that `compile` would use for a recipe: the machine's, or that in the bundle's wheels."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from envbuilder.bundle import bundle_file
from envbuilder.doctor.subject import Subject
from envbuilder.errors import MismatchError
from envbuilder.interpreter import find_provided
from envbuilder.model import ProvidedPackages
from envbuilder.target import target_for
from envbuilder.toolchain import CudaToolkit, packaged_toolkit, system_toolkit

HOST_CONFIG = "crt/host_config.h"
"""The header in which nvcc judges the host compiler."""
_IN_WHEEL = re.compile(r"nvidia/cu\d+/((?:bin|include|nvvm)/.+|lib/libcudart[^/]*)")
"""What compiling needs of the wheels: not the libraries themselves, which are gigabytes."""
_SYSTEM_INCLUDES = (Path("/usr/local/include"), Path("/usr/include"))


@dataclass(frozen=True)
class ToolkitFiles:
    """A toolkit, as far as it can be looked at before anything is unpacked."""

    where: str
    """Whose it is, for people."""
    toolkit: CudaToolkit | None
    """The machine's; None where it is in wheels."""
    wheels: tuple[Path, ...]
    provided: tuple[Path, ...]
    """Folders with the headers of the libraries that a provided torch brings."""
    includes: tuple[Path, ...]
    """Where else headers are looked for, beside the wheels."""

    def header(self, name: str) -> str | None:
        """Where the header `name` ("crt/host_config.h") is; None where it isn't."""
        for folder in (*self.includes, *self.provided):
            if (folder / name).is_file():
                return str(folder / name)
        found = (wheel for wheel, member in self._members() if member == f"include/{name}")
        return next((f"{wheel.name}: include/{name}" for wheel in found), None)

    def header_text(self, name: str) -> str | None:
        """The text of the header `name`."""
        for folder in (*self.includes, *self.provided):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8", errors="replace")
        for wheel in self.wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if re.fullmatch(rf"nvidia/cu\d+/include/{re.escape(name)}", member):
                        return archive.read(member).decode(errors="replace")
        return None

    def library(self, name: str) -> str | None:
        """Where a library whose file's name begins with `name` ("libcudart.so") can be linked from."""
        homes = [self.toolkit.home / folder for folder in ("lib64", "lib")] if self.toolkit else []
        homes += [Path(folder) for folder in os.environ.get("LIBRARY_PATH", "").split(os.pathsep) if folder]
        homes += Path("/usr/lib").glob("*-linux-gnu") if self.toolkit else []
        if found := next((str(path) for home in homes for path in sorted(home.glob(f"{name}*"))), None):
            return found
        wheels = (wheel for wheel, member in self._members() if member.startswith(f"lib/{name}"))
        return next((f"{wheel.name}: {name}" for wheel in wheels), None)

    def unpacked(self, folder: Path) -> CudaToolkit:
        """The toolkit, ready to run: one in wheels is unpacked into `folder`. MismatchError without nvcc."""
        if self.toolkit is not None:
            return self.toolkit
        for wheel in self.wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    if _IN_WHEEL.fullmatch(member.filename):
                        path = Path(archive.extract(member, folder))
                        path.chmod(0o755 if path.parent.name == "bin" else 0o644)
        return packaged_toolkit(folder)

    def _members(self) -> Iterator[tuple[Path, str]]:
        for wheel in self.wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if found := _IN_WHEEL.fullmatch(member):
                        yield wheel, found[1]


def why_no_toolkit(subject: Subject) -> str | None:
    """Why there is no toolkit to look at, where there need be none; None where there must be one."""
    if subject.recipe is None:
        return "No recipe was given."
    if subject.recipe.cuda is None:
        return "The recipe compiles no GPU code."
    if subject.recipe.cuda.toolchain == "packages" and not subject.has_bundle:
        return f"Its nvcc comes with the bundle: envbuilder fetch {subject.recipe_file}"
    return None


def toolkit_files(subject: Subject) -> ToolkitFiles:
    """The toolkit of `subject`, where `why_no_toolkit` is None; MismatchError where the machine has none."""
    assert subject.recipe is not None
    assert subject.recipe.cuda is not None
    named = [Path(folder) for folder in os.environ.get("CPATH", "").split(os.pathsep) if folder]
    if subject.recipe.cuda.toolchain == "system":
        toolkit = system_toolkit(os.environ)
        where = f"{toolkit.nvcc}, CUDA {toolkit.version}"
        provided = _provided_includes(subject, toolkit.home.name)
        return ToolkitFiles(
            where, toolkit, (), provided, (toolkit.home / "include", *named, *_SYSTEM_INCLUDES)
        )
    bundle = subject.bundle
    files = bundle.lock.select(target_for(bundle.lock.target, bundle.record.python), ("build",))
    wheels = tuple(
        path
        for file in files
        if file.package.startswith("nvidia-") and (path := bundle_file(bundle, file)).is_file()
    )
    if not wheels or not all(map(zipfile.is_zipfile, wheels)):
        raise MismatchError(
            f"The bundle {'holds no wheel' if not wheels else 'has a damaged wheel'} of the CUDA toolkit.",
            remedy=f"envbuilder fetch {subject.recipe_file} --verify",
            context={"bundle": bundle.path},
        )
    where = f"{len(wheels)} wheels of the bundle"
    return ToolkitFiles(where, None, wheels, _provided_includes(subject, "cu*"), tuple(named))


def provided_packages(subject: Subject) -> ProvidedPackages | None:
    """The packages that the recipe takes from the machine; None where it takes none."""
    if subject.env:
        return subject.receipt.provided
    return find_provided(subject.recipe, subject.lock) if subject.recipe else None


def _provided_includes(subject: Subject, home: str) -> tuple[Path, ...]:
    """A provided torch has the headers of the CUDA libraries that it uses beside itself."""
    provided = provided_packages(subject)
    folders = map(Path, provided.site_packages) if provided else ()
    return tuple(path for folder in folders for path in sorted(folder.glob(f"nvidia/{home}/include")))
