"""How another process runs this very envbuilder, whether it is installed or unpacked from the one file."""

from __future__ import annotations

import sys
from pathlib import Path

import envbuilder

HOME = Path(envbuilder.__file__).resolve().parent.parent
"""Where `import envbuilder` finds it; unpacked from the one file, where all that it needs is too."""


def own_command(*words: str) -> tuple[str, ...]:
    """The command line `envbuilder WORD…`, for any node that has the same disks."""
    if (HOME / "__main__.py").is_file():  # the one file's
        return (sys.executable, str(HOME), *words)
    # What lies in the folder that it is started in must not be imported.
    safe_path = ("-P",) if sys.version_info >= (3, 11) else ()
    return (sys.executable, *safe_path, "-m", "envbuilder", *words)
