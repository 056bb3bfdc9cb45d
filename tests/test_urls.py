from __future__ import annotations

import pytest

from envbuilder.urls import shown


@pytest.mark.parametrize(
    ("url", "fit"),
    [
        ("https://127.0.0.1:8080/simple/", "https://127.0.0.1:8080/simple/"),
        ("https://user:secret@127.0.0.1/simple", "https://127.0.0.1/simple"),
        ("https://user:sec/r@t?@127.0.0.1/simple", "https://127.0.0.1/simple"),
        ("http://user:secret@host:port/simple", "http://host:port/simple"),
        ("https://127.0.0.1/file?signature=secret#part", "https://127.0.0.1/file"),
    ],
)
def test_neither_credentials_nor_signatures_are_shown(url: str, fit: str) -> None:
    assert shown(url) == fit
