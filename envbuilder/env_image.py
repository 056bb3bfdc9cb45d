"""An env wherever it is kept: a folder of ROOT, or an image (one squashfs file) that is brought to this node.

An image is read and hashed before anything in it is used, and can't be changed while it is: its sha256 is the
env's digest. It is mounted by squashfuse in a mount namespace of the program that uses it (see
`env_image_enter`), at the same folder on every node, or else unpacked to the node's own disk and removed
afterwards. The env in an image names no path of its own, so it works at either place.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import envbuilder
from envbuilder.atomic import no_room, refuse_world_writable
from envbuilder.bundle import hash_file
from envbuilder.env_image_enter import COMMAND, COMPLAINT
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.kept_images import marked_as_used, published_version
from envbuilder.model import ENV_RECEIPT, EnvReceipt, ImageReceipt, read_record
from envbuilder.node_folder import node_folder, private_node_folder
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.report import Reporter

_TRIAL_TIMEOUT_S = 90.0
_UNPACKED = "envbuilder-env-"
"""How the names of folders begin that images are unpacked to."""


@dataclass(frozen=True)
class EnvImage:
    """An image and what it should be; nothing of it has been read yet."""

    name: str
    """The recipe's."""
    path: Path
    receipt: ImageReceipt

    @property
    def record(self) -> Path:
        """The file with the receipt, beside the image."""
        return self.path.with_name(f"{self.name}.json")

    @property
    def remedy(self) -> str:
        """The command that brings it back, where it is not what it should be."""
        if self.path.is_symlink():
            published = published_version(self.path).parent
            return f"envbuilder use {published.name} --from {published.parent}"
        return f"envbuilder install recipes/{self.name}.toml --image --reinstall"


@dataclass(frozen=True)
class UsableEnv:
    """An env that programs can run in on this node."""

    folder: Path
    """As programs see it that `launcher` starts; others perhaps don't see it at all."""
    launcher: tuple[str, ...] = ()
    """The words in front of a command."""

    @property
    def python(self) -> tuple[str, ...]:
        """The words that start the env's interpreter."""
        return (*self.launcher, str(self.folder / "bin" / "python"))


def has_env_folder(root: Root, name: str) -> bool:
    """Whether the env is there as a folder, wholly installed."""
    return (root.env(name) / ENV_RECEIPT).exists()


def find_image(root: Root, name: str) -> EnvImage | None:
    """The image of the recipe `name`, where `install --image` has made one.

    IntegrityError where its receipt is damaged, or it has another size than the receipt says; MismatchError
    where everybody may write there. Its bytes are not read.
    """
    file = root.image_receipt(name)
    if not file.exists():
        return None
    refuse_world_writable(root.images)
    receipt = read_record(file, ImageReceipt, remedy=f"envbuilder install recipes/{name}.toml --image")
    image = EnvImage(name, root.images / receipt.file, receipt)
    size = image.path.stat().st_size if image.path.is_file() else None
    if size != receipt.size:
        state = "is missing" if size is None else f"has {size:,} bytes and not {receipt.size:,}"
        raise IntegrityError(
            f"The image {image.path} {state}.", remedy=image.remedy, context={"file": image.path}
        )
    return image


def env_receipt(root: Root, name: str) -> tuple[EnvReceipt, EnvImage | None]:
    """What the env of the recipe `name` was made of, and the image that it is kept as; None for a folder.

    A folder goes before an image. Raises MismatchError where there is neither.
    """
    if has_env_folder(root, name):
        remedy = f"envbuilder install recipes/{name}.toml"
        return read_record(root.env(name) / ENV_RECEIPT, EnvReceipt, remedy=remedy), None
    if image := find_image(root, name):
        return image.receipt.env, image
    raise MismatchError(
        f"There is no env of the recipe {name}, or its installation was not finished.",
        remedy=f"envbuilder install recipes/{name}.toml",
        context={"missing": root.env(name) / ENV_RECEIPT},
    )


def check_image(image: EnvImage) -> None:
    """Reads all of `image`; IntegrityError where one byte is another."""
    found = hash_file(image.path)
    if found != image.receipt.sha256:
        raise IntegrityError(
            f"The image {image.path} is not the one that was installed: its sha256 differs.",
            remedy=image.remedy,
            context={"file": image.path, "expected": image.receipt.sha256, "got": found},
        )


@contextmanager
def usable_env(root: Root, name: str, image: EnvImage | None, reporter: Reporter) -> Iterator[UsableEnv]:
    """The env of the recipe `name`, ready for programs while the block runs; an image is hashed first.

    `image` is what `env_receipt` tells. Raises IntegrityError where its bytes are others, MismatchError
    where this node can neither mount nor unpack it.
    """
    if image is None:
        yield UsableEnv(root.env(name))
        return
    with marked_as_used(image.path):
        reporter.stage(f"reading {image.path.name}")
        check_image(image)
        mounted, refused = _mounted(image)
        if mounted is not None:
            reporter.note(f"{image.path.name} is mounted at {mounted.folder}, for this command alone")
            yield mounted
            return
        reporter.note(f"{image.path.name} can't be mounted here ({refused}): unpacking it")
        with _unpacked(image, refused) as folder:
            yield UsableEnv(folder)


def way_here(image: EnvImage) -> str:
    """How this node would use `image`, in words; nothing of it is hashed."""
    mounted, refused = _mounted(image)
    if mounted is not None:
        return f"mounted by {mounted.launcher[-3]} at {mounted.folder}"
    if shutil.which("unsquashfs"):
        return f"unpacked to {tempfile.gettempdir()} ({refused})"
    return f"not at all: {refused}, and there is no unsquashfs"


def _as_folder(name: str) -> str:
    return f"envbuilder install recipes/{name}.toml  # as a folder of many files"


def find_squashfuse() -> str | None:
    """The program that mounts images: on the PATH, else the one that Apptainer or Singularity brings along.

    squashfuse_ll serves several processes at once, squashfuse one after the other.
    """
    names = ("squashfuse_ll", "squashfuse")
    folders = [
        Path(program).resolve().parent.parent / "libexec" / command / "bin"
        for command in ("apptainer", "singularity")
        if (program := shutil.which(command))
    ]
    found = (shutil.which(name, path=path) for path in (None, *map(str, folders)) for name in names)
    return next(filter(None, found), None)


def _mounted(image: EnvImage) -> tuple[UsableEnv | None, str]:
    """The env of `image` mounted for each program that is run in it, found by trying; or None, and why."""
    squashfuse = find_squashfuse()
    if squashfuse is None:
        return None, "there is no squashfuse"
    private = private_node_folder()
    if private is None:
        return None, f"{node_folder()} is no private folder of yours"
    folder = private / "envs" / image.name
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(envbuilder.__file__).resolve().parent.parent
    launcher = (
        *(sys.executable, "-I", "-S", "-c", COMMAND, str(home)),
        *(squashfuse, str(image.path.resolve()), str(folder)),
    )
    done = run([*launcher, "test", "-f", folder / ENV_RECEIPT], timeout_s=_TRIAL_TIMEOUT_S)
    if done.returncode == 0:
        return UsableEnv(folder, launcher), ""
    # What squashfuse itself says comes before the last line, which tells how it ended.
    lines = [line.rpartition(COMPLAINT)[2] for line in reversed(done.output.strip().splitlines())]
    reason = ": ".join(lines[:2]) or ("it took too long" if done.timed_out else "it failed")
    return None, f"squashfuse: {reason}"


@contextmanager
def _unpacked(image: EnvImage, refused: str) -> Iterator[Path]:
    """The env of `image` in a new folder of the node's disk ($TMPDIR, else /tmp), removed afterwards."""
    unsquashfs = shutil.which("unsquashfs")
    if unsquashfs is None:
        raise MismatchError(
            f"The env {image.name} is an image, which this node can neither mount nor unpack.",
            remedy=f"Load the module that has squashfs-tools (unsquashfs), or: {_as_folder(image.name)}",
            context={"image": image.path, "mounting": refused, "unpacking": "there is no unsquashfs"},
        )
    place = Path(tempfile.gettempdir())
    _remove_leftovers(place)
    if shutil.disk_usage(place).free < image.receipt.plain_bytes:
        free = f"{shutil.disk_usage(place).free:,} bytes are free (TMPDIR names another disk)"
        raise no_room(place, image.receipt.plain_bytes, free)
    # Nobody knew its name before, and it is this user's alone.
    folder, lock = _new_folder(place, image.name)
    try:
        env = folder / image.name
        done = run([unsquashfs, "-n", "-no-xattrs", "-d", env, image.path])
        if done.returncode != 0:
            raise MismatchError(
                f"{unsquashfs} can't unpack {image.path}.",
                remedy="Load a newer squashfs-tools (4.4 knows zstd), set TMPDIR to a larger disk, or: "
                + _as_folder(image.name),
                context={"command": shlex.join(done.argv), "output": done.output.strip()[-500:]},
            )
        yield env
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_folder(place: Path, name: str) -> tuple[Path, int]:
    """A new private folder, and the lock on it: while its holder lives, nobody takes it for a leftover."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_UNPACKED}{name}-", dir=place))
        lock = _lock(folder)
        if lock is not None:
            if folder.exists():
                return folder, lock
            os.close(lock)  # somebody took it for one before it was locked


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the lock on `folder`, if nobody else does. It ends with this process, and
    the disk is the node's own, where such locks work."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
        else:
            return descriptor
    return None


def _remove_leftovers(place: Path) -> None:
    """Removes what killed jobs of this user have unpacked in `place`."""
    for folder in place.glob(f"{_UNPACKED}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
