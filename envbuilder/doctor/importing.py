"""Imports modules and says which ones failed.

A standalone script: standard library alone, run by the environment's own interpreter as
`python importing.py torch causal_conv1d_cuda …`. The order counts: extension modules that are linked against
torch find its libraries only once torch is loaded. It prints one line of JSON, module → error or null.
"""

from __future__ import annotations

import importlib
import json
import sys


def try_import(module: str) -> str | None:
    """None, or why `module` can't be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps({module: try_import(module) for module in sys.argv[1:]}) + "\n")
