"""Virtual environments from verified wheels: made by the standard library's venv, filled by uv offline."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from uv import find_uv_bin

from envbuilder.atomic import make_folder, no_room, scratch_folder
from envbuilder.bundle import hash_file
from envbuilder.envlock import WheelFile, env_lock_text
from envbuilder.errors import EnvbuilderError, IntegrityError, MismatchError
from envbuilder.interpreter import Interpreter
from envbuilder.model import ProvidedPackages
from envbuilder.process import run

PROVIDED_PTH = "envbuilder-provided.pth"
"""In an env's site-packages: the folders of the packages that the machine provides. No RECORD lists it."""


def make_venv(interpreter: Interpreter, folder: Path, provided: ProvidedPackages | None = None) -> Path:
    """An empty virtual environment (without pip) in `folder`; returns its site-packages.

    It is relocatable: scripts that uv puts into it find their interpreter beside them. With `provided`, its
    import path ends with the provider's folders: `--system-site-packages` would not reach a provider that is
    itself a venv.
    """
    done = run([interpreter.path, "-I", "-m", "venv", "--without-pip", folder])
    if done.returncode != 0:
        raise MismatchError(
            f"{interpreter.path} can't make a virtual environment.",
            remedy="Debian, Ubuntu: apt install python3-venv; or give --python PATH of another interpreter.",
            context={"folder": folder, "output": done.output.strip()[-500:]},
        )
    with (folder / "pyvenv.cfg").open("a", encoding="utf-8") as config:
        config.write("relocatable = true\n")
    packages = site_packages(folder, interpreter.minor)
    if provided is not None:
        lines = "".join(f"{path}\n" for path in provided.site_packages)
        (packages / PROVIDED_PTH).write_text(lines, encoding="utf-8")
    return packages


def venv_python(folder: Path) -> Path:
    """The interpreter of the venv in `folder`."""
    return folder / "bin" / "python"


def site_packages(folder: Path, minor: str) -> Path:
    """The site-packages of the venv in `folder`, for minor Python version `minor`."""
    return folder / "lib" / f"python{minor}" / "site-packages"


def install_wheels(venv: Path, wheels: Sequence[WheelFile], *, scratch: Path, remedy: str) -> None:
    """Installs `wheels` into `venv`, all or none of them, without index, network or dependencies.

    uv hashes each wheel while it unpacks it, so what is installed is what was verified: nothing unpacked
    earlier is trusted. `scratch` must be on the venv's file system: files are unpacked there and linked.
    Raises IntegrityError where a wheel has other bytes than its sha256 says (with `remedy`), or members that
    no wheel may have.
    """
    for wheel in wheels:
        _check_members(wheel.path)
    make_folder(scratch)
    with scratch_folder(scratch, "unpack-") as private:
        lock = private / "pylock.toml"
        lock.write_text(env_lock_text(wheels, lock.parent), encoding="utf-8")
        uv = [find_uv_bin(), "--quiet", "--offline", "--no-config", "--color=never", "pip", "install"]
        done = run(
            [
                *uv,
                *("--preview-features", "pylock", "--no-index", "--no-deps", "--link-mode=hardlink"),
                *("--cache-dir", private / "cache", "--python", venv_python(venv), "-r", lock),
            ],
            # No UV_* and PIP_* variables of the user's: they name indexes, constraints and caches.
            env={"PATH": os.defpath, "HOME": str(private), "TMPDIR": str(private)},
        )
    if done.returncode != 0:
        raise _failure(venv, wheels, done.output.strip(), remedy)


def _check_members(wheel: Path) -> None:
    """IntegrityError for members that lead out of the env, are links, or come twice: uv would leave some of
    them out without a word. Whether these are the wheel's right bytes, uv sees."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile):
        return  # uv refuses it
    names: set[str] = set()
    for member in members:
        path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        astray = path.is_absolute() or ".." in path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR)
        if astray or member.filename in names:
            raise IntegrityError(
                f"The wheel {wheel.name} is refused, and nothing of it was installed: its member "
                f"{member.filename!r} {'is no file in it' if astray else 'comes twice'}.",
                remedy=f"Report it to whoever publishes {wheel.name}, and lock another version.",
                context={"file": wheel},
            )
        names.add(member.filename)


def _failure(venv: Path, wheels: Sequence[WheelFile], output: str, remedy: str) -> EnvbuilderError:
    """Why uv failed, found out afterwards: which wheel is damaged, or whether the disk is full."""
    for wheel in wheels:
        got = hash_file(wheel.path) if wheel.path.is_file() else "no such file"
        if got != wheel.package.sha256:
            return IntegrityError(
                f"{wheel.path} is not what the lock names: its sha256 differs.",
                remedy=remedy,
                context={"file": wheel.path, "expected": wheel.package.sha256, "got": got},
            )
    if "No space left" in output or "quota" in output.lower():
        needed = 2 * sum(wheel.size for wheel in wheels)  # wheels hold their files compressed
        return no_room(venv, needed, f"{shutil.disk_usage(venv).free:,} bytes are free")
    return MismatchError(
        f"The wheels can't be installed into {venv}.",
        remedy=remedy,
        context={"output": output[-2000:], "folder": venv},
    )
