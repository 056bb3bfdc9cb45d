"""Secrets in a text: known ones, those that the text marks as such, and those that look like one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from urllib.parse import quote, quote_plus

SECRET = "<secret>"
"""What stands in a secret's place."""
# All repetitions have bounds: a log may hold lines of megabytes.
# A variable's name, in capitals; what ends in _FILE and so on says where a secret lies, not what it is.
_VARIABLE = (
    r"(?!\w*_(?:FILE|PATH|DIR|SOCK|HOME|URL)\b)"
    r"[A-Z0-9_]{0,64}(?:TOKEN(?!IZ)|SECRET|PASSW(?:OR)?D|PASSPHRASE|(?<![A-Z])PASS(?![A-Z])"
    r"|(?<=_)PWD|KEY(?!BOARD|MAP)|CREDENTIAL|AUTH(?!OR))[A-Z0-9_]*"
)
# A key of JSON, YAML or a URL, or an option. "key" alone is as often a dictionary's.
_KEY = (
    r"(?i:[\w.-]{0,64}(?:passw(?:or)?d|passphrase|secret|token|credentials?|auth|signature"
    r"|(?:api|access|secret|private)[_-]?key))"
)
_SECRET_NAME = re.compile(f"{_VARIABLE}|{_KEY}")
# Not one that is taken out already.
_VALUE = r"""(?!<secret>(?:[\s,;&)\]}"']|$))(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s"']\S*)"""
_ASSIGNED = re.compile(
    rf"""(?<!\w)(?P<name>{_VARIABLE}|{_KEY})(?P<sign>["']?\s*(?:=|:)\s*|\s+is\s+(?=["']))(?P<value>{_VALUE})"""
)
_OPTION = re.compile(rf"(?<![\w-])(?P<name>--{_KEY})(?P<sign>\s+)(?P<value>(?!-){_VALUE})")
_HARMLESS = re.compile(
    r"(?i)true|false|yes|no|on|off|none|null|is|not|set|unset|missing|empty|absent|given|</?[\w|-]*/?>|\W{1,2}"
)
_COUNT = re.compile(r"\d{1,6}")
"""Of tokens, as a rule; as a password it would be one."""
_PLAIN_WORD = re.compile(r"[A-Z]?[a-z]{1,15}|[A-Z]{1,15}")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    # A line that was matched is not tried again with less: what Python 3.11 writes as (?>…).
    r"|(?:(?=(?P<line>^[^\n]*[A-Za-z0-9+/=]{16}[ \t]*\n))(?P=line))+[^\n]*-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL | re.MULTILINE,
)
_NETRC = re.compile(
    r"\bmachine\s+\S+(?:\s+(?:login|account|password)\s+\S+)+|^.{0,20}?\bpassword\s+\S+\s*$", re.M
)
_NETRC_VALUE = re.compile(r"\b(?P<name>login|account|password)(?P<sign>\s+)(?P<value>\S+)")
_AUTHORIZATION = re.compile(
    r"""(?P<name>(?i:\b(?:proxy-)?authorization|\b(?:set-)?cookie))(?P<sign>["']?\s*[:=]\s*["']?)"""
    r"""(?P<value>[^"'\n]*[^"'\s])"""
)
_BEARER = re.compile(r"(?P<name>(?i:\bbearer))(?P<sign>\s+)(?P<value>[\w.~+/=-]{6,})")
# With a password in it there may be a slash too; a port is no password.
_URL_USER = re.compile(
    r"""(?P<sign>://)(?!git@)(?P<value>[^\s/"'<>]{1,256}|[^\s/:@"'<>]{1,64}:(?!\d+/)[^\s@"'<>]{0,256})@"""
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[opsru]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|gl[a-z]{2,5}-[\w-]{16,}|sk-(?=[\w-]*\d)[\w-]{16,}|nvapi-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|pypi-[\w-]{16,}|npm_[A-Za-z0-9]{16,}|dckr_pat_[\w-]{16,}"
    r"|wandb_v\d_\w{16,}|(?<=wandb login )[0-9a-f]{40}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"
    r"|MUNGE:[\w+/=]+:?)"
)


def secrets_of(environ: Mapping[str, str]) -> frozenset[str]:
    """The secrets among the variables of a process: by their names, and passwords in URLs."""
    found = {value for name, value in environ.items() if _SECRET_NAME.fullmatch(name)}
    found |= {_password(match) for value in environ.values() for match in _URL_USER.finditer(value)}
    return frozenset(value for value in found if _is_long(value))


def marked_secrets(text: str) -> frozenset[str]:
    """What `text` itself says to be secret, e.g. by NAME_TOKEN=; elsewhere it may stand without the mark.

    Plain words are left out: "token: unexpected" does not make every "unexpected" a secret.
    """
    values = (found.strip("\"',;)]}") for found in _marked(text))
    return frozenset(value for value in values if _is_long(value) and not _PLAIN_WORD.fullmatch(value))


def without_secrets(text: str, known: Collection[str]) -> str:
    """`text` without the secrets `known`, those that it marks, private keys, and tokens of known make."""
    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub("<private key>", text)
    text = _URL_USER.sub(lambda match: f"{match['sign']}{SECRET}@", text)
    for secret in sorted(_spellings(known), key=len, reverse=True):
        text = text.replace(secret, SECRET)
    text = _AUTHORIZATION.sub(lambda match: f"{match['name']}{match['sign']}{SECRET}", text)
    text = _BEARER.sub(lambda match: f"{match['name']}{match['sign']}{SECRET}", text)
    text = _NETRC.sub(lambda entry: _NETRC_VALUE.sub(_masked, entry[0]), text)
    text = _OPTION.sub(_masked, _ASSIGNED.sub(_masked, text))
    return _TOKEN.sub(SECRET, text)


def _marked(text: str) -> Iterator[str]:
    for pattern in (_ASSIGNED, _OPTION, _BEARER):
        yield from (match["value"] for match in pattern.finditer(text))
    for entry in _NETRC.finditer(text):
        yield from (match["value"] for match in _NETRC_VALUE.finditer(entry[0]))
    for match in _AUTHORIZATION.finditer(text):
        yield match["value"].split()[-1]
    yield from map(_password, _URL_USER.finditer(text))


def _password(match: re.Match[str]) -> str:
    """Of a URL's user."""
    return match["value"].partition(":")[2]


def _is_long(value: str) -> bool:
    """Whether `value` can be told from other words wherever it stands; a short one is secret by its place."""
    return len(value) >= 6 and not _HARMLESS.fullmatch(value) and not _COUNT.fullmatch(value)


def _spellings(secrets: Collection[str]) -> set[str]:
    """The secrets as texts may write them: quoted, in a URL, line by line."""
    lines = {line.strip() for secret in secrets for line in secret.splitlines()}
    whole = {line for line in lines if len(line) >= 6}
    return whole | {spell(line) for line in whole for spell in (quote, quote_plus, shlex.quote, _escaped)}


def _escaped(text: str) -> str:
    return repr(text)[1:-1]


def _masked(match: re.Match[str]) -> str:
    """The match with its value taken out, unless that says no more than whether there is one."""
    value, is_password = match["value"].strip("\"',;.)]}"), "pass" in match["name"].lower()
    if _HARMLESS.fullmatch(value) or (not is_password and _COUNT.fullmatch(value)):
        return match[0]
    return f"{match['name']}{match['sign']}{SECRET}"
