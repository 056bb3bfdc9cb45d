"""Imports the module that was compiled from extension.cu, and calls it.

A standalone script: standard library and torch alone, run by the env's own interpreter as
`python extension_run.py FOLDER [torch]`, where FOLDER holds the module, and `torch` says that it is linked
against torch. Prints one line of JSON: `problem` (null where there is none) and `gpu`, whether it ran on one.
"""

from __future__ import annotations

import importlib
import json
import sys


def run(folder: str, modules: list[str]) -> dict[str, object]:
    """What came of importing `modules`, then the extension in `folder`, and of its two functions."""
    on_gpu = None
    try:
        for module in modules:
            importlib.import_module(module)
        sys.path.insert(0, folder)
        extension = importlib.import_module("extension")
        got, on_gpu = extension.doubled(21.0), extension.doubled_on_gpu(21.0)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}", "gpu": False}
    wrong = [value for value in (got, on_gpu) if value not in (42.0, None)]
    return {"problem": f"twice 21 came out as {wrong[0]}" if wrong else None, "gpu": on_gpu is not None}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], sys.argv[2:])) + "\n")
