"""Images as ROOT keeps them, with any bytes: no squashfs tool is needed."""

from __future__ import annotations

from pathlib import Path

import envbuilder
from envbuilder.kept_images import image_name
from envbuilder.model import EnvReceipt, ImageReceipt
from envbuilder.paths import Root

ENV = EnvReceipt(
    recipe="tiny-lab",
    lock_sha256="0" * 64,
    python="3.11.7",
    compute_capabilities=(),
    packages=(),
    extensions=(),
    provided=None,
    created_at="2026-01-01T00:00:00+00:00",
)


def put_image(root: Root, sha256: str, content: bytes = b"hsqs") -> Path:
    """An image of the recipe tiny-lab, which counts from now on."""
    root.images.mkdir(parents=True, exist_ok=True)
    path = root.images / image_name("tiny-lab", sha256)
    path.write_bytes(content)
    receipt = ImageReceipt(
        file=path.name,
        sha256=sha256,
        size=len(content),
        plain_files=3,
        plain_bytes=30,
        mksquashfs="4.5.1",
        tool_version=envbuilder.__version__,
        interpreter="/bin/sh",
        env=ENV,
        created_at="2026-01-02T00:00:00+00:00",
    )
    (root.images / "tiny-lab.json").write_text(receipt.model_dump_json())
    return path
