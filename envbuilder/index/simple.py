"""A package index: the files that it has of a package, with hash and size, and where to get them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import httpx
from packaging.utils import canonicalize_name

from envbuilder.bundle import hash_file
from envbuilder.errors import IntegrityError, NetworkError
from envbuilder.index.asking import PAGE_BYTES, Answer, Unanswered, ask
from envbuilder.index.page import IndexFile, parse_page, with_credentials
from envbuilder.index.remote_wheel import METADATA_BYTES, read_metadata
from envbuilder.lock import LockedFile
from envbuilder.urls import shown

_MISSING = frozenset({403, 404, 410})
"""An index without a package answers so; some refuse what they don't have."""
_RANGELESS = frozenset({200, 416})


@dataclass(frozen=True)
class Offer:
    """Where the bytes of a locked file are."""

    url: str
    path: Path | None = None
    """Set where they are on this machine."""
    remedy: str = "envbuilder lock RECIPE"
    """What to do if they turn out to be other ones."""


class FileSource(Protocol):
    """Something beside an index that may have files which a lock names."""

    def offers(self, package: str) -> tuple[IndexFile, ...]:
        """Its files of `package`; NetworkError where it can't be asked."""


class Index:
    """A package index. Its answers are kept, so that each package is asked for once; thread-safe.

    `retries`: how many more times to ask where an index is busy or can't be reached.
    `fallbacks`: where to look for a locked file that the index doesn't have (any more).
    `setting`: the command that changes `url`, for remedies.
    """

    def __init__(
        self,
        name: str,
        url: str,
        client: httpx.Client,
        *,
        retries: int = 3,
        fallbacks: Sequence[FileSource] = (),
        setting: str | None = None,
    ) -> None:
        self.name = name
        self.url = url.rstrip("/") + "/"
        self._client = client
        self._retries = retries
        self._fallbacks = tuple(fallbacks)
        self._setting = setting or f"export {variable(name)}=URL"
        self._answers: dict[str, tuple[IndexFile, ...] | int] = {}

    def files(self, package: str) -> tuple[IndexFile, ...]:
        """All files of `package`; NetworkError where the index can't be reached or doesn't have it."""
        name = canonicalize_name(package)
        answer = self._answer(name)
        if isinstance(answer, int):
            raise self._failure(f"{self.url}{name}/", name, f"status {answer}")
        return answer

    def offers(self, package: str) -> tuple[IndexFile, ...]:
        """All files of `package`, if any; NetworkError where the index can't be reached."""
        answer = self._answer(canonicalize_name(package))
        return () if isinstance(answer, int) else answer

    def complete(self, file: IndexFile) -> IndexFile:
        """`file` with its size, which the server is asked for if the listing lacks it; NetworkError without a
        hash."""
        if file.sha256 is None:
            raise NetworkError(
                f"The index {self.name} gives no sha256 for {file.filename}.",
                remedy=f"Use an index that does: {self._setting}",
                context={"index": self.name, "file": file.filename},
            )
        if file.size is not None:
            return file
        answer = self._request("HEAD", file.url, file.filename, headers={"Accept-Encoding": "identity"})
        length = answer.headers.get("Content-Length", "")
        if not length.isdigit():
            raise NetworkError(
                f"The index {self.name} doesn't tell the size of {file.filename}.",
                remedy=f"Use an index that does: {self._setting}",
                context={"index": self.name, "file": file.filename},
            )
        return replace(file, size=int(length))

    def offer_of(self, file: LockedFile) -> Offer:
        """Where the bytes of `file` are: in this index, else under its name in one of the fallbacks.

        Whether they are is for the hash to say: who transfers them must check it. IntegrityError where the
        index announces other bytes under that name; NetworkError where nobody has it, or the index can't be
        reached.
        """
        for offer in self.offers(file.package):
            if offer.filename == file.filename:
                self._check(offer, file)
                return Offer(offer.url)
        failure: NetworkError | None = None
        for source in self._fallbacks:
            try:
                for offer in source.offers(file.package):
                    if offer.filename == file.filename and (found := _same(offer, file)):
                        return found
            except NetworkError as error:
                failure = error
        raise NetworkError(
            f"The index {self.name} has no {file.filename} any more.",
            remedy="Use an index that has it (docs/recipes.md), or: envbuilder lock RECIPE",
            context={"index": self.name, "file": file.filename}
            | ({"also": failure.message} if failure else {}),
        ) from failure

    def metadata(self, file: IndexFile) -> bytes | None:
        """METADATA of the wheel `file`, which stays where it is; None where that can't be.

        It is read from beside the wheel where the listing says its hash (PEP 658), else by ranges from the
        wheel. NetworkError where the server fails.
        """
        if file.metadata_sha256 is not None:
            path, mark, query = file.url.partition("?")
            answer = self._request(
                *("GET", f"{path}.metadata{mark}{query}", file.filename),
                bearing=_MISSING,
                most=METADATA_BYTES,
            )
            if hashlib.sha256(answer.body).hexdigest() == file.metadata_sha256:
                return answer.body
        return None if file.size is None else read_metadata(partial(self._range, file), file.size)

    def _range(self, file: IndexFile, start: int, end: int) -> bytes | None:
        answer = self._request(
            *("GET", file.url, file.filename),
            # identity: a range of compressed bytes would be of no use.
            headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
            bearing=_MISSING | _RANGELESS,
            most=end - start,
        )
        given = answer.headers.get("Content-Range", "").partition("/")[0]
        return answer.body if answer.status == 206 and given == f"bytes {start}-{end - 1}" else None

    def _check(self, offer: IndexFile, file: LockedFile) -> None:
        for what, expected, got in (("sha256", file.sha256, offer.sha256), ("size", file.size, offer.size)):
            if got is not None and got != expected:
                raise IntegrityError(
                    f"The index {self.name} announces another {file.filename} than the lock names.",
                    remedy="Find out why; if the new file is wanted: envbuilder lock RECIPE",
                    context={
                        "index": self.name,
                        "file": file.filename,
                        "expected": f"{what} {expected}",
                        "got": f"{what} {got}",
                    },
                )

    def _answer(self, name: str) -> tuple[IndexFile, ...] | int:
        """The files of package `name`, or the status that says that there are none."""
        if name not in self._answers:
            self._answers[name] = self._ask(name)
        return self._answers[name]

    def _ask(self, name: str) -> tuple[IndexFile, ...] | int:
        answer = self._request("GET", f"{self.url}{name}/", name, bearing=_MISSING)
        if answer.status in _MISSING:
            return answer.status
        try:
            files = parse_page(answer.text, answer.url, is_json=answer.is_json)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NetworkError(
                f"The index {self.name} gave an answer about {name} that is no package index's.",
                remedy=f"Check the URL of the index {self.name}: {self._setting}",
                context={"index": self.name, "error": error},
            ) from error
        return with_credentials(files, self.url)

    def _request(
        self,
        method: str,
        url: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        bearing: frozenset[int] = frozenset(),
        most: int = PAGE_BYTES,
    ) -> Answer:
        try:
            return ask(
                self._client,
                *(method, url),
                retries=self._retries,
                headers=headers,
                bearing=bearing,
                most=most,
            )
        except Unanswered as error:
            raise self._failure(url, what, str(error)) from error

    def _failure(self, url: str, what: str, reason: str) -> NetworkError:
        return NetworkError(
            f"The index {self.name} doesn't give {what}: {reason}.",
            remedy=f"Check that the index is reachable and has {what}; another one: {self._setting}",
            context={"index": self.name, "url": shown(url)},
        )


def _same(offer: IndexFile, file: LockedFile) -> Offer | None:
    """`offer`, unless it says, or a look at it shows, that its bytes are other ones."""
    if offer.sha256 not in (None, file.sha256) or offer.size not in (None, file.size):
        return None
    if not offer.url.startswith("file:"):
        return Offer(offer.url)
    try:
        path = Path(unquote(urlsplit(offer.url).path))
        same = path.stat().st_size == file.size and hash_file(path) == file.sha256
    except (OSError, ValueError):
        return None
    remedy = f"Delete {path}, or take its folder out of pip's find-links: pip config list"
    return Offer(offer.url, path, remedy) if same else None


def variable(name: str) -> str:
    """The environment variable that says the URL of the index `name`."""
    return f"ENVBUILDER_INDEX_{name.upper().replace('-', '_')}_URL"
