"""Compiled extension modules, read as files: no GPU and no CUDA tool is needed."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from envbuilder.architectures import capability_of, runs_on, wanted_code
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.installed import Binary
from envbuilder.doctor.loading import torch_folder, torch_libraries
from envbuilder.doctor.subject import Subject
from envbuilder.fatbin import FatbinError, gpu_architectures
from envbuilder.linkage import check_linkage
from envbuilder.load_order import library_folders
from envbuilder.report import Reporter
from envbuilder.shared_object import SharedObject, SharedObjectError
from envbuilder.target import lock_for_this_machine

_NOTHING_COMPILED = "Nothing was compiled for this env."
_TORCH_GPU_CODE = ("libtorch_cuda.so", "libtorch_cuda_linalg.so")
_NEW_STRING = "__cxx11"
"""In the mangled names of what takes or gives a std::string of the newer C++ ABI (GCC 5)."""
_OLD_STRING = re.compile(r"_ZNK?Ss|_ZNK?(?:2at|3c10|5torch|6caffe2)\w*(?:(?:RK?|O)Ss|Ss$)")
"""In those of the older one: its std::string is abbreviated (Itanium C++ ABI, 5.1.10)."""
_BUILD_FOLDER = "/build"
"""What the folder of a sealed build is called; it is there in builds alone."""


def check_architectures(subject: Subject, reporter: Reporter) -> Outcome:
    """GPU code in each extension module: for what the recipe names, the GPUs here and those of the site."""
    extensions = subject.receipt.extensions
    if not extensions:
        return skipped(_NOTHING_COMPILED)
    files = subject.extension_files
    evidence, faults = [], []
    for extension in extensions:
        if extension.module not in files:
            faults.append(f"{extension.module}: {extension.file} is missing")
            continue
        try:
            code = gpu_architectures(files[extension.module])
        except FatbinError as error:
            faults.append(f"{extension.module}: {error}")
            continue
        evidence.append(f"{extension.module}: {', '.join(code) or 'no GPU code'}")
        faults += [
            f"{extension.module} has no code for compute capability {capability}"
            for capability in _wanted(subject)
            if not wanted_code(capability) & set(code)
        ]
        faults += [f"{extension.module} has {fault}" for fault in _unserved(subject, code)]
    evidence += _unknown_gpu(subject)
    if faults:
        return failed(
            "The compiled extension modules lack GPU code.",
            *faults,
            *evidence,
            remedy=f"Name the GPU in compute-capabilities of {subject.recipe_file}, then: {subject.rebuild}",
        )
    return ok(f"All extension modules have code for {_served(subject, 'the recipe')}.", *evidence)


def _wanted(subject: Subject) -> tuple[str, ...]:
    """The recipe's compute capabilities; where it goes by the GPU present, those compiled for."""
    cuda = subject.recipe.cuda if subject.recipe else None
    return subject.receipt.compute_capabilities if cuda is None or cuda.detect else cuda.compute_capabilities


def _gpus(subject: Subject) -> Iterator[tuple[str, str]]:
    """The GPUs that are here, and the one that the site's jobs ask for: words for it, compute capability."""
    for gpu in subject.gpus.devices:
        yield f"GPU {gpu.index} ({gpu.name})", gpu.compute_capability
    if subject.site and (name := subject.site.train.gpu_type) and (capability := capability_of(name)):
        yield f"the {name} of site {subject.site.name}", capability


def _unserved(subject: Subject, code: Sequence[str]) -> list[str]:
    return [
        f"no code that runs on {gpu}, compute capability {capability}"
        for gpu, capability in _gpus(subject)
        if not any(runs_on(architecture, capability) for architecture in code)
    ]


def _unknown_gpu(subject: Subject) -> list[str]:
    name = subject.site.train.gpu_type if subject.site else None
    if subject.site is None or name is None or capability_of(name):
        return []
    return [f"not compared: the compute capability of {name}, as site {subject.site.name} calls its GPUs"]


def _served(subject: Subject, *others: str) -> str:
    here = ["the GPUs here"] if subject.gpus.devices else []
    site = ["the GPUs of the site"] if any("of site" in gpu for gpu, _ in _gpus(subject)) else []
    return " and ".join([*(f"the GPUs of {other}" for other in others), *here, *site])


def check_torch_architectures(subject: Subject, reporter: Reporter) -> Outcome:
    """GPU code in torch itself: new releases drop old GPUs, and old ones don't know the new."""
    torch = torch_folder(subject.import_path)
    files = [torch / "lib" / name for name in _TORCH_GPU_CODE] if torch else []
    if not any(file.is_file() for file in files):
        return skipped("The env has no torch with GPU code.")
    if not any(_gpus(subject)):
        return skipped("There is no GPU here, and no site's (--site NAME) to compare torch's GPU code with.")
    try:
        code = sorted({name for file in files if file.is_file() for name in gpu_architectures(file)})
    except FatbinError as error:
        return failed("The GPU code in torch can't be read.", str(error), remedy=subject.remake_env)
    evidence = (f"torch: {', '.join(code)}", *_unknown_gpu(subject))
    if faults := _unserved(subject, code):
        return failed(
            "The torch of the env can't use the GPU.",
            *(f"torch has {fault}" for fault in faults),
            *evidence,
            remedy=f"Require another release of torch in {subject.recipe_file} (newer for a new GPU, older "
            f"for an old one), then: envbuilder lock {subject.recipe_file}",
        )
    return ok(f"Torch has code for {_served(subject)}.", *evidence)


def check_symbols(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether all that the extension modules leave undefined is in the libraries of this env and machine."""
    files = subject.extension_files
    if not files:
        return skipped(_NOTHING_COMPILED)
    glibc = subject.lock.target.glibc if subject.lock else subject.interpreter.glibc or "0"
    libraries = (
        *library_folders(subject.variables.get("LD_LIBRARY_PATH", "")),
        *torch_libraries(subject.import_path),
    )
    evidence, faults = [], []
    for module, file in files.items():
        try:
            linkage = check_linkage(file, libraries=libraries, glibc=glibc, interpreter=subject.python)
        except SharedObjectError as error:
            faults.append(str(error))
            continue
        evidence.append(f"{module}: {file} needs {', '.join(linkage.needed)}")
        if linkage.driver:
            evidence.append(f"{module}: not looked at, for it is not here: {', '.join(linkage.driver)}")
        if not linkage.loads:
            faults += [f"{module} {line}" for line in linkage.describe().splitlines()]
    if faults:
        return failed(
            "Extension modules can't be loaded with the libraries that are here.",
            *shown(faults),
            *evidence,
            remedy=subject.rebuild,
        )
    return ok("All symbols that the extension modules need are defined here.", *evidence)


def check_cxx_abi(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the extension modules pass strings in the way in which torch takes them."""
    files, torch = subject.extension_files, torch_folder(subject.import_path)
    library = torch / "lib" / "libc10.so" if torch else None
    if not files:
        return skipped(_NOTHING_COMPILED)
    if library is None or not library.is_file():
        return skipped("There is no torch to hold the extension modules against.")
    torch_is_new = _NEW_STRING.encode() in library.read_bytes()
    evidence, faults = [f"{library}: {_abi(torch_is_new)}"], []
    for module, file in files.items():
        try:
            symbols = list(SharedObject(file).undefined())
        except SharedObjectError as error:
            faults.append(str(error))
            continue
        foreign = [name for name in symbols if _is_foreign(name, torch_is_new)]
        evidence.append(f"{module}: {_abi(not torch_is_new) if foreign else 'as torch, or no strings'}")
        faults += [f"{module} needs {name}" for name in foreign]
    if faults:
        return failed(
            "Extension modules were compiled for another C++ ABI than torch's.",
            *evidence,
            *shown(faults),
            remedy=subject.rebuild,
        )
    return ok("The extension modules have torch's C++ ABI.", *evidence)


def _is_foreign(symbol: str, torch_is_new: bool) -> bool:
    if torch_is_new:
        return _OLD_STRING.match(symbol) is not None
    # An older torch doesn't keep a module from using the newer strings for itself.
    return _NEW_STRING in symbol and re.match(r"_ZNK?(2at|3c10|5torch|6caffe2)", symbol) is not None


def _abi(is_new: bool) -> str:
    return f"_GLIBCXX_USE_CXX11_ABI={int(is_new)}"


def check_versions(subject: Subject, reporter: Reporter) -> Outcome:
    """The versions of glibc and of the C++ library that the env's shared objects ask for."""
    there = {library.name: library.file.versions() for library in subject.loaded}
    there = {name: versions for name, versions in there.items() if versions}
    lacking = [
        (binary, need)
        for binary in subject.binaries
        for need in binary.needs
        if need.library in there and need.version not in there[need.library]
    ]
    evidence = [
        f"{library.name}: {library.path}"
        for library in subject.loaded
        if library.name in ("libc.so.6", "libstdc++.so.6")
    ]
    if not evidence:
        return skipped("The env's interpreter is no program that tells which C library it loads.")
    if not lacking:
        return ok(f"{len(subject.binaries)} shared objects find the versions that they need.", *evidence)
    faults = [f"{binary.path} needs {need.version} of {need.library}" for binary, need in lacking]
    assert subject.recipe is not None
    if all(binary.path in subject.extension_files.values() for binary, _ in lacking):
        remedy = f"Compile on this kind of machine: {subject.rebuild}"
    elif all(need.library == "libstdc++.so.6" for _, need in lacking):
        remedy = f"It is said how by: envbuilder doctor {subject.recipe_file} --only libraries.libstdcxx"
    else:
        remedy = lock_for_this_machine(subject.recipe.name)
    return failed(
        f"This machine's libraries are too old for {len(faults)} versions that the env needs.",
        *evidence,
        *shown(faults),
        remedy=remedy,
    )


def check_search_paths(subject: Subject, reporter: Reporter) -> Outcome:
    """RPATH and RUNPATH: whether anybody else could put a library there, or nobody ever finds one."""
    compiled = [binary for binary in subject.binaries if binary.path in subject.extension_files.values()]
    mend = (
        f"Mend the package's build by a patch ([build.NAME] patches in {subject.recipe_file}), "
        f"then: {subject.rebuild}"
    )
    if dangers := _entries(compiled, _danger):
        return failed(
            "Extension modules look for libraries where others can put them.", *shown(dangers), remedy=mend
        )
    if oddities := _entries(compiled, lambda entry: _oddity(entry, subject.root.path)):
        return warning(
            "Extension modules look for libraries in folders that are not the env's.",
            *shown(oddities),
            remedy=mend,
        )
    # What is published so looks beside itself first, and nobody here can mend it.
    others = _entries([binary for binary in subject.binaries if binary not in compiled], _danger)
    searching = sum(bool(binary.search_path) for binary in subject.binaries)
    return ok(
        f"{searching} of {len(subject.binaries)} shared objects have a search path; those of the modules "
        "compiled here are sound.",
        *(f"published so: {line}" for line in shown(others)),
    )


def _entries(binaries: Sequence[Binary], judge: Callable[[str], str | None]) -> list[str]:
    """The entries of their search paths that `judge` says something of."""
    return [
        f"{binary.path}: {entry or 'an empty entry'} {why}"
        for binary in binaries
        for entry in binary.search_path
        if (why := judge(entry))
    ]


def _danger(entry: str) -> str | None:
    if not entry.startswith(("/", "$ORIGIN", "${ORIGIN}")):
        return "is relative to the working folder"
    mode = _nearest_mode(Path(entry)) if entry.startswith("/") else None
    return "is where everybody may put libraries" if mode is not None and mode & stat.S_IWOTH else None


def _nearest_mode(path: Path) -> int | None:
    """The mode of `path`, or of the nearest folder above it that exists; None where it can't be looked at."""
    for folder in (path, *path.parents):
        try:
            return folder.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _oddity(entry: str, root: Path) -> str | None:
    path = Path(entry)
    if not entry.startswith("/") or path.is_relative_to(root):
        return None
    if path.is_relative_to(_BUILD_FOLDER):
        return "was there during the build alone"
    if path.is_relative_to(Path.home()):
        return "is in your home folder"
    try:
        return None if stat.S_ISDIR(path.stat().st_mode) else "is no folder"
    except OSError as error:
        return f"can't be reached: {error.strerror}"


CHECKS = (
    Check(
        "binaries.architectures",
        "GPU architectures",
        "GPU code in each extension module against the recipe's compute capabilities, the GPUs here and the "
        "site's",
        check_architectures,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "binaries.torch-architectures",
        "torch's GPU architectures",
        "GPU code in torch against the GPUs here and the site's",
        check_torch_architectures,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "binaries.symbols",
        "symbols of extension modules",
        "whether each symbol that an extension module leaves undefined is defined by the installed torch, "
        "Python or this machine's libraries",
        check_symbols,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "binaries.cxx-abi",
        "the C++ ABI",
        "the extension modules' _GLIBCXX_USE_CXX11_ABI against torch's",
        check_cxx_abi,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "binaries.versions",
        "library versions",
        "GLIBC, GLIBCXX and CXXABI versions that the env's shared objects need, against the libraries here",
        check_versions,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "binaries.search-paths",
        "library search paths",
        "RPATH and RUNPATH of the env's shared objects: relative ones, folders that everybody may write to, "
        "that are gone, a build's, or in your home",
        check_search_paths,
        needs=("recipe", "env", "addresses"),
    ),
)
