"""Environment modules, of Environment Modules or Lmod: what those of a shell have put into it, and again.

A build takes its compilers from the modules of its job, and what it made needs their libraries at run time.
So the build's receipt records what they added, and whatever starts the env's processes adds it again, in a
shell in which they were never loaded: `module` itself is not called there, which gives other versions of a
name in another year. What is recorded is told by the module system: each module is unloaded in a child
process, the last one first, and what is gone then was the module's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from envbuilder.errors import MismatchError
from envbuilder.model import LoadedModule
from envbuilder.process import run
from envbuilder.sandbox import without_cuda_runtime

LOADED_VARIABLE = "LOADEDMODULES"
"""The names of the modules that are loaded, in the order in which they were, with a colon between them."""
_PROGRAMS = ("LMOD_CMD", "MODULES_CMD")
"""Variables that name the program behind the shell's function `module`."""
_FOLDERS = (
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
)
"""Variables that are lists of folders."""
_COMPILERS = ("CC", "CXX", "FC", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "NVHPC_CUDA_HOME", "GCC_HOME")
_NETWORK = ("NCCL_", "FI_", "UCX_", "OFI_NCCL_")
"""What the variables of network plugins' modules begin with."""
_TIMEOUT_S = 60.0
"""For all modules together; on a slow disk each takes a second."""
_UNLOAD = """\
command=$1; shift
exec 3>&1 >/dev/null 2>&1
tell() { env -0 >&3; printf '\\1\\0' >&3; }
tell
for name; do
    eval "$("$command" bash --force unload "$name")"
    tell
done
"""
"""Prints the variables before, and after each of the modules is unloaded.

A modulefile may print a farewell, as Lmod does of modules that lose the one they depend on: none of it may
come between the variables. Without --force, a sticky module of Lmod's stays.
"""


def loaded_modules(environ: Mapping[str, str]) -> tuple[LoadedModule, ...]:
    """The modules that are loaded in a shell with the variables `environ`, in their order.

    Of what they put there: folders that exist, and the variables of compilers and networks. Nothing else is
    kept, for a module may well set a licence or a token. What one brought along (Lmod's `depends_on`), and
    takes away with it, counts as its own. Where the module system can't be asked, or doesn't unload one, that
    one has its name alone.
    """
    names = [name for name in environ.get(LOADED_VARIABLE, "").split(":") if name]
    program = next((environ[variable] for variable in _PROGRAMS if environ.get(variable)), None)
    if not names or program is None:
        return tuple(LoadedModule(name=name) for name in names)
    backwards = names[::-1]
    states = _unloaded_one_by_one(program, backwards, environ)
    added = {name: _added(name, before, after) for name, before, after in zip(backwards, states, states[1:])}
    return tuple(added.get(name, LoadedModule(name=name)) for name in names)


def _unloaded_one_by_one(
    program: str, names: Sequence[str], environ: Mapping[str, str]
) -> list[dict[str, str]]:
    """The variables before and after each step; fewer where it takes too long."""
    # What BASH_ENV names would load modules again.
    env = {name: value for name, value in environ.items() if name != "BASH_ENV"}
    command = ["bash", "--noprofile", "--norc", "-c", _UNLOAD, "bash", program, *names]
    told = run(command, env=env, timeout_s=_TIMEOUT_S).output
    states = (text.split("\0") for text in told.split("\1\0")[:-1])
    return [dict(entry.split("=", 1) for entry in state if "=" in entry) for state in states]


def _added(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> LoadedModule:
    """What `name` had added, by the variables before and after it was unloaded."""
    if name in after.get(LOADED_VARIABLE, "").split(":"):
        return LoadedModule(name=name)
    folders = {
        variable: tuple(
            folder
            for folder in _entries(before, variable)
            if folder not in _entries(after, variable) and Path(folder).is_dir()
        )
        for variable in _FOLDERS
    }
    variables = {
        variable: value
        for variable, value in sorted(before.items())
        if (variable in _COMPILERS or variable.startswith(_NETWORK)) and after.get(variable) != value
    }
    return LoadedModule(
        name=name,
        folders={variable: paths for variable, paths in folders.items() if paths},
        variables=variables,
    )


def _entries(environ: Mapping[str, str], variable: str) -> list[str]:
    return list(dict.fromkeys(filter(None, environ.get(variable, "").split(os.pathsep))))


def merged(builds: Iterable[Iterable[LoadedModule]]) -> tuple[LoadedModule, ...]:
    """The modules of several builds, each once; those of a later one count as loaded later."""
    found: dict[str, LoadedModule] = {}
    for modules in builds:
        for module in modules:
            found.pop(module.name, None)
            found[module.name] = module
    return tuple(found.values())


def load_again(
    environ: Mapping[str, str], modules: Iterable[LoadedModule], *, keep_cuda_libraries: bool
) -> dict[str, str]:
    """`environ` with what `modules` had added.

    Their folders come first, those of the last module before all others; a variable is set only where
    `environ` has none, so that what a user sets for one command counts. Of LD_LIBRARY_PATH, folders with a
    CUDA runtime are left out unless `keep_cuda_libraries`: they would shadow the libraries that torch's
    wheels bring.
    """
    loaded = dict(environ)
    for module in modules:
        for variable, folders in module.folders.items():
            added = os.pathsep.join(folders)
            if variable == "LD_LIBRARY_PATH" and not keep_cuda_libraries:
                added = without_cuda_runtime(added)
            words = dict.fromkeys((*filter(None, added.split(os.pathsep)), *_entries(loaded, variable)))
            if words:
                loaded[variable] = os.pathsep.join(words)
        for variable, value in module.variables.items():
            if environ.get(variable) is None:
                loaded[variable] = value
    return loaded


def gone(modules: Iterable[LoadedModule]) -> Iterator[tuple[LoadedModule, str]]:
    """The folders that are no more, each with its module."""
    for module in modules:
        for folder in dict.fromkeys(folder for folders in module.folders.values() for folder in folders):
            if not Path(folder).is_dir():
                yield module, folder


def check_there(modules: Iterable[LoadedModule], recipe_file: str) -> None:
    """Raises MismatchError where a folder of `modules` is gone from this machine."""
    missing = list(gone(modules))
    if missing:
        module, folder = missing[0]
        raise MismatchError(
            f"The env was compiled with the module {module.name}, whose folder {folder} is not here.",
            remedy=again_without(module, recipe_file),
            context={"gone": ", ".join(path for _, path in missing)},
        )


def again_without(module: LoadedModule, recipe_file: str) -> str:
    """What mends an env whose `module` is no more where it was: in words and commands."""
    name = module.name.partition("/")[0]
    return (
        f"See whether it is there by another name or version: module load {module.name}; module avail {name} "
        f"(Lmod: module spider {name}). Then compile with what there is: envbuilder compile {recipe_file} "
        f"--local --rebuild && envbuilder install {recipe_file}"
    )
