"""The compilers of a build: the machine's C++ compiler, and nvcc from packages or from the machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from envbuilder.errors import InputError, MismatchError
from envbuilder.gpu import architecture
from envbuilder.process import run

_TIMEOUT_S = 60.0
"""Of a compiler that only tells what it is: one that lies on a hung network disk never answers."""
_CXX_NAMES = ("g++", "c++", "clang++")
_C_OF = {"g++": "gcc", "c++": "cc", "clang++": "clang"}


@dataclass(frozen=True)
class HostCompiler:
    """The C++ compiler that compiles host code, also for nvcc."""

    cxx: Path
    cc: Path | None
    """The C compiler of the same family beside it, if there is one."""
    version: str
    """First line of `--version`."""


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc with its headers and libraries."""

    home: Path
    nvcc: Path
    """The real program, not a wrapper around it."""
    version: str
    """E.g. "13.0.88"."""
    architectures: tuple[str, ...]
    """Numbers that it can make code for, e.g. "90"."""
    steady_names: bool = True
    """It can name its intermediate files by the object that it makes (--objdir-as-tempdir)."""

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


def find_host_compiler(host: Mapping[str, str]) -> HostCompiler:
    """$CXX, else g++, c++ or clang++ on the PATH of environment `host`; MismatchError if there is none."""
    names = [host["CXX"]] if host.get("CXX") else list(_CXX_NAMES)
    found = next((path for name in names if (path := shutil.which(name, path=host.get("PATH")))), None)
    if found is None:
        raise MismatchError(
            f"There is no C++ compiler on this machine (looked for {', '.join(names)}).",
            remedy="Debian, Ubuntu: apt install g++; on a cluster: module load gcc",
            context={"PATH": host.get("PATH", "")},
        )
    cxx = Path(found).absolute()
    named = host.get("CC") or str(cxx.with_name(_replaced(cxx.name)))
    cc = shutil.which(named, path=host.get("PATH"))
    first_line = _asked(cxx, "--version").partition("\n")[0].strip()
    if not first_line:
        raise MismatchError(
            f"{cxx} does not answer as a C++ compiler.",
            remedy=f"Run {cxx} --version and mend what it says; on a cluster: module load gcc",
            context={"compiler": cxx},
        )
    return HostCompiler(cxx, Path(cc).absolute() if cc else None, first_line)


def _replaced(name: str) -> str:
    """The C compiler's name for a C++ compiler's: "aarch64-linux-gnu-g++-12" gives "…-gcc-12"."""
    return re.sub(r"clang\+\+|g\+\+|c\+\+", lambda found: _C_OF[found[0]], name)


def compiler_release(program: Path) -> str | None:
    """Release of a C or C++ compiler, e.g. "12.2.0"; None where it doesn't say."""
    first_line = _asked(program, "--version").partition("\n")[0]
    # GCC names its packager's own version in parentheses, before its release.
    release = re.search(r"\d+\.\d+(\.\d+)?", re.sub(r"\([^)]*\)", "", first_line))
    return release[0] if release else None


def _asked(program: Path, *arguments: str) -> str:
    return run([program, *arguments], timeout_s=_TIMEOUT_S).output


def system_toolkit(host: Mapping[str, str]) -> CudaToolkit:
    """The machine's nvcc: in $CUDA_HOME, else on the PATH of environment `host`; MismatchError if none."""
    home = host.get("CUDA_HOME") or host.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc") if home else shutil.which("nvcc", path=host.get("PATH"))
    if nvcc is None:
        raise MismatchError(
            "There is no nvcc on this machine: "
            + (f"CUDA_HOME is {home}." if home else "none is on the PATH."),
            remedy="On a cluster: module load cuda; "
            'or write toolchain = "packages" into [cuda] of the recipe and lock it again.',
            context={"CUDA_HOME": home or "", "PATH": host.get("PATH", "")},
        )
    return _toolkit(Path(nvcc))


def packaged_toolkit(site_packages: Path) -> CudaToolkit:
    """The nvcc that the locked packages put into `site_packages`; MismatchError if there is none."""
    nvcc = next(iter(sorted(site_packages.glob("nvidia/cu*/bin/nvcc"))), None)
    if nvcc is None:
        raise MismatchError(
            "The locked toolchain packages hold no nvcc: those for CUDA 12 and older hold ptxas alone.",
            remedy="Name cuda-toolkit[nvcc,nvvm,crt,cccl] of CUDA 13 in toolchain-requirements, "
            'or write toolchain = "system" into [cuda] of the recipe; then lock it again.',
            context={"looked for": site_packages / "nvidia/cu*/bin/nvcc"},
        )
    return _toolkit(nvcc)


def _toolkit(nvcc: Path) -> CudaToolkit:
    # Where the toolkit really is, only nvcc knows: what is on the PATH may be a wrapper script.
    here = re.search(r"^#\$ _HERE_=(.+)$", _asked(nvcc, "--dryrun", "-c", "x.cu"), re.MULTILINE)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", _asked(nvcc, "--version"))
    codes = re.findall(r"^sm_(\w+)$", _asked(nvcc, "--list-gpu-code"), re.MULTILINE)
    if not (here and version and codes):
        raise MismatchError(
            f"{nvcc} does not run as an nvcc.",
            remedy=f"Run {nvcc} --version and mend what it says; on a cluster: module load cuda",
            context={"nvcc": nvcc, "output": _asked(nvcc, "--version")[-500:]},
        )
    real = Path(here[1]).resolve() / "nvcc"
    steady = "--objdir-as-tempdir" in _asked(nvcc, "--help")
    return CudaToolkit(real.parent.parent, real, version[1], tuple(sorted(codes, key=int)), steady)


def check_toolkit(toolkit: CudaToolkit, torch_cuda: str | None, capabilities: Sequence[str]) -> None:
    """That `toolkit` fits torch and the wanted `capabilities`, before anything is built.

    MismatchError where its major version is not that of torch's CUDA ("13.0"; None without torch);
    InputError where it can't make code for a compute capability.
    """
    if torch_cuda is not None and torch_cuda.split(".")[0] != toolkit.major:
        raise MismatchError(
            f"nvcc is of CUDA {toolkit.version}, torch of CUDA {torch_cuda}: the major versions must agree.",
            remedy=f"On a cluster: module load cuda/{torch_cuda}; "
            'or write toolchain = "packages" into [cuda] of the recipe and lock it again.',
            context={"nvcc": toolkit.nvcc, "expected": torch_cuda, "got": toolkit.version},
        )
    for capability in capabilities:
        # nvcc lists "90" alone, and makes the variants "90a" and "100f" too.
        if architecture(capability).rstrip("af") not in toolkit.architectures:
            raise InputError(
                f"The recipe asks for compute capability {capability}; nvcc {toolkit.version} can't make it.",
                remedy="Write one that it can make into compute-capabilities in the recipe's [cuda].",
                context={
                    "nvcc": toolkit.nvcc,
                    "got": capability,
                    "expected": ", ".join(f"{code[:-1]}.{code[-1]}" for code in toolkit.architectures),
                },
            )


def older_than_torch(toolkit: CudaToolkit, torch_cuda: str | None) -> str | None:
    """The warning where `toolkit` is of an earlier minor version than torch's CUDA ("12.8"); None where not.

    Its code runs beside torch's: that holds within a major version. Only the headers may fall short.
    """
    if torch_cuda is None or Version(toolkit.version).release[:2] >= Version(torch_cuda).release[:2]:
        return None
    return (
        f"nvcc is of CUDA {toolkit.version}, older than torch's {torch_cuda}. What it compiles runs; where a "
        f"build lacks something of CUDA {torch_cuda}: module load cuda/{torch_cuda}"
    )


def make_cuda_home(
    toolkit: CudaToolkit,
    folder: Path,
    *,
    more_includes: Sequence[Path] = (),
) -> Path:
    """A CUDA_HOME in the new `folder` that is `toolkit` without nvcc, in whose place a driver can be put.

    So every way to nvcc leads to the driver, which calls the real one. The packages' libraries get the names
    that a linker looks for (libcudart.so beside libcudart.so.13) and `lib64`; headers of `more_includes`
    (a torch from elsewhere) come beside the toolkit's own. Returns `folder`.
    """
    (folder / "bin").mkdir(parents=True)
    for entry in (toolkit.home / "bin").iterdir():
        if entry.name != "nvcc":
            (folder / "bin" / entry.name).symlink_to(entry)
    for entry in toolkit.home.iterdir():
        if entry.name not in ("bin", "include", "lib64"):
            (folder / entry.name).symlink_to(entry)
    _merge([toolkit.home / "include", *more_includes], folder / "include")
    libraries = next((path for name in ("lib64", "lib") if (path := toolkit.home / name).is_dir()), None)
    if libraries is not None:
        _merge([libraries], folder / "lib64")
        for library in sorted(libraries.glob("lib*.so.*")):
            development = folder / "lib64" / f"{library.name.partition('.so.')[0]}.so"
            if not development.exists():
                development.symlink_to(library)
    return folder


def _merge(sources: Sequence[Path], folder: Path) -> None:
    """Links to every entry of `sources` in the new `folder`; the first of a name wins."""
    folder.mkdir()
    for source in sources:
        for entry in source.iterdir() if source.is_dir() else ():
            link = folder / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
