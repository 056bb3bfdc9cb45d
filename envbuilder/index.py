"""A package index by its name: the files it has of a package (PEP 503, PEP 691), with hash and size.

A recipe and a lock name indexes; only here does a name become a URL.
"""

from __future__ import annotations

import os
import ssl
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

import httpx
from packaging.utils import canonicalize_name

from envbuilder.errors import InputError, NetworkError
from envbuilder.pip_settings import PUBLIC_INDEX, pip_setting

DEFAULT_INDEX = "default"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_PAUSES = (0.2, 0.5, 1.0)
"""Seconds to wait before each further try."""
_BUSY = frozenset({429, 500, 502, 503, 504})
_PIP_TIMEOUT = 15.0
"""pip's default for --timeout, in seconds."""


@dataclass(frozen=True, slots=True)
class IndexFile:
    """One file that an index offers."""

    filename: str
    url: str
    sha256: str | None
    size: int | None
    """Bytes; None where the index doesn't say."""
    requires_python: str | None
    yanked: bool = False


class Index:
    """A package index. Its answers are kept, so that each package is asked for once; thread-safe."""

    def __init__(self, name: str, url: str, client: httpx.Client) -> None:
        self.name = name
        self.url = url.rstrip("/") + "/"
        self._client = client
        self._answers: dict[str, tuple[IndexFile, ...]] = {}

    def files(self, package: str) -> tuple[IndexFile, ...]:
        """All files of `package`; NetworkError where the index can't be reached or doesn't have it."""
        name = canonicalize_name(package)
        if name not in self._answers:
            self._answers[name] = self._ask(name)
        return self._answers[name]

    def complete(self, file: IndexFile) -> IndexFile:
        """`file` with its size, which the server is asked for if the listing lacks it; NetworkError without a
        hash."""
        if file.sha256 is None:
            raise NetworkError(
                f"The index {self.name} gives no sha256 for {file.filename}.",
                remedy=f"Use an index that does: export {_variable(self.name)}=URL",
                context={"index": self.name, "file": file.filename},
            )
        if file.size is not None:
            return file
        length = self._request("HEAD", file.url, file.filename).headers.get("content-length", "")
        if not length.isdigit():
            raise NetworkError(
                f"The index {self.name} doesn't tell the size of {file.filename}.",
                remedy=f"Use an index that does: export {_variable(self.name)}=URL",
                context={"index": self.name, "file": file.filename},
            )
        return replace(file, size=int(length))

    def _ask(self, name: str) -> tuple[IndexFile, ...]:
        response = self._request("GET", f"{self.url}{name}/", name)
        try:
            if response.headers.get("content-type", "").partition(";")[0].strip().endswith("+json"):
                files = _from_json(response.json())
            else:
                files = _from_html(response.text)
            return tuple(replace(file, url=self._absolute(str(response.url), file.url)) for file in files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NetworkError(
                f"The index {self.name} gave an answer about {name} that is no package index's.",
                remedy=f"Check the URL of the index {self.name}: export {_variable(self.name)}=URL",
                context={"index": self.name, "error": error},
            ) from error

    def _absolute(self, page: str, href: str) -> str:
        # Not httpx's: a listing may have 15,000 files, and that would take seconds.
        absolute = urljoin(page, href)
        own = urlsplit(self.url)
        url = urlsplit(absolute)
        credentials, at, host = own.netloc.rpartition("@")
        # Credentials in the index's URL are for its own host only.
        if at and (url.scheme, url.netloc) == (own.scheme, host):
            return url._replace(netloc=f"{credentials}@{host}").geturl()
        return absolute

    def _request(self, method: str, url: str, what: str) -> httpx.Response:
        for pause in (*_PAUSES, None):
            try:
                response = self._client.request(method, url, headers={"Accept": _ACCEPT})
                if response.is_success:
                    return response
                reason = f"status {response.status_code}"
                again = response.status_code in _BUSY
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                again = isinstance(error, httpx.TransportError)
            if pause is None or not again:
                break
            time.sleep(pause)
        raise NetworkError(
            f"The index {self.name} doesn't give {what}: {reason}.",
            remedy=f"Check that the index is reachable and has {what}; another one: "
            f"export {_variable(self.name)}=URL",
            context={"index": self.name, "url": without_credentials(url)},
        )


def open_client() -> httpx.Client:
    """A client with pip's certificates, proxy and timeout.

    httpx forwards no credentials when it is redirected to another host.
    """
    try:
        seconds = float(pip_setting("timeout") or _PIP_TIMEOUT)
        return httpx.Client(
            verify=_tls(),
            proxy=pip_setting("proxy"),
            timeout=seconds,
            follow_redirects=True,
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"pip's cert, client-cert, proxy or timeout can't be used: {error}.",
            remedy="pip config list",
            context={
                option: pip_setting(option)
                for option in ("cert", "client-cert", "timeout")
                if pip_setting(option)
            },
        ) from error


def _tls() -> ssl.SSLContext:
    cert = pip_setting("cert")
    if cert is None:
        context = httpx.create_ssl_context()
        context.load_default_certs()
    elif Path(cert).is_dir():
        context = ssl.create_default_context(capath=cert)
    else:
        context = ssl.create_default_context(cafile=cert)
    if client_cert := pip_setting("client-cert"):
        context.load_cert_chain(client_cert)
    return context


def index_url(name: str) -> str:
    """URL of the index `name`: its variable, else the user's config file; for `default` then pip's index-url,
    else the public index. InputError for a name that is configured nowhere."""
    url = os.environ.get(_variable(name)) or _user_config().get(name)
    if url is None and name == DEFAULT_INDEX:
        url = pip_setting("index-url") or PUBLIC_INDEX
    if url is None:
        raise InputError(
            f"The recipe uses the index {name}, and nothing says where it is.",
            remedy=f"export {_variable(name)}=URL",
            context={"index": name, "config": _config_path()},
        )
    if httpx.URL(url).scheme not in ("http", "https"):
        raise InputError(
            f"The index {name} must be reached over http or https.",
            remedy=f"export {_variable(name)}=URL",
            context={"index": name, "got": without_credentials(url)},
        )
    return url


def open_indexes(names: Iterable[str], client: httpx.Client) -> dict[str, Index]:
    """The indexes called `names` and always the default one."""
    return {name: Index(name, index_url(name), client) for name in sorted({*names, DEFAULT_INDEX})}


def without_credentials(url: str) -> str:
    """`url` fit to be shown."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _variable(name: str) -> str:
    return f"ENVBUILDER_INDEX_{name.upper().replace('-', '_')}_URL"


def _config_path() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "envbuilder" / "config.toml"


def _user_config() -> Mapping[str, str]:
    path = _config_path()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("index", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read: {error}.", remedy=f"Mend {path}.", context={"file": path}
        ) from error
    if not isinstance(table, dict) or not all(isinstance(url, str) for url in table.values()):
        raise InputError(
            f"[index] in {path} must give each index's URL as text.",
            remedy=f'Write NAME = "URL" under [index] in {path}.',
            context={"file": path},
        )
    return table


def _from_json(answer: Any) -> list[IndexFile]:
    """Files of a PEP 691 answer."""
    if not str(answer["meta"]["api-version"]).startswith("1."):
        raise ValueError(f"unknown api-version {answer['meta']['api-version']}")
    return [
        IndexFile(
            filename=file["filename"],
            url=file["url"],
            sha256=file["hashes"].get("sha256"),
            size=file.get("size"),
            requires_python=file.get("requires-python"),
            yanked=bool(file.get("yanked")),
        )
        for file in answer["files"]
    ]


def _from_html(page: str) -> list[IndexFile]:
    """Files of a PEP 503 page, which never tells sizes."""
    parser = _Anchors()
    parser.feed(page)
    files = []
    for attributes in parser.found:
        url, _, fragment = (attributes.get("href") or "").partition("#")
        files.append(
            IndexFile(
                filename=unquote(url.partition("?")[0].rpartition("/")[2]),
                url=url,
                sha256=parse_qs(fragment).get("sha256", [None])[0],
                size=None,
                requires_python=attributes.get("data-requires-python"),
                yanked="data-yanked" in attributes,
            )
        )
    return files


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append(dict(attrs))
