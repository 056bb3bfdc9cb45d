"""Takes out of a text what is nobody else's business: secrets, and the names of people and machines.

What is replaced stays told apart: one name is one pseudonym (`<user>`, `<host-2>`) all over the text. What
says nothing about people stays as it is: digests, versions, symbols, packages, the other parts of a path.

A name is replaced wherever it stands as a word of its own. One that is an ordinary word of such texts (a user
"torch", a machine "gpu", anything of one or two letters) is replaced only where something says that it is a
name: /home/torch, USER=torch, https://gpu/. The user "root" is nobody in particular and stays.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from envbuilder.doctor.secret_text import marked_secrets, secrets_of, without_secrets

_SYSTEM_USERS = frozenset({"root", "nobody", "daemon"})
_ORDINARY = """
account address admin all app build common compute core cuda data demo dev email env envbuilder envs gpu guest
home host jobs key lab lib local log login logs mac main max min model models new node none nvidia old opt
private project projects public python rank run runs scratch secret server shared slurm software src student
sys temp test tmp tools torch train user users usr var vm work
"""
"""Words of logs and paths that are somebody's user name, or a machine's, somewhere."""
_SHARED_FOLDERS = """
all common data groups jobs local models project projects public scratch shared software temp tmp
"""
"""In /home or /scratch, where else each user has a folder."""
_USER_VARIABLES = ("USER", "LOGNAME", "SUDO_USER", "SLURM_JOB_USER")
_HOST_VARIABLES = ("HOSTNAME", "SLURMD_NODENAME", "SLURM_SUBMIT_HOST", "MASTER_ADDR")
_ACCOUNT_VARIABLES = ("SLURM_JOB_ACCOUNT", "SBATCH_ACCOUNT", "SALLOC_ACCOUNT", "SLURM_ACCOUNT")
_RESOLVER = Path("/etc/resolv.conf")

# Not `symbol@libcudart.so.13`, a versioned symbol; `git@` is nobody in particular.
_EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]+@(?![\w.-]*\.so\b)[A-Za-z0-9][\w-]*(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"
)
_MAC = re.compile(
    r"(?<![\w:-])[0-9A-Fa-f]{2}(?:(?::[0-9A-Fa-f]{2}){5}|(?::[0-9A-Fa-f]{2}){7}|(?::[0-9A-Fa-f]{2}){19}"
    r"|(?=[\d-]*[A-Fa-f])(?:-[0-9A-Fa-f]{2}){5})(?![\w:-])"
)
_IPV4 = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\d|\.\d|-(?:py|cp|pp|\d+-)|\.(?:tar|zip|whl|dist|data))"
)
_IPV6 = re.compile(r"(?<![\w.])[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:]*(?<=[0-9A-Fa-f:])(?!\w)")
_PUBLIC_OR_LOCAL = tuple(map(ipaddress.IPv6Network, ("2000::/3", "fc00::/7", "fe80::/10")))
"""All that machines have; what else could be read as an address is rather C++: c10::add."""
# What stands before the four numbers of a version, such as that of cuBLAS.
_BEFORE_VERSION = re.compile(
    r"(?i)(?:[=<>~!]=\s*|\bversions?\s*[:=]?\s*"
    r"|\b(?:nvidia|cu(?:da|dnn|blas|fft|file|rand|solver|sparse)|libcu|libnv|nccl|nvcc)[\w.-]*[\s:=(]+)$"
)
# /home/NAME, /home/users/NAME and /home/n/NAME; nothing that is replaced already. (?=(?P<x>…))(?P=x) matches
# once, and is not tried again with less: what Python 3.11 writes as (?>…).
_BELOW_HOMES = re.compile(
    r"(?P<folder>/(?i:homes?|users?|u|userexternal|scratch)/(?=(?P<more>(?:(?i:users?|userexternal)/)*))(?P=more)"
    r"(?:(?P<initial>[A-Za-z])/(?=(?P=initial)))?)"
    r"(?=(?P<name>\w(?:[\w.@+-]*\w)?))(?P=name)(?!/<)"
)
_SAID_USER = r"""(?i:\b(?:user(?:[ _]?name)?|logname|owner)\s*[=:]\s*["']?|\buid=\d+\(|\bowned by |~)"""
_SAID_HOST = r"""(?i:@|://|\b(?:host(?:[ _]?name)?|node(?:[ _]?name|[ _]?list)?)\s*[=:]\s*["']?)"""
_SAID_ACCOUNT = r"""(?i:\baccount\s*[=:]\s*["']?|\s-A\s*)"""


@dataclass(frozen=True)
class Private:
    """What a text must not tell."""

    users: frozenset[str] = frozenset()
    """Names of one person: the user."""
    hosts: frozenset[str] = frozenset()
    """Names of this machine, and of those that its job has, with or without their domains."""
    domains: frozenset[str] = frozenset()
    """Of the machines around."""
    accounts: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()


def private_here(environ: Mapping[str, str], accounts: Iterable[str | None] = ()) -> Private:
    """What is private to the user who runs this, on this machine; `accounts` are Slurm's that are known."""
    users = {environ.get(name, "") for name in _USER_VARIABLES}
    users.add(PurePath(environ.get("HOME", "")).name)
    with suppress(KeyError):  # a user that has no entry, as in a container
        entry = pwd.getpwuid(os.getuid())
        full_name = entry.pw_gecos.partition(",")[0]
        users |= {entry.pw_name, PurePath(entry.pw_dir).name, full_name if " " in full_name else ""}
    hosts = {socket.gethostname(), *(environ.get(name, "") for name in _HOST_VARIABLES)}
    # "node[01-04,07]": its neighbours are found by the first.
    hosts |= set(re.sub(r"\[(\d+)[^\]]*\]", r"\1", environ.get("SLURM_JOB_NODELIST", "")).split(","))
    named = {environ.get(name, "") for name in _ACCOUNT_VARIABLES}
    return Private(
        users=frozenset(users - {""}),
        hosts=frozenset(host for host in hosts - {"", "localhost"} if not _IPV4.fullmatch(host)),
        domains=_search_domains(),
        accounts=frozenset(filter(None, {*named, *accounts})),
        secrets=secrets_of(environ),
    )


def _search_domains() -> frozenset[str]:
    """Those that this machine looks for its neighbours in; resolv.conf(5)."""
    try:
        text = _RESOLVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [line.split() for line in text.splitlines()]
    words = {word.strip(".") for line in lines if line[:1] in (["search"], ["domain"]) for word in line[1:]}
    return frozenset(words - {""})


class Redactor:
    """Replaces what is private in texts. Show it all of them first (`learn`), then `redact` each."""

    def __init__(
        self, private: Private, *, ordinary: Collection[str] = (), versions: Collection[str] = ()
    ) -> None:
        """`ordinary` are words that are names only where something says so; `versions` are no addresses."""
        self._ordinary = {*_ORDINARY.split(), *(word.lower() for word in ordinary)}
        self._versions = frozenset(versions)
        self._secrets = {word for word in private.secrets if word.lower() not in self._ordinary}
        self._users = _Pseudonyms("user", private.users - _SYSTEM_USERS)
        self._hosts = _Hosts(private.hosts, private.domains)
        self._accounts = _Pseudonyms("account")
        for account in sorted(private.accounts):
            self._accounts.add(account)
        self._addresses = _Pseudonyms("address")

    def learn(self, text: str) -> None:
        """Takes note of the secrets and user names that `text` tells: elsewhere they may stand without it."""
        self._secrets |= marked_secrets(text)
        for match in _BELOW_HOMES.finditer(text):
            if self._is_user(match) and "scratch" not in match["folder"].lower():
                self._users.add(match["name"])

    def redact(self, text: str) -> str:
        """`text` without what is private."""
        return self._without_names(self._without_addresses(without_secrets(text, self._secrets)))

    def _without_addresses(self, text: str) -> str:
        text = _EMAIL.sub("<email>", text)
        text = _MAC.sub("<mac>", text)
        text = _IPV6.sub(self._address6, text)
        return _IPV4.sub(self._address4, text)

    def _address4(self, match: re.Match[str]) -> str:
        before = match.string[max(0, match.start() - 60) : match.start()]
        if match[0] in self._versions or _BEFORE_VERSION.search(before):
            return match[0]
        try:
            address = ipaddress.IPv4Address(match[0])
        except ValueError:
            return match[0]
        no_machine = address.is_loopback or address.is_unspecified or match[0].startswith("255.")
        return match[0] if no_machine else self._addresses.of(match[0])

    def _address6(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.IPv6Address(match[0])
        except ValueError:
            return match[0]
        is_one = any(address in network for network in _PUBLIC_OR_LOCAL)
        return self._addresses.of(address.compressed) if is_one else match[0]

    def _without_names(self, text: str) -> str:
        text = _BELOW_HOMES.sub(
            lambda match: (
                match["folder"] + (self._users.of(match["name"]) if self._is_user(match) else match["name"])
            ),
            text,
        )
        text = self._without(self._hosts, _SAID_HOST, text)
        text = self._without(self._accounts, _SAID_ACCOUNT, text)
        return self._without(self._users, _SAID_USER, text)

    def _without(self, names: _Pseudonyms, said: str, text: str) -> str:
        """`text` without `names`; `said` is what may stand before one to say that it is a name."""
        for name, pattern in names.known():
            is_ordinary = len(name) < 3 or name in self._ordinary
            before = said if is_ordinary else "(?<![A-Za-z0-9])"
            text = re.sub(
                rf"(?P<before>{before})(?P<name>(?i:{pattern}))(?![A-Za-z0-9])",
                lambda match: match["before"] + names.of(match["name"]),
                text,
            )
        return text

    def _is_user(self, match: re.Match[str]) -> bool:
        name = match["name"].lower()
        return name in self._users or name not in {*_SYSTEM_USERS, *_SHARED_FOLDERS.split()}


class _Pseudonyms:
    """What the names of one kind are replaced by."""

    def __init__(self, kind: str, own: Iterable[str] = ()) -> None:
        """`own` are all names of one."""
        self._kind = kind
        self._given = {name.lower(): f"<{kind}>" for name in own}
        self._known = set(self._given)

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._known

    def add(self, name: str) -> None:
        """From now on, `known` has this name too."""
        self._known.add(name.lower())

    def of(self, name: str) -> str:
        """The pseudonym, always the same."""
        new = f"<{self._kind}-{len(set(self._given.values())) + 1}>"
        return self._given.setdefault(name.lower(), new)

    def known(self) -> list[tuple[str, str]]:
        """The names that are replaced where they stand alone, longest first, each with its pattern."""
        return [(name, re.escape(name)) for name in sorted(self._known, key=lambda name: (-len(name), name))]


class _Hosts(_Pseudonyms):
    """One machine is the same with and without its domain, and it has neighbours: lrdn0001 has lrdn0002."""

    def __init__(self, hosts: Iterable[str], domains: Iterable[str]) -> None:
        super().__init__("host")
        self._domains = set(domains)
        for host in sorted(hosts):
            short, _, domain = host.partition(".")
            self.add(short)
            self._domains |= {domain.lower()} - {""}

    def of(self, name: str) -> str:
        return super().of(name.partition(".")[0])

    def known(self) -> list[tuple[str, str]]:
        domain = f"(?:\\.(?:{'|'.join(map(re.escape, sorted(self._domains)))}))?" if self._domains else ""
        return [(name, self._with_neighbours(name) + domain) for name, _ in super().known()]

    @staticmethod
    def _with_neighbours(name: str) -> str:
        if numbered := re.fullmatch(r"(.*[a-z-])(\d{2,})", name):
            stem, number = numbered.groups()
            return rf"{re.escape(stem)}(?:\d{{{len(number)}}}|\[[\d,-]+\])"
        return re.escape(name)
