"""How git reaches a server: the URLs that are fetched from, and the variables and settings that git is given.

Of the user's git configuration only what says how to reach a server is taken: proxies, certificates,
credential helpers, ssh, other addresses (`_CONNECTION`). All else is left out, so that it can neither change
what is fetched nor run anything.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from envbuilder.errors import InputError, MismatchError

_CONNECTION = re.compile(
    r"(?:credential|http|url)\..+|core\.(?:sshcommand|askpass|gitproxy)|ssh\.variant|safe\.directory",
    re.IGNORECASE | re.DOTALL,
)
# The same in variables. Others (GIT_DIR, GIT_CONFIG_COUNT, GIT_TRACE …) would redirect git, or tell secrets.
_VARIABLES = frozenset(
    {"GIT_ASKPASS", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_SSH_VARIANT", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH"}
)
# Nobody may be there to answer, and a dead connection must be noticed.
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=3"
_URL = re.compile(r"(?:https?|ssh|file)://(?!-)\S+|[\w.-]+@(?!-)[\w.-]+:(?!-)\S+")
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class Connection:
    """What git is run with."""

    url: str
    """Without credentials."""
    environment: Mapping[str, str]


def connect(folder: Path, package: str, url: str, *, variable: str) -> Connection:
    """How to reach `url` for `package`, with what git needs for it put into the private folder `folder`.

    Credentials, of `url` or of the settings, are kept out of every command line, where others on the machine
    could read them.
    `variable` names the one that gives another URL, for the remedy of InputError.
    """
    shown = without_credentials(url) if url.startswith(("http://", "https://")) else url
    if not is_fetchable(shown):
        raise InputError(
            f"The git URL of {package} is none that envbuilder fetches from.",
            remedy=f"export {variable}=URL with an https, http, ssh or file URL.",
            context={"package": package, "url": shown},
        )
    settings = connection_settings()
    if shown != url:
        # In place of the user's own helpers, which would be told to keep these credentials.
        settings = [item for item in settings if not item[0].lower().startswith("credential.")]
        settings.append(("credential.helper", _helper(folder, url)))
    _write_secret(folder / "config", "".join(_config_lines(key, value) for key, value in settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "LC_ALL": "C",
        "GIT_ALLOW_PROTOCOL": "https:http:ssh:file" if shown.startswith("file:") else "https:http:ssh",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": str(folder.absolute() / "config"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_DIR": str(folder.absolute() / "repository"),
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    own_ssh = any(key.lower() == "core.sshcommand" for key, _ in settings)
    if not own_ssh and not {"GIT_SSH", "GIT_SSH_COMMAND"} & environment.keys():
        environment["GIT_SSH_COMMAND"] = _SSH
    return Connection(shown, environment)


def connection_settings() -> list[tuple[str, str]]:
    """The user's and the system's settings that say how to reach a server."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("GIT_CONFIG") or not name.startswith("GIT_")
    }
    with program():
        done = subprocess.run(
            ["git", "config", "--list", "--null"],
            env={**environment, "GIT_DIR": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    if done.returncode != 0:
        raise InputError(
            "git can't read its own configuration.",
            remedy="Mend what it names: git config --list",
            context={"git": last_words(done.stderr)},
        )
    items = (item.partition("\n") for item in done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1])
    return [(key, value if line else "true") for key, line, value in items if _CONNECTION.fullmatch(key)]


def is_fetchable(url: str) -> bool:
    """Whether `url` is of a kind that is fetched from: a server's, or a file's, and no option or program."""
    return _URL.fullmatch(url) is not None


def without_credentials(text: str) -> str:
    """`text` with no user or password in its URLs."""
    return _CREDENTIALS.sub("://", text)


def absolute_url(parent: str, url: str) -> str:
    """A submodule's URL; git's own rule for one that begins with ./ or ../ (man gitmodules)."""
    if not url.startswith(("./", "../")):
        return url
    base = parent.rstrip("/")
    while url.startswith(("./", "../")):
        if url.startswith("../"):
            head, separator, _ = base.rpartition("/")
            if not separator:  # git@host:owner, where the colon ends the host
                return f"{base.rpartition(':')[0]}:{url.removeprefix('../')}"
            base = head
        url = url.partition("/")[2]
    return f"{base}/{url}"


def last_words(output: bytes) -> str:
    """The end of what git has said, fit to be shown."""
    text = without_credentials(output.decode("utf-8", "replace"))
    # A server's words too, so nothing that would move a terminal's cursor.
    lines = ["".join(filter(str.isprintable, line)) for line in re.split(r"[\r\n]+", text)]
    spoken = [line for line in lines if line.startswith(("fatal:", "error:", "remote:", "ssh:", "warning:"))]
    return "\n".join((spoken or [line for line in lines if line.strip()])[-5:])


@contextmanager
def program() -> Iterator[None]:
    """Turns the absence of git into MismatchError."""
    try:
        yield
    except FileNotFoundError as error:
        raise MismatchError(
            "The program git is not on this machine.", remedy="Install git, or load the module that has it."
        ) from error


def _helper(folder: Path, url: str) -> str:
    """A credential helper that knows the credentials in `url`, from a file that only the user can read."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    secret = folder.absolute() / "credentials"
    _write_secret(secret, f"{parts.scheme}://{user if ':' in user else f'{user}:'}@{host}\n")
    return f"store --file {shlex.quote(str(secret))}"


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _config_lines(key: str, value: str) -> str:
    """A setting as git's configuration files have it (man git-config, "Syntax")."""
    section, _, rest = key.partition(".")
    subsection, dot, name = rest.rpartition(".")
    escaped = subsection.replace("\\", r"\\").replace('"', r"\"")
    quoted = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    head = f'[{section} "{escaped}"]' if dot else f"[{section}]"
    return f'{head}\n\t{name} = "{quoted}"\n'
