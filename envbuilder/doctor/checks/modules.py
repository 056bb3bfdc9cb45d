"""The environment modules that the env was compiled with."""

from __future__ import annotations

import os

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.subject import Subject
from envbuilder.model import LoadedModule
from envbuilder.modules import LOADED_VARIABLE, again_without, gone
from envbuilder.report import Reporter


def check_modules(subject: Subject, reporter: Reporter) -> Outcome:
    """What the modules of the env's builds had added, against this machine and what is loaded here."""
    modules = subject.receipt.modules
    if not modules:
        return skipped("The env was compiled without environment modules, or not compiled at all.")
    here = [name for name in os.environ.get(LOADED_VARIABLE, "").split(":") if name]
    evidence = [*map(_described, modules), f"loaded in this shell: {', '.join(here) or 'none'}"]
    if missing := list(gone(modules)):
        module, folder = missing[0]
        # A login node may well lack what is on the compute nodes' own disks.
        return (failed if subject.gpus.devices else warning)(
            f"The env was compiled with the module {module.name}, whose folder {folder} is not here.",
            *(f"{each.name}: {path} is gone" for each, path in missing),
            *shown(evidence),
            remedy=again_without(module, subject.recipe_file),
        )
    if others := [(module, name) for module in modules for name in here if _is_other(module, name)]:
        module, name = others[0]
        return warning(
            f"{name} is loaded here, and the env was compiled with {module.name}, whose folders come first "
            "when it trains.",
            *shown(evidence),
            remedy=f"module swap {name} {module.name}; or compile with what there is: {subject.rebuild}",
        )
    return ok("What the modules of the env's builds had added is here, and added again.", *shown(evidence))


def _described(module: LoadedModule) -> str:
    added = [f"{variable}: {', '.join(folders)}" for variable, folders in module.folders.items()]
    added += [f"{variable}={value}" for variable, value in module.variables.items()]
    return f"{module.name}: {'; '.join(added) or 'it added nothing, or what it did is not known'}"


def _is_other(module: LoadedModule, name: str) -> bool:
    """Whether `name` is another version of `module`: the same but for what follows the last slash."""
    return name != module.name and name.rpartition("/")[0] == module.name.rpartition("/")[0] != ""


CHECKS = (
    Check(
        "env.modules",
        "modules of the builds",
        "whether the folders of the modules that the env was compiled with are still here, and whether other "
        "versions of them are loaded",
        check_modules,
        needs=("recipe", "env"),
    ),
)
