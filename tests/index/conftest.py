"""What the tests of indexes share: a plain client, and a home without the machine's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.lab.index_server import loopback_client

_PIPS = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "CERT", "CLIENT_CERT", "PROXY", "TIMEOUT", "RETRIES")


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with loopback_client() as client:
        client.follow_redirects = True
        yield client


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without settings, and none of the machine's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for variable in ("XDG_CONFIG_HOME", "NETRC", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"):
        monkeypatch.delenv(variable, raising=False)
    for option in _PIPS:
        monkeypatch.delenv(f"PIP_{option}", raising=False)
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    return tmp_path
