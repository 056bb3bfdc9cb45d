"""Unpacks a bundle that `envbuilder bundle pack` made, on a machine that has nothing but Python 3.9.

    tar -xOf NAME.tar unpack.py | python3 - NAME.tar ROOT [SHA256]

The bundle goes to ROOT/bundles/NAME. SHA256 is the manifest's, as `pack` reported it: give it where the
archive may have been tampered with on its way. `envbuilder bundle unpack` runs this same code.

An archive is this script, `manifest.json`, and the bundle's files in the manifest's order. All else in it
follows from the manifest, headers and padding included, so they are not interpreted but compared: what is
not byte for byte what `pack` writes is refused, links, devices and unlisted members among it. The files are
written into a hidden folder beside the bundle's place, hashed on the way, and get their name as the last
step. A bundle that is there already is then replaced: it is moved aside first, so for a moment there is none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

SCRIPT = "unpack.py"
MANIFEST = "manifest.json"
FORMAT = "envbuilder-bundle-1"
NEW_SUFFIX = ".new"
OLD_SUFFIX = ".old"
BLOCK = 512
END = bytes(2 * BLOCK)
"""Two empty blocks end an archive (POSIX.1-2017, ustar interchange format)."""
_CHUNK = 1 << 20
_LARGEST_SMALL = 64 << 20
"""Bytes that the script or the manifest may have: they are read into memory."""
_LARGEST_USTAR = 8 << 30
"""Bytes from which on a size has no room in a ustar header."""
_FILE_MODE = 0o640
_FOLDER_MODE = 0o2750
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Refusal(Exception):
    """Why nothing was unpacked: one sentence, the remedy, and the exit code (3 input, 5 bytes, 7 machine)."""

    def __init__(self, exit_code: int, message: str, remedy: str) -> None:
        super().__init__(message)
        self.exit_code, self.message, self.remedy = exit_code, message, remedy


class Entry(NamedTuple):
    """One file of the bundle."""

    path: str
    """Relative to the bundle."""
    size: int
    """Bytes."""
    sha256: str


class Manifest(NamedTuple):
    """What an archive holds."""

    name: str
    """The recipe's name, which is the bundle's folder."""
    script_sha256: str
    """Of the archive's own copy of this script."""
    files: tuple[Entry, ...]
    """In the archive's order."""

    def to_json(self) -> bytes:
        """The member `manifest.json`; `read_manifest` is the way back."""
        files = [entry._asdict() for entry in self.files]
        table = {"format": FORMAT, "name": self.name, "script_sha256": self.script_sha256, "files": files}
        return (json.dumps(table, indent=1) + "\n").encode()


class Unpacked(NamedTuple):
    bundle: Path
    files: int
    bytes: int
    manifest_sha256: str


def header(name: str, size: int) -> bytes:
    """The blocks before the content of a regular file of `size` bytes: a ustar header.

    In front of it is a PAX one where the name or size has no room. Python's own tarfile writes other bytes
    from version to version.
    """
    wide = {}
    if not name.isascii() or len(name) > 100:
        wide["path"] = name
    if size >= _LARGEST_USTAR:
        wide["size"] = str(size)
    ascii_name = name.encode("ascii", "replace")[:100]
    ustar = _ustar(ascii_name, 0 if "size" in wide else size, b"0")
    if not wide:
        return ustar
    records = b"".join(_pax_record(key, value) for key, value in wide.items())
    return _ustar(b"././@PaxHeader", len(records), b"x") + records + padding(len(records)) + ustar


def padding(size: int) -> bytes:
    """What fills the last block after `size` bytes."""
    return bytes(-size % BLOCK)


def archive_size(manifest: Manifest, script: int, content: int) -> int:
    """Bytes of the whole archive; `script` and `content` are the sizes of its first two members."""
    members = [(SCRIPT, script), (MANIFEST, content)]
    members += [(f"{manifest.name}/{entry.path}", entry.size) for entry in manifest.files]
    return sum(len(header(name, size)) + size + len(padding(size)) for name, size in members) + len(END)


def read_manifest(content: bytes) -> Manifest:
    """The manifest in `content`; ValueError where it leads out of the bundle, or is not one."""
    table = json.loads(content)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"it is not of the format {FORMAT}")
    name, script, files = (table.get(key) for key in ("name", "script_sha256", "files"))
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"{name!r} is no bundle's name")
    if not _is_sha256(script) or not isinstance(files, list):
        raise ValueError("it lists no files")
    seen: set[str] = set()
    folders: set[str] = set()
    for file in files:
        if not isinstance(file, dict) or set(file) != set(Entry._fields):
            raise ValueError("a file has not exactly path, size and sha256")
        path, size = file["path"], file["size"]
        _check_path(path)
        if type(size) is not int or size < 0 or not _is_sha256(file["sha256"]):
            raise ValueError(f"{path} has no size or no sha256")
        if path in seen:
            raise ValueError(f"{path} comes twice")
        seen.add(path)
        folders.update(str(parent) for parent in Path(path).parents)
    if seen & folders:
        raise ValueError(f"{min(seen & folders)} is both a file and a folder")
    if "bundle.json" not in seen:
        raise ValueError("it names no bundle.json")
    return Manifest(name, str(script), tuple(Entry(**file) for file in files))


def unpack(
    archive: Path,
    root: Path,
    manifest_sha256: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Unpacked:
    """Unpacks `archive` to ROOT/bundles/NAME; Refusal, and nothing there has changed, where it can't.

    `on_bytes` is called with the bytes done, and those of all files.
    """
    try:
        file = archive.open("rb", buffering=0)
    except OSError as error:
        raise Refusal(3, f"{archive} can't be read: {error.strerror}.", "Give an archive's path.") from error
    with file:
        try:
            return _Unpacking(archive, file, root, on_bytes).run(manifest_sha256)
        except OSError as error:
            why = f"no room: {error.strerror}" if error.errno in _FULL else str(error)
            remedy = "Free space or quota there, make it writable for you, or choose another ROOT."
            raise Refusal(7, f"{archive} can't be unpacked to {root}: {why}.", remedy) from error


class _Unpacking:
    """One pass over an archive."""

    def __init__(
        self, archive: Path, file: BinaryIO, root: Path, on_bytes: Callable[[int, int], None]
    ) -> None:
        self.archive, self.file, self.bundles, self.on_bytes = archive, file, root / "bundles", on_bytes
        self.done, self.total, self.buffer = 0, 0, memoryview(bytearray(_CHUNK))

    def run(self, manifest_sha256: str | None) -> Unpacked:
        script = self._small_member(SCRIPT)
        content = self._small_member(MANIFEST)
        digest = hashlib.sha256(content).hexdigest()
        if manifest_sha256 is not None and digest != manifest_sha256.lower():
            raise self._refusal(f"its manifest has the sha256 {digest}, not {manifest_sha256}")
        try:
            manifest = read_manifest(content)
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"its manifest is wrong: {error}") from error
        if hashlib.sha256(script).hexdigest() != manifest.script_sha256:
            raise self._refusal(f"its {SCRIPT} is not the one that its manifest names")
        self._check_size(archive_size(manifest, len(script), len(content)))
        self.total = sum(entry.size for entry in manifest.files)

        destination = self.bundles / manifest.name
        self._check_place(destination)
        _make_folder(self.bundles)
        staging = Path(tempfile.mkdtemp(NEW_SUFFIX, f".{manifest.name}.", self.bundles))
        try:
            for entry in manifest.files:
                self._expect(header(f"{manifest.name}/{entry.path}", entry.size), entry.path)
                self._write(entry, staging / entry.path)
                self._expect(padding(entry.size), f"the padding of {entry.path}")
            self._expect(END, "the end of the archive")
            if self.file.read(1):
                raise self._refusal("something follows its end")
            staging.chmod(_folder_mode(self.bundles))
            for folder, _, _ in os.walk(staging):
                _fsync_folder(Path(folder))
            _take_place(staging, destination)
            _fsync_folder(self.bundles)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return Unpacked(destination, len(manifest.files), self.total, digest)

    def _small_member(self, name: str) -> bytes:
        """The content of the member that must be next; only its size is read from its header."""
        block = self._take(BLOCK)
        field = block[124:135]
        size = int(field, 8) if re.fullmatch(rb"[0-7]{11}", field) else -1
        if not 0 <= size <= _LARGEST_SMALL or block != header(name, size):
            raise self._refusal(f"where {name} should be, there is {_described(block)}")
        content = self._take(size)
        self._expect(padding(size), f"the padding of {name}")
        return content

    def _write(self, entry: Entry, path: Path) -> None:
        _make_folder(path.parent, _folder_mode(self.bundles))
        digest = hashlib.sha256()
        left = entry.size
        # The folder is new and nobody else's, so there is no link in it that this could follow.
        with path.open("xb") as copy:
            while left:
                count = self.file.readinto(self.buffer[: min(left, _CHUNK)])  # type: ignore[attr-defined]
                if not count:
                    raise self._refusal(f"it ends in the middle of {entry.path}")
                digest.update(self.buffer[:count])
                copy.write(self.buffer[:count])
                left -= count
                self.done += count
                self.on_bytes(self.done, self.total)
            copy.flush()
            os.fchmod(copy.fileno(), _FILE_MODE)
            os.fsync(copy.fileno())
        if digest.hexdigest() != entry.sha256:
            raise self._refusal(
                f"{entry.path} has other bytes than its manifest names: "
                f"expected sha256 {entry.sha256}, got {digest.hexdigest()}"
            )

    def _expect(self, wanted: bytes, what: str) -> None:
        got = self._take(len(wanted))
        if got != wanted:
            raise self._refusal(f"where {what} should be, there is {_described(got)}")

    def _take(self, size: int) -> bytes:
        parts = []
        while size and (part := self.file.read(size)):
            parts.append(part)
            size -= len(part)
        if size:
            raise self._refusal("it ends too early")
        return b"".join(parts)

    def _check_size(self, expected: int) -> None:
        """Before anything is written; what comes through a pipe shows its size only at the end."""
        found = os.fstat(self.file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_size != expected:
            raise self._refusal(f"it has {found.st_size:,} bytes, and its manifest needs {expected:,}")

    def _check_place(self, destination: Path) -> None:
        if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
            raise Refusal(
                7, f"{destination} is not a folder, so it is not replaced.", "Remove it, or move it."
            )
        if self.bundles.is_dir() and self.bundles.stat().st_mode & stat.S_IWOTH:
            raise Refusal(7, f"Everybody may write into {self.bundles}.", f"chmod o-w {self.bundles}")
        there = next(parent for parent in self.bundles.parents if parent.is_dir())
        free = shutil.disk_usage(there).free
        if free < self.total:
            raise Refusal(
                7,
                f"There is no room for {self.total:,} bytes at {there}: it has {free:,} left.",
                "Free space or quota there, or unpack into another ROOT.",
            )

    def _refusal(self, why: str) -> Refusal:
        return Refusal(
            5,
            f"{self.archive} is refused, and nothing of it was unpacked: {why}.",
            "Copy it again from where it was packed, or pack it again there: envbuilder bundle pack NAME",
        )


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    mode_user_group, mtime = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
    before = name.ljust(100, b"\0") + mode_user_group + b"%011o\0" % size + mtime
    after = kind + bytes(100) + b"ustar\x0000" + bytes(BLOCK - 265)
    return before + b"%06o\0 " % sum(before + b" " * 8 + after) + after


def _pax_record(key: str, value: str) -> bytes:
    """ "LENGTH KEY=VALUE" and a line feed, where LENGTH counts itself."""
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _check_path(path: object) -> None:
    if not isinstance(path, str):
        raise ValueError("a file has no path")
    parts = path.split("/")
    long = len(path) > 1000 or any(len(part.encode("utf-8", "replace")) > 255 for part in parts)
    if long or {"", ".", ".."} & set(parts) or re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", path):
        raise ValueError(f"{path[:200]!r} is no path inside a bundle")


def _described(block: bytes) -> str:
    with suppress(tarfile.HeaderError, ValueError):
        member = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "surrogateescape")
        return f"the {'file' if member.isfile() else 'link, folder or device'} {member.name!r}"
    return "something else"


def _folder_mode(parent: Path) -> int:
    """setgid, and writable for the group in a folder that passes on a group, and that it alone shares."""
    shared = parent.stat().st_mode & (stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH)
    return _FOLDER_MODE | (stat.S_IWGRP if shared == stat.S_ISGID | stat.S_IWGRP else 0)


def _make_folder(path: Path, mode: int | None = None) -> None:
    if path.is_dir():
        return
    _make_folder(path.parent, mode)
    with suppress(FileExistsError):
        path.mkdir()
        path.chmod(mode or _folder_mode(path.parent))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # some network file systems have no fsync for folders
        os.fsync(descriptor)
    os.close(descriptor)


def _take_place(staging: Path, destination: Path) -> None:
    """Renames `staging` to `destination`; what is there is moved aside, and back if that fails."""
    for _ in range(5):
        aside = destination.with_name(f".{destination.name}.{secrets.token_hex(8)}{OLD_SUFFIX}")
        with suppress(FileNotFoundError):
            destination.rename(aside)
        try:
            staging.rename(destination)
        except OSError as error:
            with suppress(OSError):
                aside.rename(destination)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process was faster
                raise
        else:
            shutil.rmtree(aside, ignore_errors=True)
            return
    raise Refusal(7, f"Other processes write to {destination}.", "Run the same command again.")


def main(arguments: list[str]) -> None:
    if len(arguments) not in (2, 3) or any(argument.startswith("-") for argument in arguments):
        _fail(Refusal(2, "It takes an archive and a folder.", f"python3 {SCRIPT} NAME.tar ROOT [SHA256]"))
    # A job that is ended tidies up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        done = unpack(Path(arguments[0]), Path(arguments[1]).absolute(), next(iter(arguments[2:]), None))
    except Refusal as refusal:
        _fail(refusal)
    print(f"{done.files} files, {done.bytes:,} bytes, each checked, are in {done.bundle}. Next:")
    print(f"  python3 {shlex.quote(str(done.bundle / 'start.py'))}")


def _fail(refusal: Refusal) -> NoReturn:
    print(f"{refusal.message}\n  {refusal.remedy}", file=sys.stderr)
    raise SystemExit(refusal.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
