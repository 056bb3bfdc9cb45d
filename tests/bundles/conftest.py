from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.model import Bundle
from envbuilder.paths import Root
from tests.bundles.samples import Sample


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return Sample(Root(tmp_path / "root"))


@pytest.fixture
def bundle(sample: Sample) -> Bundle:
    return sample.make()
