"""pip's find-links: folders, files and pages that may have files which a lock names. They choose nothing."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

from envbuilder.errors import NetworkError
from envbuilder.index.asking import Unanswered, ask
from envbuilder.index.page import IndexFile, parse_page
from envbuilder.urls import shown


class FindLinks:
    """One entry of pip's find-links: a folder, an HTML page or a file by path or file: URL, or a page by its
    http(s) URL, which is asked for once."""

    def __init__(self, place: str, client: httpx.Client, *, retries: int) -> None:
        self._place = place
        self._client = client
        self._retries = retries
        self._files: tuple[IndexFile, ...] | None = None

    def offers(self, package: str) -> tuple[IndexFile, ...]:
        """Its files of `package`; NetworkError where its page can't be had."""
        if self._files is None:
            self._files = self._read()
        name = canonicalize_name(package)
        return tuple(file for file in self._files if _package(file.filename) == name)

    def _read(self) -> tuple[IndexFile, ...]:
        try:
            if urlsplit(self._place).scheme not in ("http", "https"):
                return _local(self._place)
            answer = ask(self._client, "GET", self._place, retries=self._retries)
            return parse_page(answer.text, answer.url, is_json=False)
        except (Unanswered, OSError, ValueError) as error:
            place = shown(self._place)
            raise NetworkError(
                f"pip's find-links {place} can't be read: {error}.",
                remedy="pip config list",
                context={"find-links": place},
            ) from error


def _local(place: str) -> tuple[IndexFile, ...]:
    url = urlsplit(place)
    path = Path(unquote(url.path)) if url.scheme == "file" else Path(place).expanduser()
    path = path.absolute()
    if path.is_dir():
        return tuple(_plain(file) for file in sorted(path.iterdir()) if file.is_file())
    if not path.is_file():
        return ()  # as pip has it: shared configurations name places that not every machine has
    if path.suffix in (".html", ".htm"):
        return parse_page(path.read_text(encoding="utf-8", errors="replace"), path.as_uri(), is_json=False)
    return (_plain(path),)


def _plain(path: Path) -> IndexFile:
    return IndexFile(path.name, path.as_uri(), sha256=None, size=None, requires_python=None)


def _package(filename: str) -> str | None:
    try:
        if filename.endswith(".whl"):
            return parse_wheel_filename(filename)[0]
        return parse_sdist_filename(filename)[0]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None
