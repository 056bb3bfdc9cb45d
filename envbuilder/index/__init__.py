"""Package indexes by their names: what they have, with hash and size, and how they are reached."""

from __future__ import annotations

from envbuilder.index.client import open_client
from envbuilder.index.license import license_of
from envbuilder.index.names import DEFAULT_INDEX, index_url, open_indexes
from envbuilder.index.page import IndexFile
from envbuilder.index.simple import Index, Offer

__all__ = [
    "DEFAULT_INDEX",
    "Index",
    "IndexFile",
    "Offer",
    "index_url",
    "license_of",
    "open_client",
    "open_indexes",
]
