"""Small real wheels and sdists, made as a test needs them. The same arguments give the same bytes."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    files: Mapping[str, str | bytes] | None = None,
    tag: str = "py3-none-any",
    stated: Sequence[str] = (),
) -> Path:
    """A wheel in `folder`; `files` are its members by path, by default one module that holds the version.

    stated: further lines of METADATA, such as "License-Expression: MIT".
    """
    module = name.replace("-", "_").replace(".", "_")
    info = f"{module}-{version}.dist-info"
    members = {path: _bytes(content) for path, content in (files or {}).items()} or {
        f"{module}.py": f"__version__ = {version!r}\n".encode()
    }
    members[f"{info}/METADATA"] = _metadata("2.1", name, version, requires, stated=stated)
    purelib = "true" if tag.endswith("-any") else "false"
    members[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: {purelib}\nTag: {tag}\n".encode()
    )
    record = "".join(
        f"{path},sha256={_record_hash(data)},{len(data)}\n" for path, data in sorted(members.items())
    )
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            entry = zipfile.ZipInfo(member)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return path


def make_sdist(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    files: Mapping[str, str | bytes] | None = None,
    pkg_info: bool = True,
    egg_info: bool = False,
    dynamic: bool = False,
    setup_py: str | None = None,
) -> Path:
    """A .tar.gz sdist in `folder`.

    pkg_info: PKG-INFO names `requires` (metadata 2.4); else it is of metadata 2.1 and names none, as old
        setuptools wrote it.
    egg_info: an `*.egg-info/requires.txt` names `requires`.
    dynamic: PKG-INFO says `Dynamic: Requires-Dist`.
    setup_py: the text of a setup.py; without it, and without `pyproject.toml` in `files`, there is a
        pyproject.toml for setuptools.
    """
    module = name.replace("-", "_").replace(".", "_")
    members = {path: _bytes(content) for path, content in (files or {}).items()}
    if pkg_info:
        members["PKG-INFO"] = _metadata("2.4", name, version, requires, dynamic=dynamic)
    else:
        members["PKG-INFO"] = _metadata("2.1", name, version, ())
    if egg_info:
        members[f"{module}.egg-info/PKG-INFO"] = members["PKG-INFO"]
        members[f"{module}.egg-info/requires.txt"] = "".join(f"{text}\n" for text in requires).encode()
    if setup_py is not None:
        members["setup.py"] = setup_py.encode()
    elif "pyproject.toml" not in members:
        quoted = ", ".join(f"'{text}'" for text in requires)
        members["pyproject.toml"] = (
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "{name}"\nversion = "{version}"\ndependencies = [{quoted}]\n'
        ).encode()
        members.setdefault(f"{module}.py", f"__version__ = {version!r}\n".encode())
    top = f"{module}-{version}"
    path = folder / f"{top}.tar.gz"
    # mtime=0: the gzip header would otherwise hold the time.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member, data in sorted(members.items()):
            entry = tarfile.TarInfo(f"{top}/{member}")
            entry.size = len(data)
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(data))
    return path


def _metadata(
    metadata_version: str,
    name: str,
    version: str,
    requires: Sequence[str],
    *,
    dynamic: bool = False,
    stated: Sequence[str] = (),
) -> bytes:
    lines = [f"Metadata-Version: {metadata_version}", f"Name: {name}", f"Version: {version}"]
    lines += ["Dynamic: Requires-Dist"] if dynamic else []
    extras = sorted({extra for text in requires for extra in re.findall(r"extra == '([^']+)'", text)})
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {text}" for text in requires]
    lines += stated
    return ("\n".join(lines) + "\n").encode()


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
