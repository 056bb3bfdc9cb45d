"""Makes of a build backend's wheel one whose bytes depend on its content alone, with a build tag in it.

Two builds of the same content differ in their archives: in the order of members, in times, in modes that
follow the umask. Here all of that is fixed, so the wheel's sha256 says whether two builds made the same. (The
same zlib is taken for granted: another one may compress the same bytes in another way.)
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from envbuilder.atomic import new_file
from envbuilder.errors import BuildError

SBOMS = "sboms"
"""The folder of a `.dist-info` folder for bills of materials (PEP 770)."""
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip archive can hold."""
_LEVEL = 1
"""Of deflate: GPU code, most of such a wheel, is compressed already."""
_UNIX = 3
"""The system of an archive whose members have Unix modes."""
_SIGNATURES = ("RECORD.jws", "RECORD.p7s")
"""They sign the RECORD that is replaced here."""


@dataclass(frozen=True)
class _Member:
    path: str
    executable: bool
    given: zipfile.ZipInfo | None
    """Where the content is in the old wheel; else it is `content`."""
    content: bytes = b""


def rewrite_wheel(
    wheel: Path, folder: Path, *, build_tag: str | None = None, sboms: Mapping[str, bytes] | None = None
) -> Path:
    """Writes the wheel anew into `folder` and returns its path; `wheel` stays as it is.

    Members are sorted, `.dist-info` last and RECORD at the very end; all are of 1 January 1980, with mode
    0644, or 0755 where somebody may execute them; RECORD is made from the bytes. `build_tag` (PEP 427) takes
    the place of the wheel's own, in the name and in WHEEL; None keeps that one. `sboms` (file name → content)
    go into `.dist-info/sboms`, in place of files of those names. Signatures of the old RECORD are left out.

    BuildError where `wheel` is not a wheel: a damaged archive, a name that its content contradicts, members
    twice, outside of it, or links.
    """
    target = folder / _tagged_name(wheel, build_tag)
    try:
        with zipfile.ZipFile(wheel) as old:
            members, info = _members(wheel, old)
            text = old.read(f"{info}/WHEEL").decode()
            added = {f"{info}/WHEEL": _wheel_text(text, build_tag).encode()}
            added |= {f"{info}/{SBOMS}/{_file_name(name)}": data for name, data in (sboms or {}).items()}
            kept = [member for member in members if member.path not in added]
            kept += [_Member(path, False, None, data) for path, data in added.items()]
            kept.sort(key=lambda member: (member.path.startswith(f"{info}/"), member.path))
            with new_file(target, size=wheel.stat().st_size) as file:
                _write(old, kept, f"{info}/RECORD", file)
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, RuntimeError) as error:
        raise _refusal(wheel, f"it is damaged ({error})") from error
    return target


def _tagged_name(wheel: Path, build_tag: str | None) -> str:
    try:
        parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise _refusal(wheel, f"it has a wrong name ({error})") from error
    parts = wheel.name.split("-")
    if build_tag is not None:
        parts = [*parts[:2], build_tag, *parts[-3:]]
    name = "-".join(parts)
    try:
        parse_wheel_filename(name)
    except InvalidWheelFilename as error:
        raise ValueError(f"{build_tag!r} is not a build tag") from error
    return name


def _members(wheel: Path, old: zipfile.ZipFile) -> tuple[list[_Member], str]:
    """What the new wheel keeps of the old one, and the name of the `.dist-info` folder."""
    files = [entry for entry in old.infolist() if not entry.is_dir()]
    paths = [entry.filename for entry in files]
    if doubled := sorted({path for path in paths if paths.count(path) > 1}):
        raise _refusal(wheel, f"it holds {doubled[0]} twice")
    folders = [path.removesuffix("/WHEEL") for path in paths if path.count("/") == 1]
    infos = [path for path in folders if path.endswith(".dist-info")]
    if len(infos) != 1:
        raise _refusal(wheel, "it has no WHEEL file, or more than one")
    info = infos[0]
    name, version, *_ = parse_wheel_filename(wheel.name)
    own_name, _, own_version = info.removesuffix(".dist-info").rpartition("-")
    try:
        same = canonicalize_name(own_name) == name and Version(own_version) == version
    except InvalidVersion:
        same = False
    if not same:
        raise _refusal(wheel, f"its metadata is that of {info}")
    left_out = {f"{info}/{name}" for name in ("RECORD", *_SIGNATURES)}
    members = []
    for entry in files:
        mode = entry.external_attr >> 16 if entry.create_system == _UNIX else 0
        if stat.S_ISLNK(mode):
            raise _refusal(wheel, f"{entry.filename} is a link")
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename:
            raise _refusal(wheel, f"{entry.filename} leads out of it")
        if entry.filename not in left_out:
            members.append(_Member(entry.filename, bool(mode & 0o111), entry))
    return members, info


def _wheel_text(text: str, build_tag: str | None) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if build_tag is not None:
        lines = [line for line in lines if not line.lower().startswith("build:")] + [f"Build: {build_tag}"]
    return "\n".join(lines) + "\n"


def _write(old: zipfile.ZipFile, members: list[_Member], record: str, file: BinaryIO) -> None:
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    with zipfile.ZipFile(file, "w") as new:
        for member in members:
            content = member.content if member.given is None else old.read(member.given)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            writer.writerow((member.path, f"sha256={digest}", len(content)))
            _add(new, member.path, content, executable=member.executable)
        writer.writerow((record, "", ""))
        _add(new, record, rows.getvalue().encode(), executable=False)


def _add(archive: zipfile.ZipFile, path: str, content: bytes, *, executable: bool) -> None:
    entry = zipfile.ZipInfo(path, _EARLIEST)
    entry.create_system = _UNIX
    entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED, _LEVEL)


def _file_name(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is not a file name")
    return name


def _refusal(wheel: Path, why: str) -> BuildError:
    return BuildError(
        f"The build made {wheel.name}, which is not a wheel: {why}.",
        remedy="Report it to whoever publishes the package.",
        context={"wheel": wheel},
    )
