"""What an index's answer about one package says (PEP 503, PEP 691), or any other page of links. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

_ABSOLUTE = ("https://", "http://")


@dataclass(frozen=True)
class IndexFile:
    """One file that an index offers."""

    filename: str
    url: str
    """http, https or file."""
    sha256: str | None
    size: int | None
    """Bytes; None where the index doesn't say."""
    requires_python: str | None
    yanked: bool = False
    metadata_sha256: str | None = None
    """sha256 of the METADATA that the server has beside a wheel (PEP 658, PEP 714), if it says so."""


def parse_page(content: str, url: str, *, is_json: bool) -> tuple[IndexFile, ...]:
    """The files that the page `content` names, which was found at `url`.

    ValueError, KeyError, TypeError or AttributeError where it is no index's answer.
    """
    files = _from_json(json.loads(content)) if is_json else _from_html(content)
    # Not httpx's join: a listing may have 15,000 files, and that would take seconds.
    return tuple(
        file if file.url.startswith(_ABSOLUTE) else replace(file, url=urljoin(url, file.url))
        for file in files
    )


def with_credentials(files: tuple[IndexFile, ...], index_url: str) -> tuple[IndexFile, ...]:
    """`files`, the URLs of those on the very origin of `index_url` with the credentials in it."""
    own = urlsplit(index_url)
    credentials, at, host = own.netloc.rpartition("@")
    if not at:
        return files
    origin, entry = f"{own.scheme}://{host}/", f"{own.scheme}://{credentials}@{host}/"
    return tuple(
        replace(file, url=entry + file.url.removeprefix(origin)) if file.url.startswith(origin) else file
        for file in files
    )


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
            metadata_sha256=_metadata_sha256(file.get("core-metadata", file.get("dist-info-metadata"))),
        )
        for file in answer["files"]
    ]


def _metadata_sha256(said: Any) -> str | None:
    # `true` says that there is metadata, but not which: of no use where nothing else vouches for it.
    return said.get("sha256") if isinstance(said, dict) else None


def _from_html(page: str) -> list[IndexFile]:
    """Files of a PEP 503 page, which never tells sizes."""
    parser = _Anchors()
    parser.feed(page)
    files = []
    for attributes in parser.found:
        url, _, fragment = (attributes.get("href") or "").partition("#")
        metadata = attributes.get("data-core-metadata", attributes.get("data-dist-info-metadata"))
        files.append(
            IndexFile(
                filename=unquote(url.partition("?")[0].rpartition("/")[2]),
                url=url,
                sha256=parse_qs(fragment).get("sha256", [None])[0],
                size=None,
                requires_python=attributes.get("data-requires-python"),
                yanked="data-yanked" in attributes,
                metadata_sha256=(metadata or "").partition("sha256=")[2] or None,
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
