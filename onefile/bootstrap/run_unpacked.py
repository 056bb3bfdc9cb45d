"""Runs the tool from the folder that the one file was unpacked into, where it is `__main__.py`."""

import sys
from pathlib import Path

sys.argv[0] = "envbuilder"
# Python 3.9 doesn't know their names. Of its modules, Debian and Ubuntu have one in a package of its own.
STANDARD_LIBRARY = getattr(sys, "stdlib_module_names", ("distutils",))
try:
    from envbuilder.cli import main
except ImportError as error:
    if (error.name or "").partition(".")[0] in STANDARD_LIBRARY:
        fault = f"{sys.executable} lacks a part of Python's standard library"
        remedy = (
            "take another Python (module avail python); on Debian 11 and Ubuntu 20.04: "
            "apt install python3-distutils"
        )
    else:
        folder = Path(__file__).parent
        fault = f"{folder} is not whole, or of another Python"
        remedy = f"rm -rf {folder}; the one file unpacks it again"
    print(f"{fault}: {error}.\n  remedy: {remedy}", file=sys.stderr)
    sys.exit(7)
main()
