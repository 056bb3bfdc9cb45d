"""`python -m trainer.inspection CONFIG.yaml [--set section.key=value …]`: what training would meet.

Prints one JSON object, each of whose parts has either facts or an `error` (message, remedy, context).
`--paths` names the config's files and looks at none. `--files` looks at the config, the weight files and the
lines of data only: no torch, so quickly. Without either: tokenizer, chat template, token counts, the model's
layers and the memory that they need. Nothing is trained or written, no weight is read, no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.__main__ import OFFLINE
from trainer.config import Config, DatasetSection
from trainer.conversations import Scan, scan
from trainer.errors import TrainerError
from trainer.reading import read_config
from trainer.weights import inspect_weights

Facts = dict[str, Any]
READING_S = 60.0
"""For looking at lines; what is left of a larger file is not looked at, and that is said."""


def main() -> int:
    """Inspects what the command line names; always 0, the findings are in the output."""
    parser = argparse.ArgumentParser(prog="trainer.inspection", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--paths", action="store_true", help="the config's own facts only: quickest")
    parser.add_argument("--processes", type=int, default=1, help="that will train")
    arguments = parser.parse_args()
    found = inspect(
        arguments.config,
        arguments.overrides,
        files=arguments.files,
        paths=arguments.paths,
        processes=arguments.processes,
    )
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    return 0


def inspect(
    file: Path, overrides: list[str], *, files: bool, paths: bool = False, processes: int = 1
) -> Facts:
    """What is found; parts that come after a part with an error, and need it, are left out."""
    try:
        config = read_config(file, overrides)
    except TrainerError as problem:
        return {"config": {"error": problem.described()}}
    described = {
        "device": config.device,
        "model": str(config.model.pretrained_model_name_or_path or ""),
        "data": _path(config.dataset),
        "validation_data": _path(config.validation_dataset),
        "dtype": config.model.dtype,
        "seq_length": config.dataset.seq_length,
        "overlong": config.dataset.overlong,
        "checkpoints": config.checkpoint.enabled,
        "notes": config.notes(),
    }
    if paths:
        return {"config": described}
    if files:
        return {"config": described, **_files(config)}
    os.environ.update(OFFLINE)
    warnings.simplefilter("ignore")
    # torch takes seconds to import.
    from trainer.model_inspection import inspect_model

    return {"config": described, **inspect_model(config, processes)}


def _path(section: DatasetSection | None) -> str | None:
    file = section.path_or_dataset_id if section else None
    return None if file is None else str(file)


def _files(config: Config) -> Facts:
    found: Facts = {}
    if config.model.pretrained_model_name_or_path is not None:
        found["weights"] = inspect_weights(config.model.pretrained_model_name_or_path)
    deadline = time.monotonic() + READING_S
    digests: dict[bytes, int] = {}
    if config.validation_dataset is not None and config.validation_dataset.kind == "chat":
        seen = _scan(config.validation_dataset, lambda file: scan(file, deadline=deadline, keep_digests=True))
        found["validation_data"] = seen.facts() if isinstance(seen, Scan) else seen
        digests = seen.digests if isinstance(seen, Scan) else {}
    if config.dataset.kind == "chat":
        seen = _scan(config.dataset, lambda file: scan(file, deadline=deadline, others=digests))
        found["data"] = seen.facts() if isinstance(seen, Scan) else seen
    return found


def _scan(section: DatasetSection, look: Callable[[Path], Scan]) -> Scan | Facts:
    file = section.path_or_dataset_id
    assert file is not None
    try:
        return look(file)
    except OSError as problem:
        return {"file": str(file), "unreadable": problem.strerror}


if __name__ == "__main__":
    sys.exit(main())
