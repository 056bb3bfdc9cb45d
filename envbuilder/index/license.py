"""The licence of a wheel that stays on its server."""

from __future__ import annotations

from envbuilder.index.page import IndexFile
from envbuilder.index.simple import Index
from envbuilder.licenses import stated_license


def license_of(index: Index, file: IndexFile) -> str | None:
    """The licence of the wheel `file`, which is not downloaded; None where its metadata names none, or can't
    be read. NetworkError where the index fails."""
    metadata = index.metadata(file)
    return None if metadata is None else stated_license(metadata)
