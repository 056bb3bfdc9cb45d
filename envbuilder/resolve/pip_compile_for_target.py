"""A program of its own: pip-compile for another Python than the one that runs it.

    python pip_compile_for_target.py MARKERS.json [pip-compile's arguments]

pip takes --python-version and --platform for choosing wheels only, and evaluates markers for the interpreter
that it runs on; pip-compile hands pip neither. Here both are set before pip-compile starts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(markers: Path, arguments: list[str]) -> None:
    """Runs pip-compile with the marker environment in the JSON file `markers`."""
    from pip._internal.cli.cmdoptions import make_target_python
    from pip._internal.cli.req_command import RequirementCommand
    from pip._internal.index.package_finder import PackageFinder
    from pip._internal.resolution.base import BaseResolver
    from pip._vendor.packaging import markers as pip_markers
    from piptools.scripts.compile import cli

    environment = json.loads(markers.read_text(encoding="utf-8"))
    pip_markers.default_environment = lambda: dict(environment)  # type: ignore[assignment,return-value]
    build_finder, make_resolver = RequirementCommand._build_package_finder, RequirementCommand.make_resolver

    def target_finder(command: RequirementCommand, options: Any, session: Any) -> PackageFinder:
        return build_finder(command, options, session, target_python=make_target_python(options))

    def target_resolver(*, options: Any, **others: Any) -> BaseResolver:
        return make_resolver(options=options, py_version_info=options.python_version, **others)

    RequirementCommand._build_package_finder = target_finder  # type: ignore[method-assign,assignment]
    RequirementCommand.make_resolver = staticmethod(target_resolver)  # type: ignore[assignment,method-assign]
    cli(arguments, prog_name="pip-compile")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
