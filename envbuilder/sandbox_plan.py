"""What a sealed sandbox hides and shows of this machine, decided before it is entered.

Hidden are homes, folders for temporary files and of sockets (/run), files with secrets, and every Unix socket
that has a name: the new network of a sandbox doesn't cut those off.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from envbuilder.errors import MismatchError

Step = tuple[str, str, str]
"""See `sandbox_root.Plan.steps`."""

_HIDDEN = ("/home", "/root", "/run", "/var/run")
_SCRATCH = ("/tmp", "/var/tmp")
_NEVER_HIDDEN = (
    *("/usr/bin", "/usr/lib", "/usr/sbin", "/usr/local/bin", "/bin", "/sbin", "/lib", "/lib64"),
    *("/etc", "/opt", "/var", "/proc", "/sys", "/dev"),
)
"""The homes of system accounts can be such folders, or above one."""
_SECRETS = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/ssl/private", "/etc/munge"),
    *("/etc/krb5.keytab", "/etc/pip.conf", "/etc/xdg/pip", "/etc/uv", "/etc/netrc", "/etc/sudoers"),
)
_NAME_SECRETS = (
    *("NETRC", "HF_TOKEN_PATH", "PIP_CONFIG_FILE", "UV_CONFIG_FILE", "AWS_CONFIG_FILE"),
    *("AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "KUBECONFIG", "DOCKER_CONFIG"),
    *("SSH_AUTH_SOCK", "KRB5CCNAME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"),
)
"""Variables whose value is the path of secrets."""


def hidden_folders(host: Mapping[str, str]) -> list[str]:
    """The folders, without links in their paths, of which a build sees nothing: homes, and /run."""
    homes = [host.get("HOME", "")]
    with suppress(KeyError):  # an id without an account, as containers have
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    return _folders([*_HIDDEN, *homes])


def scratch_folders() -> list[str]:
    """The folders, without links in their paths, of which a build has empty ones of its own."""
    return _folders(_SCRATCH)


def _folders(paths: Sequence[str]) -> list[str]:
    real = {os.path.realpath(path) for path in paths if path.startswith("/")}
    return sorted(path for path in real if _may_be_hidden(path) and _kind(path, stat.S_ISDIR))


def _may_be_hidden(path: str) -> bool:
    return not any(
        is_below(system, path) for system in (*_NEVER_HIDDEN, *map(os.path.realpath, _NEVER_HIDDEN))
    )


def _kind(path: str, check: Callable[[int], bool]) -> bool:
    """Whether `check` holds for the mode of what is at `path`; not where this user can't look."""
    try:
        return check(Path(path).stat().st_mode)
    except OSError:
        return False


def secrets(host: Mapping[str, str], sockets: str) -> list[str]:
    """The files, folders and sockets here that are masked; `sockets` is the text of /proc/net/unix."""
    named = [host.get(name, "").removeprefix("FILE:").removeprefix("DIR:") for name in _NAME_SECRETS]
    if hub := host.get("HF_HOME"):
        named += [f"{hub}/token", f"{hub}/stored_tokens"]
    real = {os.path.realpath(path) for path in (*_SECRETS, *named) if path.startswith("/")}
    words = (line.split(None, 7) for line in sockets.splitlines()[1:])
    # A program elsewhere (in a container) can have a socket where here is something else.
    bound = {os.path.realpath(line[7]) for line in words if len(line) == 8 and line[7].startswith("/")}
    real |= {path for path in bound if _kind(path, stat.S_ISSOCK)}
    return sorted(path for path in real if _may_be_hidden(path) and os.path.lexists(path))


def follow(path: str) -> tuple[list[tuple[str, str]], str]:
    """The links on the way to `path`, as (where, what it says), and the path without links that they lead to.

    OSError where there is no such file. To look makes an automounter mount it: later is too late, since a
    sandbox sees the mounts that were there when it was entered.
    """
    links: list[tuple[str, str]] = []
    current, words = Path("/"), [word for word in path.split("/") if word]
    while words:
        word = words.pop(0)
        if word == "..":
            current = current.parent
            continue
        here = current / word
        if not stat.S_ISLNK(here.lstat().st_mode):
            current = here
            continue
        target = str(here.readlink())
        links.append((str(here), target))
        if len(links) > 40:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        words = [part for part in target.split("/") if part] + words
        current = Path("/") if target.startswith("/") else current
    return links, str(current)


def steps(hidden: Sequence[str], scratch: Sequence[str], readable: Sequence[Path]) -> list[Step]:
    """How to hide `hidden` and `scratch`, and to show `readable` within them, from the outside in.

    A hidden folder within a readable one is hidden again. What isn't there needs no showing. MismatchError
    for a readable path that is a hidden folder as a whole.
    """
    closed = {*hidden, *scratch}
    made: set[Step] = {("hide", path, "") for path in hidden}
    made |= {("scratch", path, "") for path in scratch}
    for path in readable:
        try:
            links, real = follow(str(path.absolute()))
        except OSError:
            continue
        if real in closed:
            raise MismatchError(
                f"A build would have to see the whole of {path}, which is kept from builds.",
                remedy="Put what builds need (Python, compilers, ROOT) into a folder of its own below it.",
                context={"folder": path},
            )
        made |= {("zlink", here, target) for here, target in links if lies_in(here, closed)}
        if lies_in(real, closed):
            made.add(("show", real, ""))
    # By depth; at one path, in the order of the alphabet: a folder is hidden before anything is shown in it.
    return sorted(made, key=lambda step: (step[1].count("/"), step))


def lies_in(path: str, folders: set[str]) -> bool:
    """Whether `path` is in one of `folders`, or is one."""
    return any(is_below(path, folder) for folder in folders)


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or in it."""
    return folder == "/" or path == folder or path.startswith(folder + "/")
