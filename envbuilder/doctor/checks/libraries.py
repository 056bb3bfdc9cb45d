"""Shared libraries that are on the load path twice."""

from __future__ import annotations

import filecmp
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.loading import torch_folder, torch_libraries
from envbuilder.doctor.subject import Subject
from envbuilder.linkage import highest_version, loader_cache
from envbuilder.load_order import Loaded, library_folders
from envbuilder.modules import again_without, gone
from envbuilder.report import Reporter
from envbuilder.shared_object import SharedObject, SharedObjectError
from envbuilder.target import version_number

_CUDA = re.compile(
    r"(lib(?:cudart|cublas|cublasLt|cudnn\w*|cufft|curand|cusolver|cusparse|cusparseLt|nvJitLink|nvrtc|cupti)"
    r"\.so)\.\d+"
)
_NCCL = re.compile(r"(libnccl\.so)\.\d+")
_LIBSTDCXX = "libstdc++.so.6"
_NCCL_VERSION = re.compile(rb"NCCL version (\d+\.\d+\.\d+[\w.+]*)")


def check_cuda(subject: Subject, reporter: Reporter) -> Outcome:
    """Which CUDA libraries torch and the extension modules get."""
    return _check_copies(subject, _CUDA, "CUDA")


def check_nccl(subject: Subject, reporter: Reporter) -> Outcome:
    """Which NCCL torch gets."""
    return _check_copies(subject, _NCCL, "NCCL")


def _check_copies(subject: Subject, names: re.Pattern[str], what: str) -> Outcome:
    if torch_folder(subject.import_path) is None:
        return skipped("There is no torch in the env.")
    loaded = [library for library in subject.loaded if names.fullmatch(library.name)]
    if not loaded:
        return skipped(f"The torch of the env loads no {what} library.")
    evidence = [_described(library) for library in loaded]
    evidence += map(_not_loaded, _others(subject, loaded, names=names))
    if wrong := _shadowing(subject, loaded) or _doubled(loaded, names):
        culprits, why = wrong
        return failed(
            f"{', '.join(library.name for library in culprits)}: {why}.",
            *shown(evidence),
            remedy=_remedy(subject, culprits[0]),
        )
    return ok(f"Each {what} library is loaded once, as torch expects it.", *shown(evidence))


def _shadowing(subject: Subject, loaded: list[Loaded]) -> tuple[list[Loaded], str] | None:
    """Those that are loaded from elsewhere though torch's packages bring another build of them."""
    folders = torch_libraries(subject.import_path)
    culprits = []
    for library in loaded:
        own = [path for folder in folders if (path := folder / library.name).is_file()]
        if own and not any(_is_same(path, library.path) for path in own):
            culprits.append(library)
    return (culprits, "another build is loaded than the one that torch came with") if culprits else None


def _is_same(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _doubled(loaded: list[Loaded], names: re.Pattern[str]) -> tuple[list[Loaded], str] | None:
    """Two versions in one process: each keeps its own account of the GPU's memory, streams and errors."""
    first: dict[str, Loaded] = {}
    culprits = []
    for library in loaded:
        match = names.fullmatch(library.name)
        assert match is not None
        if first.setdefault(match[1], library) is not library:
            culprits.append(library)
    return (culprits, "a second copy would be loaded beside the first") if culprits else None


def _remedy(subject: Subject, library: Loaded) -> str:
    if library.through == "LD_LIBRARY_PATH":
        folder = library.path.parent
        return f"Unload the module that puts {folder} into LD_LIBRARY_PATH, or: unset LD_LIBRARY_PATH"
    if library.through == "LD_PRELOAD":
        return "unset LD_PRELOAD"
    is_ours = library.by is not None and library.by.path in subject.extension_files.values()
    return subject.rebuild if is_ours else subject.remake_env


def _others(subject: Subject, loaded: list[Loaded], *, names: re.Pattern[str]) -> Iterator[Path]:
    """Copies that LD_LIBRARY_PATH and the loader's cache lead to, and that are not loaded."""
    library_path = subject.variables.get("LD_LIBRARY_PATH", "")
    cached = {path for name, paths in loader_cache().items() if names.fullmatch(name) for path in paths}
    listed = {
        path
        for folder in library_folders(library_path)
        for path in folder.glob("lib*.so.*")
        if names.fullmatch(path.name)
    }
    there = {library.path.resolve() for library in loaded}
    for path in sorted(listed) + sorted(cached - listed):
        if path.exists() and path.resolve() not in there:
            there.add(path.resolve())
            yield path


def _described(library: Loaded) -> str:
    return f"{library.name}: {library.path.resolve()}{_version(library.path)}, by {library.through}"


def _not_loaded(path: Path) -> str:
    return f"there too, and not loaded: {path}{_version(path)}"


def _version(path: Path) -> str:
    """What the file itself says of its version, in brackets; empty where it says nothing."""
    if path.name.startswith("libnccl.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            match = _NCCL_VERSION.search(data)
            return f" (NCCL {match[1].decode()})" if match else ""
    if path.name.startswith("libstdc++.so"):
        return f" (up to GLIBCXX_{_newest(path) or 'none'})"
    return ""


def check_libstdcxx(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the C++ library that is loaded has all versions that the others ask of it."""
    library = next((each for each in subject.loaded if each.name == _LIBSTDCXX), None)
    if library is None:
        return skipped("Nothing that torch or the extension modules load needs the C++ library.")
    others = list(_others(subject, [library], names=re.compile(re.escape(_LIBSTDCXX))))
    brought = _bringing(subject, library)
    evidence = [f"{_described(library)}{brought}", *map(_not_loaded, others)]
    there = library.file.versions()
    lacking = []
    for user in subject.loaded:
        needed = {need.version for need in user.file.version_needs() if need.library == _LIBSTDCXX}
        if missing := sorted(needed - there, key=_order):
            lacking.append(f"{user.path} needs {missing[-1]}")
    set_by_user = library.through in ("LD_LIBRARY_PATH", "LD_PRELOAD") and not brought
    if lacking:
        return failed(
            f"The C++ library that is loaded, {library.path}, is too old for {len(lacking)} others.",
            *evidence,
            *shown(lacking),
            remedy=_remedy(subject, library) if set_by_user else _newer_libstdcxx(subject),
        )
    if set_by_user and any(_newest_number(path) > _newest_number(library.path) for path in others):
        return warning(
            f"{library.through} puts an older C++ library before the machine's own.",
            *evidence,
            remedy=_remedy(subject, library),
        )
    return ok("The C++ library that is loaded has all that is asked of it.", *evidence)


def _bringing(subject: Subject, library: Loaded) -> str:
    """Which of the modules that the env was compiled with brings it, in words; empty where none does."""
    folder = str(library.path.parent)
    for module in subject.receipt.modules:
        if folder in module.folders.get("LD_LIBRARY_PATH", ()):
            return f", of the module {module.name}, which the env was compiled with"
    return ""


def _newer_libstdcxx(subject: Subject) -> str:
    for module, _ in gone(subject.receipt.modules):
        return again_without(module, subject.recipe_file)
    prefix = subject.python.resolve().parents[1]
    return (
        "Load a newer compiler's module, whose libstdc++ is then found first: module avail gcc; or, where "
        f"{prefix} is conda's: conda install -p {prefix} -c conda-forge libstdcxx-ng"
    )


def _newest(path: Path) -> str | None:
    """The highest GLIBCXX version that the C++ library in `path` has, e.g. "3.4.30"."""
    try:
        return highest_version("GLIBCXX", sorted(SharedObject(path).versions()))
    except SharedObjectError:
        return None


def _newest_number(path: Path) -> tuple[int, ...]:
    """`_newest` as it compares; nothing comes before every version."""
    newest = _newest(path)
    return version_number(newest) if newest else ()


def _order(version: str) -> tuple[str, tuple[int, ...]]:
    """GLIBCXX's after CXXABI's, and each by its number."""
    name, _, number = version.partition("_")
    return name, tuple(int(part) for part in re.findall(r"\d+", number))


CHECKS = (
    Check(
        "libraries.cuda",
        "CUDA libraries",
        "which libcudart, cuBLAS, cuDNN, nvJitLink and others a process with torch and the extension modules "
        "loads: torch's own, or others by LD_LIBRARY_PATH, LD_PRELOAD or RPATH; none twice",
        check_cuda,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "libraries.nccl",
        "NCCL",
        "which libnccl a process with torch loads, of which version, and which others are on the load path",
        check_nccl,
        needs=("recipe", "env", "addresses"),
    ),
    Check(
        "libraries.libstdcxx",
        "the C++ library",
        "which libstdc++ a process with torch and the extension modules loads, and whether it is new enough",
        check_libstdcxx,
        needs=("recipe", "env", "addresses"),
    ),
)
