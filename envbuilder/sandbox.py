"""Runs what a source package brings (its build backend) with no network, home folder or secrets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envbuilder.errors import MismatchError
from envbuilder.process import Completed, run

Isolation = Literal["network-namespace", "none"]
_TIME_LIMIT_S = 24 * 3600.0
"""No build takes a day: one that waits for a network that isn't there is ended."""
_TRIAL_TIMEOUT_S = 60.0
"""Of one attempt to make a namespace; it takes milliseconds, a kernel that is stuck for ever."""
# In a namespace of its own for processes too, all that a build has started ends with it: ninja puts each
# compiler into a process group of its own, which no signal to the build would reach.
_NAMESPACES = ("--net", "--pid", "--fork", "--kill-child", "--")
_UNSHARE = (
    ("unshare", *_NAMESPACES),
    # An ordinary user may have these only inside a user namespace of its own.
    ("unshare", "--user", "--map-root-user", *_NAMESPACES),
)
_FROM_HOST = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH")
"""How modules tell a compiler where its headers and libraries are: without them many don't run at all."""
_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run a program apart from the network."""

    isolation: Isolation
    prefix: tuple[str, ...]
    """The words in front of the command."""

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """Runs `argv` in the sandbox with exactly the variables `env`; see `process.run`."""
        return run([*self.prefix, *argv], env=env, cwd=cwd, log=log, timeout_s=_TIME_LIMIT_S, on_line=on_line)


def find_sandbox(*, require_isolation: bool = False) -> Sandbox:
    """The strongest sandbox that this machine allows, found by trying.

    With `require_isolation`, MismatchError where no network namespace can be had.
    """
    for prefix in _UNSHARE:
        try:
            if run([*prefix, "true"], timeout_s=_TRIAL_TIMEOUT_S).returncode == 0:
                return Sandbox("network-namespace", prefix)
        except MismatchError:
            break  # there is no unshare here
    if require_isolation:
        raise MismatchError(
            "This machine gives a build no network namespace of its own.",
            remedy="Allow user namespaces (sysctl user.max_user_namespaces), "
            "or run the command without --require-isolation.",
            context={"tried": "; ".join(" ".join(prefix) for prefix in _UNSHARE)},
        )
    return Sandbox("none", ())


def sandbox_environment(
    host: Mapping[str, str], *, private: Path, path: Sequence[Path], keep_cuda_libraries: bool
) -> dict[str, str]:
    """The variables that every sandboxed program gets: an allow-list of `host`'s, and private folders.

    `private` becomes home and folder for temporary files; `path` comes first on the PATH, then the host's,
    which names the compilers of loaded modules. Of LD_LIBRARY_PATH, folders that hold a CUDA runtime are left
    out unless `keep_cuda_libraries`: they would shadow the libraries that torch's wheels bring.
    """
    environment = {name: host[name] for name in _FROM_HOST if host.get(name)}
    if "LD_LIBRARY_PATH" in environment and not keep_cuda_libraries:
        folders = environment.pop("LD_LIBRARY_PATH").split(os.pathsep)
        if kept := [folder for folder in folders if folder and not _has_cuda_runtime(Path(folder))]:
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(kept)
    words = [*map(str, path), *filter(None, host.get("PATH", "").split(os.pathsep)), *_SYSTEM_PATH]
    for name in ("home", "tmp"):
        (private / name).mkdir(parents=True, exist_ok=True)
    return environment | {
        "PATH": os.pathsep.join(dict.fromkeys(words)),
        "HOME": str(private / "home"),
        "TMPDIR": str(private / "tmp"),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        # What the build prints comes in order with what its compilers print.
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
    }


def _has_cuda_runtime(folder: Path) -> bool:
    return any(folder.glob("libcudart.so*")) or any(folder.glob("libnvJitLink.so*"))
