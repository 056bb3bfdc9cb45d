"""The folder that a group shares: what lies where in it, and who may have put it there.

A publication is what its manifest says, byte for byte; but the manifest is as good as those who can write it.
Those are root, the shared folder's owner and the members of its group, so it is refused where anybody else
could have written: a file or folder that everybody, or another group, may write to; one whose owner is none
of these; a link, which leads to where nobody has looked.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from envbuilder.accounts import account_name, group_name
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, MismatchError, UsageError
from envbuilder.model import CurrentVersion, Publication, read_record

CURRENT = "current.json"
MANIFEST = "manifest.json"
VERSION = re.compile(r"[0-9a-f]{16}")
"""The name of a version's folder."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class SharedFolder:
    """Where a group keeps what its members publish."""

    path: Path
    """Absolute, without links."""
    gid: int
    """The group that reads it."""

    @property
    def group(self) -> str:
        """The group's name."""
        return group_name(self.gid)

    def place(self, name: str) -> Path:
        """The folder of all versions that are published as `name`; UsageError for what is no name."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} can't be the name of something published: it is made of a-z, 0-9, - and _.",
                remedy=f"To see what is published: envbuilder use --from {self.path}",
            )
        return self.path / name

    def current(self, name: str) -> PublishedVersion:
        """The version that counts of what is published as `name`; its files are not looked at.

        UsageError where nothing is published so, MismatchError where you may not read it, or people outside
        the group could have written it, IntegrityError where the manifest is not the one that counts.
        """
        place = self.place(name)
        with self._reading():
            try:
                (place / CURRENT).lstat()
            except FileNotFoundError as error:
                raise UsageError(
                    f"Nothing is published as {name} in {self.path}.",
                    remedy=f"To see what is: envbuilder use --from {self.path}",
                    context={"published": ", ".join(self.names()) or "nothing"},
                ) from error
            self.check(place)
            self.check(place / CURRENT)
            digest = read_record(
                place / CURRENT, CurrentVersion, remedy=self.publish_again(name, place)
            ).manifest_sha256
            folder = place / digest[:16]
            self.check(folder)
            self.check(folder / MANIFEST)
            content = (folder / MANIFEST).read_bytes()
        return PublishedVersion(folder, self._manifest(content, digest, name, folder))

    def names(self) -> list[str]:
        """What there are folders for."""
        with self._reading():
            return sorted(path.name for path in self.path.iterdir() if _NAME.fullmatch(path.name))

    def entries(self, version: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """All files and folders in the folder of a version; see `check` for what is refused."""
        with self._reading():
            for path in sorted(version.iterdir()):
                status = self.check(path)
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    yield from self.entries(path)

    def check(self, path: Path) -> os.stat_result:
        """What `path` is; an error where people outside the group could have put it there, or changed it."""
        try:
            status = path.lstat()
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{path} is missing: what was published is not whole.",
                remedy="Ask whoever published it to do so again: envbuilder publish NAME",
                context={"file": path},
            ) from error
        owner = account_name(status.st_uid)
        facts = {"path": path, "owner": owner, "mode": stat.filemode(status.st_mode)}
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise IntegrityError(
                f"{path} is neither a file nor a folder, and nothing else is ever published.",
                remedy=f"Ask {owner} to remove it: rm {path}",
                context=facts,
            )
        if status.st_mode & stat.S_IWOTH:
            raise MismatchError(
                f"Everybody may write to {path}.", remedy=f"Ask {owner} for: chmod o-w {path}", context=facts
            )
        if status.st_mode & stat.S_IWGRP and status.st_gid != self.gid:
            raise MismatchError(
                f"The group {group_name(status.st_gid)} may write to {path}, and it is for {self.group}.",
                remedy=f"Ask {owner} for: chgrp {self.group} {path}",
                context=facts,
            )
        if not self._trusts(status.st_uid):
            raise MismatchError(
                f"{path} is {owner}'s, who is not in the group {self.group}.",
                remedy=f"Ask a member of {self.group} to publish it again: envbuilder publish NAME",
                context=facts,
            )
        return status

    def publish_again(self, name: str, path: Path, recipe: str | None = None) -> str:
        """The remedy for the damaged `path` of what is published as `name`: its owner's to type.

        `recipe` is the recipe's name, where it is known.
        """
        other_name = "" if recipe == name else f" --as {name}"
        owner = account_name(path.lstat().st_uid)
        return f"Ask {owner} for: envbuilder publish {recipe or 'RECIPE'} --to {self.path}{other_name}"

    def _manifest(self, content: bytes, digest: str, name: str, folder: Path) -> Publication:
        got = hashlib.sha256(content).hexdigest()
        if got != digest:
            raise IntegrityError(
                f"{folder / MANIFEST} is not the one that was published: its sha256 differs.",
                remedy=self.publish_again(name, folder),
                context={"file": folder / MANIFEST, "expected": digest, "got": got},
            )
        try:
            return Publication.model_validate_json(content)
        except ValidationError as error:
            raise MismatchError(
                f"{folder / MANIFEST} was written by another version of envbuilder: {error}.",
                remedy="Use the envbuilder that the publisher uses, or " + self.publish_again(name, folder),
                context={"file": folder / MANIFEST},
            ) from error

    def _trusts(self, uid: int) -> bool:
        return uid in (0, os.getuid(), self.path.stat().st_uid) or is_member(uid, self.gid)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with readable_for(self.gid):
            yield


@dataclass(frozen=True)
class PublishedVersion:
    """One version of what is published under a name."""

    folder: Path
    publication: Publication


@dataclass(frozen=True)
class Listed:
    """One name in a shared folder."""

    name: str
    publication: Publication | None
    problem: str
    """Why it can't be used; empty where nothing is known against it. Its files were not read."""


def open_shared_folder(path: Path, group: str | None = None) -> SharedFolder:
    """The shared folder at `path`, read by the Unix group `group`, else by the folder's own.

    MismatchError where it is not there, everybody may write into it, or you may not read it; InputError
    where there is no such group.
    """
    gid = None if group is None else _gid_of(group)
    with readable_for(gid):
        folder = path.resolve()
        try:
            status = folder.stat()
        except FileNotFoundError as error:
            raise MismatchError(
                f"There is no shared folder {folder}.",
                remedy=f"To make it: mkdir -m 2770 {folder} && chgrp GROUP {folder}",
                context={"folder": folder},
            ) from error
    shared = SharedFolder(folder, status.st_gid if gid is None else gid)
    if not stat.S_ISDIR(status.st_mode):
        raise MismatchError(f"{folder} is not a folder.", remedy="Give the path of a folder.")
    if status.st_mode & stat.S_IWOTH:
        raise MismatchError(
            f"Everybody may write into {folder}.",
            remedy=f"chmod o-w {folder}",
            context={"folder": folder, "mode": stat.filemode(status.st_mode)},
        )
    return shared


def list_published(shared: SharedFolder) -> tuple[Listed, ...]:
    """What is published in the folder, by name. Only manifests are read."""
    listed = []
    for name in shared.names():
        try:
            listed.append(Listed(name, shared.current(name).publication, ""))
        except EnvbuilderError as error:
            listed.append(Listed(name, None, error.message))
    return tuple(listed)


def is_member(uid: int, gid: int) -> bool:
    """Whether the account of `uid` is in the group, by the accounts that this machine knows."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return False
    return gid in os.getgrouplist(account.pw_name, account.pw_gid)


@contextmanager
def readable_for(gid: int | None) -> Iterator[None]:
    """Turns a refusal to read into MismatchError: which group it takes, and how to come to be in it.

    `gid` is that group, where it is known.
    """
    try:
        yield
    except PermissionError as error:
        path = Path(error.filename)
        raise not_in_the_group(gid, path) from error


def not_in_the_group(gid: int | None, path: Path) -> MismatchError:
    """The error for `path`, which only the group may use."""
    group = None if gid is None else group_name(gid)
    context: dict[str, object] = {"path": path, "your groups": ", ".join(map(group_name, os.getgroups()))}
    if gid is not None and gid not in (os.getegid(), *os.getgroups()) and is_member(os.getuid(), gid):
        return MismatchError(
            f"{path} is for the group {group}, which you have joined since you logged in.",
            remedy=f"Log in again, or: newgrp {group}",
            context=context,
        )
    return MismatchError(
        f"{path} is for the group {group}, and you are not in it." if group else f"You may not use {path}.",
        remedy=f"Ask whoever leads the project to put you into {group or 'its group'}; "
        "your groups are listed by: id -Gn",
        context=context,
    )


def _gid_of(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InputError(
            f"There is no group {group} on this machine.",
            remedy="Mend shared-group in the site file; your groups are listed by: id -Gn",
            context={"group": group},
        ) from error
