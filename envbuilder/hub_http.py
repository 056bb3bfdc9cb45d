"""Requests to a model hub: its URL and token as huggingface_hub has them, and why it refuses.

huggingface_hub's own client makes no request. It knows neither pip's certificates nor pip's proxy, which lead
out of a cluster, and it takes what a hub answers unchecked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from urllib.parse import quote

import httpx
from huggingface_hub import constants

from envbuilder.errors import InputError, NetworkError
from envbuilder.index import open_client
from envbuilder.index.asking import Unanswered, ask
from envbuilder.urls import shown

_RETRIES = 3
_EXPORT_TOKEN = "export HF_TOKEN=…"


class HubHttp:
    """A hub's URLs, and small answers from it; `open_hub_http` makes one."""

    def __init__(self, endpoint: str, client: httpx.Client) -> None:
        self.client = client
        """It carries the token, to this hub's own host only."""
        self._endpoint = endpoint

    def api_url(self, repo: str, revision: str | None) -> str:
        """Where the API tells of a commit, by default of the newest, with its files' sizes and hashes."""
        at = f"/revision/{revision}" if revision else ""
        return f"{self._endpoint}/api/models/{quote(repo)}{at}?blobs=true"

    def file_url(self, repo: str, commit: str, filename: str) -> str:
        """Where a file of a commit is."""
        # Half a second to import: not for the commands that touch no model.
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repo, filename, revision=commit, endpoint=self._endpoint)

    def get(self, url: str, repo: str, what: str, limit: int) -> bytes:
        """The body at `url`, `what` of `repo`, if that has at most `limit` bytes; else NetworkError."""
        try:
            return ask(self.client, "GET", url, retries=_RETRIES, headers={"Accept": "*/*"}, most=limit).body
        except Unanswered as error:
            if error.refusal is not None:
                raise self._refusal(error.refusal, repo, what) from error
            raise NetworkError(
                f"The hub doesn't give {what} of {repo}: {str(error).rstrip('.')}.",
                remedy="Check the network and the proxy (pip config list), then run the same command again; "
                "for another hub: export HF_ENDPOINT=URL",
                context={"url": shown(url)},
            ) from error

    def _refusal(self, response: httpx.Response, repo: str, what: str) -> NetworkError:
        """Why the hub refuses. It doesn't even tell strangers that a private repository exists."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if _origin(response.url) != _origin(httpx.URL(self._endpoint)):
            why = f"{response.url.host}, where the hub keeps {what} of {repo}, answers {status}"
            remedy = (
                "Run the same command again; if it stays so, check that the network lets that host through."
            )
        elif code == "GatedRepo" or (status == 403 and "X-Error-Message" in response.headers):
            why = f"The hub gives {repo} only to accounts that its owners let in"
            remedy = (
                f"Accept its terms at {shown(self._endpoint)}/{repo}, then with your token: {_EXPORT_TOKEN}"
            )
        elif status == 401 and "authorization" in response.request.headers:
            why = f"The hub doesn't accept the token that was sent for {repo}"
            remedy = f"Give one that may read it: {_EXPORT_TOKEN}"
        elif status == 401:
            why = f"The hub doesn't show {repo} to strangers: it is private, or there is none of this name"
            remedy = f"Check the model's `repo` in the recipe; if it is right: {_EXPORT_TOKEN}"
        elif status == 404 and code == "RevisionNotFound":
            why = f"The hub has {repo}, but not the commit that is asked for"
            remedy = "Correct the model's `revision` in the recipe, or leave it out for the newest commit."
        elif status == 404 and code != "EntryNotFound":
            why = f"The hub has no model {repo}, or doesn't show it to this account"
            remedy = f"Check the model's `repo` in the recipe; if it is right: {_EXPORT_TOKEN}"
        else:
            why = f"The hub doesn't give {what} of {repo}: status {status}"
            remedy = "Check that this is the URL of a model hub: echo $HF_ENDPOINT"
        return NetworkError(
            f"{why}.", remedy=remedy, context={"url": shown(str(response.url)), "status": status}
        )


@contextmanager
def open_hub_http() -> Iterator[HubHttp]:
    """The hub of huggingface_hub's settings at this moment; InputError where they can't be used."""
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        usable = httpx.URL(endpoint).scheme in ("http", "https") and bool(httpx.URL(endpoint).host)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise InputError(
            "HF_ENDPOINT must be the http or https URL of a model hub.", remedy="export HF_ENDPOINT=URL"
        )
    token = _token()
    with open_client() as client:
        if token:
            client.auth = _TokenAuth(httpx.URL(endpoint), token)
        yield HubHttp(endpoint, client)


class _TokenAuth(httpx.Auth):
    """The token, for the hub itself only; httpx takes it off where a redirect leads to another origin."""

    def __init__(self, endpoint: httpx.URL, token: str) -> None:
        self._origin, self._token = _origin(endpoint), token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if _origin(request.url) == self._origin:
            request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _token() -> str | None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OIDCError

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        token = get_token() or ""
    except (OSError, ValueError, HfHubHTTPError, OIDCError) as error:
        raise InputError(
            f"The hub's token can't be read: {str(error).rstrip('.')}.", remedy=_EXPORT_TOKEN
        ) from error
    # An HTTP library that refuses a header shows it in its error, and so would show the token.
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError("The hub's token has characters that no token has.", remedy=_EXPORT_TOKEN)
    return token or None


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
