"""URLs as they may be shown. Pure."""

from __future__ import annotations

import re


def shown(url: str) -> str:
    """`url` without its credentials and query, which may be a signature.

    It need not be a valid one, so all before its last @ is taken for a secret.
    """
    return re.split(r"[?#]", re.sub(r"//\S*@", "//", url))[0]
