"""From an index's name to its URL. A recipe and a lock name indexes; only here does a name become a URL."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import httpx

from envbuilder.errors import InputError
from envbuilder.index.find_links import FindLinks
from envbuilder.index.simple import FileSource, Index, variable
from envbuilder.pip_settings import PUBLIC_INDEX, PipSettings, read_pip_settings
from envbuilder.toml import tomllib
from envbuilder.urls import shown

DEFAULT_INDEX = "default"


def open_indexes(names: Iterable[str], client: httpx.Client) -> dict[str, Index]:
    """The indexes called `names` and always the default one, which falls back on pip's find-links and extra
    indexes where it lacks a locked file."""
    settings = read_pip_settings()
    return {
        name: Index(
            name,
            index_url(name),
            client,
            retries=settings.retries,
            fallbacks=_fallbacks(settings, client) if name == DEFAULT_INDEX else (),
        )
        for name in sorted({*names, DEFAULT_INDEX})
    }


def index_url(name: str) -> str:
    """URL of the index `name`: its variable, else the user's config file; for `default` then pip's index-url,
    else the public index. InputError for a name that is configured nowhere."""
    url = os.environ.get(variable(name)) or _user_config().get(name)
    if url is None and name == DEFAULT_INDEX:
        url = read_pip_settings().index_url or PUBLIC_INDEX
    if url is None:
        raise InputError(
            f"The recipe uses the index {name}, and nothing says where it is.",
            remedy=f"export {variable(name)}=URL",
            context={"index": name, "config": _config_path()},
        )
    if not _is_http(url):
        raise InputError(
            f"The index {name} must be reached over http or https.",
            remedy=f"export {variable(name)}=URL",
            context={"index": name, "got": shown(url)},
        )
    return url


def _fallbacks(settings: PipSettings, client: httpx.Client) -> tuple[FileSource, ...]:
    """Where a locked file may be found too: the machine's own folders first."""
    extra = [url for url in settings.extra_index_urls if _is_http(url)]
    return (
        *(FindLinks(place, client, retries=settings.retries) for place in settings.find_links),
        *(
            Index(
                f"extra-index-url {number}",
                url,
                client,
                retries=settings.retries,
                setting="pip config set global.extra-index-url URL",
            )
            for number, url in enumerate(extra, start=1)
        ),
    )


def _is_http(url: str) -> bool:
    try:
        return httpx.URL(url).scheme in ("http", "https")
    except httpx.InvalidURL:
        return False


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
