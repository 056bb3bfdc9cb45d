"""Variables that say how this machine reaches the network: pip's settings, the hub's, proxies."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pip

from envbuilder.doctor.check import Outcome, ok, warning
from envbuilder.doctor.subject import Subject
from envbuilder.process import run
from envbuilder.report import Reporter

_TIMEOUT_S = 20
_PROXY_TIMEOUT_S = 3.0
_REDIRECTING = ("target", "prefix", "root", "user", "python")
"""pip's options that put packages elsewhere than into the env."""
_STEERING = ("no-index", "constraint", "pre", "only-binary", "no-binary", "no-deps", "require-virtualenv")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
"""In the names of variables whose values are never shown."""


def check_pip(subject: Subject, reporter: Reporter) -> Outcome:
    """pip's and uv's settings that would put packages elsewhere; envbuilder's own calls heed none of them."""
    own_pip = Path(pip.__file__).parent  # run as a folder it needs no installation, as in the one file
    asked = run(
        [sys.executable, own_pip, "--disable-pip-version-check", "config", "list"], timeout_s=_TIMEOUT_S
    )
    settings = dict(re.findall(r"^(\S+?\.[a-z-]+)='(.*)'$", asked.output, re.MULTILINE))
    redirecting = _pip_lines(settings, _REDIRECTING)
    evidence = [*redirecting, *_pip_lines(settings, _STEERING)]
    evidence += [f"{name} is set" for name in sorted(os.environ) if name.startswith("UV_")]
    if redirecting:
        return warning(
            "pip is set to put packages elsewhere than into the env that is active. envbuilder's own "
            "commands don't heed it; pip typed in this shell does.",
            *evidence,
            remedy="See where it is set: pip config debug; then unset the variable, or pip config unset NAME",
        )
    if asked.returncode != 0:
        return warning(
            "pip can't read its configuration, from which envbuilder takes index, proxy and certificates.",
            *asked.output.strip().splitlines()[-3:],
            remedy="pip config debug",
        )
    return ok(
        "pip and uv are not set to put packages elsewhere; their other settings sway no lock.", *evidence
    )


def _pip_lines(settings: Mapping[str, str], options: Iterable[str]) -> list[str]:
    wanted = set(options)
    found = {name: value for name, value in settings.items() if name.rpartition(".")[2] in wanted}
    return [
        f"pip: {name} = {value}"
        for name, value in sorted(found.items())
        if value.lower() not in ("", "0", "false", "no")
    ]


def check_hub(subject: Subject, reporter: Reporter) -> Outcome:
    """HF_* and TRANSFORMERS_*: where a hub's files would be taken from, and put."""
    there = {
        name: os.environ[name]
        for name in sorted(os.environ)
        if re.match(r"(HF|HUGGING_?FACE|TRANSFORMERS)_", name)
    }
    if not there:
        return ok("No variable of the model hub is set; envbuilder train works without the hub.")
    evidence = [
        f"{name} is set" if SECRET.search(name) else f"{name}={_bare(value)}" for name, value in there.items()
    ]
    homes = {
        name: Path(there[name])
        for name in ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
        if there.get(name)
    }
    bad = [name for name, path in homes.items() if not _can_be_written(path)]
    if bad:
        return warning(
            f"{', '.join(bad)} names a folder that you can't write. envbuilder takes models from the bundle; "
            "libraries that you call yourself fail on it.",
            *evidence,
            remedy=f"export {bad[0]}=FOLDER, one on a disk with room; or: unset {bad[0]}",
        )
    return ok(
        "The hub's variables name nothing that is in the way; envbuilder train sets HF_HUB_OFFLINE.",
        *evidence,
    )


def _can_be_written(path: Path) -> bool:
    """Whether the folder is writable, or could be made."""
    there = next((one for one in (path, *path.parents) if one.exists()), Path("/"))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def check_proxy(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the proxies of this shell answer, from here."""
    proxies = {
        name: value
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
        if (value := os.environ.get(name))
    }
    if not proxies:
        return ok("No proxy is set.")
    evidence = [f"{name}={_bare(value)}" for name, value in proxies.items()]
    evidence.append(f"no_proxy={os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or ''}")
    reasons = {value: _why_no_answer(value) for value in set(proxies.values())}
    silent = [name for name, value in proxies.items() if reasons[value]]
    if silent:
        return warning(
            f"The proxy of {', '.join(silent)} doesn't answer from here: downloads hang or fail.",
            *evidence,
            *(f"{_bare(value)}: {reason}" for value, reason in reasons.items() if reason),
            remedy=f"On a node without internet: unset {' '.join(silent)}; on a login node, ask for "
            "the proxy's address",
        )
    differing = [name for name in ("http_proxy", "https_proxy") if _differ(proxies, name)]
    if differing:
        return warning(
            f"{', '.join(differing)} is another proxy in upper case: programs differ in which they heed.",
            *evidence,
            remedy=f"export {differing[0].upper()}=${differing[0]}",
        )
    return ok("The proxies accept connections.", *evidence)


def _differ(proxies: Mapping[str, str], name: str) -> bool:
    return name in proxies and proxies.get(name.upper(), proxies[name]) != proxies[name]


def _why_no_answer(proxy: str) -> str | None:
    """Why no connection to the proxy can be made; None where one can."""
    try:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
        socket.create_connection(address, timeout=_PROXY_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _bare(url: str) -> str:
    """`url` without user and password."""
    return re.sub(r"(?<=://)[^/@]*@|^[^/@:]+:[^/@]*@", "***@", url)
