"""One request of an index, or of a model hub: tried again where that may help, its answer bounded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

PAGE_BYTES = 512 << 20
"""Most bytes of a page."""
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_FIRST_PAUSE = 0.2
"""Seconds to wait before the second try; before each further one, twice as long as before the last."""
_LONGEST_PAUSE = 60.0
"""Seconds that are waited at most, whatever Retry-After says."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class Unanswered(Exception):
    """No use in trying again; says why."""

    def __init__(self, reason: str, refusal: httpx.Response | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal
        """The response, unread, where the server says no and isn't merely busy."""


@dataclass(frozen=True)
class Answer:
    """A response that has been read."""

    status: int
    headers: httpx.Headers
    url: str
    """After redirects."""
    body: bytes

    @property
    def is_json(self) -> bool:
        """Whether it says that it is JSON of some kind."""
        kind: str = self.headers.get("Content-Type", "")
        return kind.partition(";")[0].strip().endswith("+json")

    @property
    def text(self) -> str:
        """The body; what isn't UTF-8 in it is replaced."""
        return self.body.decode(errors="replace")


def ask(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    retries: int,
    headers: Mapping[str, str] | None = None,
    bearing: frozenset[int] = frozenset(),
    most: int = PAGE_BYTES,
) -> Answer:
    """The answer, if it is a success of at most `most` bytes; one with a status of `bearing` comes back too,
    unread. Where the server is busy or can't be reached, `retries` further tries are made.

    Raises Unanswered.
    """
    for left in range(retries, -1, -1):
        pause = _FIRST_PAUSE * 2 ** (retries - left)
        try:
            with client.stream(method, url, headers={"Accept": _ACCEPT} | dict(headers or {})) as response:
                status = response.status_code
                if response.is_success or status in bearing:
                    body = b"" if status in bearing else _body(response, most)
                    return Answer(status, response.headers, str(response.url), body)
            reason, again = f"status {status}", status in _BUSY
            refusal = None if again else response
            asked = response.headers.get("Retry-After", "")
            pause = float(asked) if asked.isdecimal() else pause
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            again, refusal = isinstance(error, httpx.TransportError), None
        if not again:
            break
        if left:
            time.sleep(min(pause, _LONGEST_PAUSE))
    raise Unanswered(reason, refusal)


def _body(response: httpx.Response, most: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most:
            raise Unanswered(f"it sends more than {most:,} bytes")
    return bytes(body)
