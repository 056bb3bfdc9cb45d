"""pip and uv as users run them, without any index or configuration but what a test gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

_PIP = [sys.executable, "-m", "pip", "--isolated", "--no-cache-dir", "--disable-pip-version-check", "install"]


def install(
    installer: str, folder: Path, *wanted: str | Path, index: str | None = None, no_deps: bool = True
) -> str:
    """Installs `wanted` into the new `folder` and returns what the installer said. It must end well."""
    source = ["--index-url", index] if index else ["--no-index"]
    command: list[str | Path]
    if installer == "pip":
        command = [*_PIP, *source]
    else:
        command = [find_uv_bin(), "--no-config", "--no-cache", "pip", "install", "--python", sys.executable]
        command += [*source, *([] if index and index.startswith("http") else ["--offline"])]
    command += [*(["--no-deps"] if no_deps else []), "--target", folder, *wanted]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
