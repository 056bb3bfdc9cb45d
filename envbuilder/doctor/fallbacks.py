"""Which kernels transformers has chosen for a model's code, and why it has not chosen the others.

A standalone script: standard library and the env's own packages, run by the environment's own interpreter as
`python fallbacks.py --config FILE` (a training config) or `--model-type nemotron_h`. transformers takes a
compiled kernel where its package can be imported, and swallows the error where it can't; here the import is
tried again, so that the error shows. It prints one line of JSON:
`{"model_type", "device", "problem", "is_native", "kernels": [{"name", "package", "used"}], "installed",
"errors"}`. `is_native` is false where transformers has no code of its own for the model.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

# As `train` sets them: kernels come from the env and not from a hub.
os.environ.update(USE_HUB_KERNELS="0", HF_HUB_OFFLINE="1")
SLOW = "torch's slow path"
_DEEP_ENOUGH = 4


def read_config(path: Path) -> tuple[str, str]:
    """The model's type and the device that a training config names."""
    yaml = importlib.import_module("yaml")  # transformers needs it: it is where transformers is
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = config["model"]
    if folder := model.get("pretrained_model_name_or_path"):
        model = {"config": json.loads((path.parent / folder / "config.json").read_text(encoding="utf-8"))}
    return model["config"]["model_type"], str(config.get("device", "cuda"))


def model_code(model_type: str) -> ModuleType:
    """transformers' module with the model's layers."""
    name = importlib.import_module("transformers.models.auto.configuration_auto").model_type_to_module_name(
        model_type
    )
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def chosen_kernels(code: ModuleType) -> list[dict[str, str]]:
    """One entry for each function of `code` that may be a compiled kernel."""
    found = [choice for function in vars(code).values() if (choice := _choice(function))]
    if not found:  # older releases: whole packages, loaded when a layer is made
        hub = importlib.import_module("transformers.integrations.hub_kernels")
        loaded = re.findall(r"lazy_load_kernel\(\s*\"([\w-]+)\"", inspect.getsource(code))
        for kernel in dict.fromkeys(loaded):
            used = SLOW if hub.lazy_load_kernel(kernel) is None else "compiled"
            package = kernel.replace("-", "_")
            found.append({"name": "all", "package": package, "used": used, "module": package})
    return found


def _choice(function: object, depth: int = 0) -> dict[str, str] | None:
    """What `use_kernel_func_from_hub_with_fallback` chose for `function`: it keeps that in closures."""
    if not isinstance(function, FunctionType) or depth > _DEEP_ENOUGH:
        return None
    held = inspect.getclosurevars(function).nonlocals
    if {"implementation", "is_new_implementation", "package", "func_name"} <= held.keys():
        used = held["implementation"]
        where = f"{used.__module__}.{used.__qualname__}" if held["is_new_implementation"] else SLOW
        module = _module_of(held)
        return {"name": held["func_name"], "package": held["package"], "used": where, "module": module}
    inner = [*held.values(), getattr(function, "__wrapped__", None)]
    return next((choice for value in inner if (choice := _choice(value, depth + 1))), None)


def _module_of(held: Mapping[str, Any]) -> str:
    """Where transformers looks for the kernel, below its package."""
    hub = importlib.import_module("transformers.integrations.hub_kernels")
    paths: dict[str, str] = getattr(hub, "_KERNELS_INTERNAL_PATH_MAPPINGS", {})
    inner = paths.get(held["func_name"])
    return f"{held['package']}.{inner}" if inner else str(held["package"])


def import_error(module: str) -> str | None:
    """None, or why `module` can't be imported: the first error of the chain, and where it was raised."""
    try:
        importlib.import_module(module)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        frames = traceback.extract_tb(cause.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return f"{type(cause).__name__}: {cause}{where}"
    return None


def report(model_type: str, device: str) -> dict[str, Any]:
    """What is to be printed."""
    try:
        kernels = chosen_kernels(model_code(model_type))
    except ModuleNotFoundError as error:
        is_native = not (error.name or "").startswith("transformers.models.")
        return {**_nothing(model_type, device, f"{type(error).__name__}: {error}"), "is_native": is_native}
    except Exception as error:
        return _nothing(model_type, device, f"{type(error).__name__}: {error}")
    packages = dict.fromkeys(kernel["package"] for kernel in kernels)
    installed = {package: importlib.util.find_spec(package) is not None for package in packages}
    slow = [kernel for kernel in kernels if kernel["used"] == SLOW]
    errors = {kernel["package"]: _why_slow(kernel) for kernel in slow}
    found = {"kernels": kernels, "installed": installed, "errors": errors}
    return {**_nothing(model_type, device, None), **found}


def _nothing(model_type: str | None, device: str, problem: str | None) -> dict[str, Any]:
    empty: dict[str, Any] = {"kernels": [], "installed": {}, "errors": {}}
    return {"model_type": model_type, "device": device, "problem": problem, "is_native": True, **empty}


def _why_slow(kernel: dict[str, str]) -> str:
    tries = (import_error(kernel["package"]), import_error(kernel["module"]))
    return next(filter(None, tries), f"{kernel['module']} has no {kernel['name']} that transformers can use")


def main() -> None:
    """Reads the arguments and prints."""
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path)
    source.add_argument("--model-type")
    options = parser.parse_args()
    try:
        model_type, device = (
            read_config(options.config) if options.config else (options.model_type, "unknown")
        )
    except Exception as error:
        problem = f"{options.config}: {type(error).__name__}: {error}"
        found = _nothing(None, "unknown", problem)
    else:
        found = report(model_type, device)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
