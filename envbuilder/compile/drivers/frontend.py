"""Builds a wheel of the source tree SOURCE into the folder OUT, inside the sandbox (PEP 517's frontend).

Standalone: `python -I frontend.py LIBRARY SOURCE OUT`, by the build environment's interpreter, where LIBRARY
is a folder with `pyproject_hooks` alone. It runs in the sandbox, so that no path of the outside gets in.
"""

import sys
import tomllib
from pathlib import Path


def main(library: str, source: str, out: str) -> int:
    sys.path.insert(0, library)  # for this process; the backend runs in one of its own
    from pyproject_hooks import BackendUnavailable, BuildBackendHookCaller, UnsupportedOperation

    pyproject = Path(source, "pyproject.toml")
    try:
        table = tomllib.loads(pyproject.read_text(encoding="utf-8")) if pyproject.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        print(f"envbuilder: pyproject.toml can't be read: {error}", file=sys.stderr)
        return 1
    # PEP 517 and PEP 518: without a backend, setuptools as it was before them.
    system = table.get("build-system", {})
    backend = system.get("build-backend", "setuptools.build_meta:__legacy__")
    caller = BuildBackendHookCaller(
        source, backend, backend_path=system.get("backend-path"), python_executable=sys.executable
    )
    try:
        name = caller.build_wheel(out)
    except BackendUnavailable as error:
        print(f"envbuilder: the build backend {backend} can't be imported: {error}", file=sys.stderr)
        print(error.traceback, file=sys.stderr)
        return 1
    except UnsupportedOperation as error:
        print(f"envbuilder: the build backend {backend} makes no wheels: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # the hook's process has printed its own traceback
        print(f"envbuilder: the build backend {backend} failed: {error}", file=sys.stderr)
        return 1
    Path(out, "built").write_text(name, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
