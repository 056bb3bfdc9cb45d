"""The store: files by what is in them. A file is under its sha256 only after its bytes had that hash.

Files on the way lie in `partial/` under names of their own, so two fetches never write the same one, and
none needs a lock (file locks silently do nothing on Lustre, GPFS and some NFS). A fetch that finds what
another left behind copies it and goes on from there.

A group may share the store: another user's partial files can't be read, perhaps not removed either; then they
stay, and are no obstacle.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from envbuilder.atomic import fsync_folder, make_folder, refuse_world_writable, writing
from envbuilder.errors import IntegrityError, MismatchError, NetworkError

STORED_MODE = 0o440
_COPIED = 1 << 20
"""Bytes of a partial file that are copied at once."""
_ABANDONED = 900.0
"""Seconds without a write after which a partial file's fetch has surely ended: its pauses and timeouts are
shorter. Were it wrong, a fetch would lose its partial file and say so; never would a wrong file be stored."""


class Store:
    """The files in `folder`, each named by its sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where the file with `sha256` lies, or would."""
        return self.folder / sha256

    def has(self, sha256: str, size: int) -> bool:
        """Whether the file is there, of the right size; its bytes are not read."""
        try:
            found = self.path(sha256).lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == size

    def add(self, sha256: str, size: int, fill: Callable[[Path], None]) -> Path:
        """Stores the file that `fill` makes: it is given a path of its own, where it may find a beginning.

        `fill` answers for size and hash. What it raises is raised; its partial file is then kept to go on
        from, unless it was wrong (IntegrityError) or the disk was full (MismatchError).
        """
        self.check_folder()
        part = self._new_partial(sha256, size)
        try:
            self._take_over(part, sha256, size)
            fill(part)
            self._publish(part, sha256, size)
        except FileNotFoundError as error:
            # Another fetch of the same file was done first, and tidied ours away; at any point of the three.
            if part.exists():
                raise
            if not self.has(sha256, size):
                raise NetworkError(
                    f"Another process has removed {part} during the download.",
                    remedy="Run the same command again.",
                    context={"file": part},
                ) from error
        except (IntegrityError, MismatchError):
            self._remove_partials(sha256)
            raise
        self._remove_partials(sha256)
        return self.path(sha256)

    def tidy(self) -> None:
        """Removes partial files of what is stored: a fetch that was killed may not have come to that."""
        for path in self._partials.glob("*.part"):
            if self.path(path.name.partition(".")[0]).exists():
                _discard(path)

    def check_folder(self) -> None:
        """Makes the folders; MismatchError if anybody on the machine may write there."""
        with writing(self.folder, 0):
            make_folder(self._partials)
        for folder in (self.folder, self._partials):
            refuse_world_writable(folder)

    @property
    def _partials(self) -> Path:
        return self.folder / "partial"

    def _publish(self, part: Path, sha256: str, size: int) -> None:
        with writing(part, size), part.open("rb") as file:
            os.fchmod(file.fileno(), STORED_MODE)
            os.fsync(file.fileno())
            part.replace(self.path(sha256))
        fsync_folder(self.folder)

    def _new_partial(self, sha256: str, size: int) -> Path:
        with writing(self._partials, size):
            descriptor, name = tempfile.mkstemp(prefix=f"{sha256}.", suffix=".part", dir=self._partials)
            os.close(descriptor)
        return Path(name)

    def _take_over(self, part: Path, sha256: str, size: int) -> None:
        """Copies into `part` the most that other fetches have of the file, and removes what is abandoned.

        A copy, because the other fetch may live on; and no harm if it writes meanwhile: `fill` hashes.
        """
        now = part.stat().st_mtime  # by the file server's clock, as are the others' times
        others = sorted(self._others(sha256, part), key=lambda other: -other[1].st_size)
        with writing(part, size):
            for path, _ in others:
                # Done or abandoned meanwhile, or another user's: then the next best will do.
                with suppress(FileNotFoundError, PermissionError), path.open("rb") as source:
                    with part.open("wb") as copy:
                        shutil.copyfileobj(source, copy, _COPIED)
                    break
        for path, found in others:
            if now - found.st_mtime > _ABANDONED:
                _discard(path)

    def _others(self, sha256: str, own: Path) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._partials.glob(f"{sha256}.*.part"):
            with suppress(FileNotFoundError):
                found = path.lstat()
                if path != own and stat.S_ISREG(found.st_mode):
                    yield path, found

    def _remove_partials(self, sha256: str) -> None:
        for path in self._partials.glob(f"{sha256}.*"):
            _discard(path)


def _discard(path: Path) -> None:
    """Removes what nobody needs, if it is there and this user may."""
    with suppress(OSError):
        path.unlink()
