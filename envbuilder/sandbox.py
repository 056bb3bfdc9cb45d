"""Runs what a source package brings (its build backend) apart from network, homes and secrets.

Three kinds of isolation, the strongest that the kernel gives, found by trying:

- "sealed": a network, processes and a root of its own. All of the machine is there read-only, except homes,
  /run, files with secrets and named Unix sockets, which are hidden; /tmp is empty; the one folder to write in
  is /build, always by this name, so that what is built doesn't depend on where it lies. No device, no
  capability, no set-user-ID. See `sandbox_plan` (what is hidden), `sandbox_root` and `sandbox_enter`.
- "network-namespace": a network and processes of its own. It reads and writes what the user may.
- "none".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import envbuilder
from envbuilder.errors import MismatchError
from envbuilder.process import Cancel, Completed, run
from envbuilder.sandbox_enter import COMMAND, COMPLAINT, REFUSED
from envbuilder.sandbox_plan import Step, hidden_folders, lies_in, scratch_folders, secrets, steps
from envbuilder.sandbox_root import BUILD

if TYPE_CHECKING:
    from envbuilder.model import Isolation

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


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs apart from the rest of the machine; `for_build` says what they get of it."""

    isolation: Isolation
    prefix: tuple[str, ...] = ()
    """The words in front of a command in "network-namespace"."""
    user_namespace: bool = False
    """Whether "sealed" needs one, as an ordinary user does."""
    refused: tuple[str, ...] = ()
    """Why there is no stronger isolation: what each attempt at one came to."""
    private: Path | None = None
    """What is at /build, and writable."""
    binds: Mapping[str, Path] = field(default_factory=dict)
    """Path below /build → what is shown there, read-only."""
    readable: tuple[Path, ...] = ()

    def for_build(
        self, private: Path, *, binds: Mapping[str, Path] | None = None, readable: Sequence[Path] = ()
    ) -> Sandbox:
        """This sandbox for one build.

        private: an existing folder; the build can write there alone.
        binds: path below /build → file or folder of this machine that a sealed build finds there, read-only.
            Weaker kinds can't, and a link in `private` leads to it.
        readable: files and folders that the build needs, wherever they lie: what of them is in a home or in
            /tmp is shown all the same, read-only. Elsewhere all can be read anyway.

        Raises MismatchError where `readable` names a whole home.
        """
        private, binds = private.absolute(), {name: path.absolute() for name, path in (binds or {}).items()}
        for name, path in binds.items():
            if name != os.path.normpath(name) or not name.startswith(f"{BUILD}/"):
                raise ValueError(f"{name} is not a path below {BUILD}")
            if self.isolation != "sealed":
                link = private / PurePosixPath(name).relative_to(BUILD)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(path)
        sandbox = replace(self, private=private, binds=binds, readable=tuple(readable))
        if self.isolation == "sealed":
            sandbox._steps()
        return sandbox

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        on_line: Callable[[str], None] | None = None,
        cancel: Cancel | None = None,
    ) -> Completed:
        """Runs `argv` in the sandbox with exactly the variables `env`; see `process.run`.

        Paths in `argv` and `env` are as the build sees them (see `inside`); `cwd` may be either; `log` is
        this machine's. All that the program has started ends with it, and it ends with this process. Without
        `for_build`, a sealed program finds /build empty, and it is gone with the program.

        Raises MismatchError where a sealed sandbox can't be entered.
        """
        if self.isolation != "sealed":
            command: list[str | Path] = [*self.prefix, *argv]
            return run(
                command,
                env=env,
                cwd=cwd,
                log=log,
                timeout_s=_TIME_LIMIT_S,
                on_line=on_line,
                cancel=cancel,
            )
        done = run(
            self._entering(argv, env, self.inside(cwd)),
            env=_own_environment(),
            log=log,
            timeout_s=_TIME_LIMIT_S,
            on_line=on_line,
            cancel=cancel,
        )
        if done.returncode == REFUSED and COMPLAINT in done.output:
            raise MismatchError(
                "The sandbox for builds can't be entered.",
                remedy="Make sure that this folder can be written, then run the command again: "
                f"{self.private or cwd}",
                context={"reason": done.output.rpartition(COMPLAINT)[2].strip(), "log": log},
            )
        return replace(done, argv=tuple(map(str, argv)))

    def inside(self, path: Path) -> Path:
        """How a build sees the path `path` of this machine; the same path where it isn't sealed.

        `path` need not be there, and links in it are not followed; `private` and `binds` may be reached by
        other links than those they were given by.
        """
        if self.isolation != "sealed":
            return path
        best: tuple[int, Path] | None = None
        for name, host in self._shown():
            for prefix in {host, host.resolve()}:
                if path.is_relative_to(prefix) and (best is None or len(prefix.parts) > best[0]):
                    best = len(prefix.parts), Path(name) / path.relative_to(prefix)
        return best[1] if best else path

    def outside(self, path: str) -> Path:
        """The path of this machine for `path`, which a build told; the same path where it isn't sealed.

        ".." is worked out, links are not followed: a build can put one at `path` that leads to what it may
        not see. Don't open this path where the build can write, unless in a way that follows no link.
        """
        if self.isolation != "sealed":
            return Path(path)
        told = Path(os.path.normpath(path))
        fitting = [(name, host) for name, host in self._shown() if told.is_relative_to(name)]
        if not fitting:
            return told
        name, host = max(fitting, key=lambda shown: len(shown[0]))
        return host / told.relative_to(name)

    def _shown(self) -> list[tuple[str, Path]]:
        """(path in the sandbox, this machine's) of all that is not at its own path."""
        private = [(BUILD, self.private)] if self.private is not None else []
        return [*private, *self.binds.items()]

    def _steps(self) -> list[Step]:
        return steps(hidden_folders(os.environ), scratch_folders(), self.readable)

    def _entering(self, argv: Sequence[str | Path], env: Mapping[str, str], cwd: Path) -> list[str | Path]:
        """The command that runs `argv` sealed."""
        made = self._steps()
        closed = {path for kind, path, _ in made if kind != "show"}
        shown = {path for kind, path, _ in made if kind == "show"}
        sockets = Path("/proc/net/unix")
        masked = secrets(os.environ, sockets.read_text(errors="replace") if sockets.exists() else "")
        plan = {
            "parent": os.getpid(),
            "user_namespace": self.user_namespace,
            "variables": len(env),
            "cwd": str(cwd),
            "private": str(self.private.resolve()) if self.private else None,
            "binds": {name: str(path.resolve()) for name, path in self.binds.items()},
            "steps": made,
            "masked": [path for path in masked if lies_in(path, shown) or not lies_in(path, closed)],
        }
        home = Path(envbuilder.__file__).resolve().parent.parent
        # -X utf8: words and variables pass through unchanged, whatever bytes they are.
        python: list[str | Path] = [sys.executable, "-I", "-S", "-X", "utf8", "-c", COMMAND, home]
        return [*python, json.dumps(plan), *(f"{name}={value}" for name, value in env.items()), *argv]


def find_sandbox(*, require_isolation: bool = False, strongest: Isolation = "sealed") -> Sandbox:
    """The strongest sandbox that this machine allows, found by trying; none stronger than `strongest`.

    With `require_isolation`, MismatchError where a build would have the machine's network: "sealed" and
    "network-namespace" are both accepted, and receipts say which it was.
    """
    refused: list[str] = []
    if strongest == "sealed":
        for user_namespace in (False, True):
            sandbox = Sandbox("sealed", user_namespace=user_namespace)
            if (reason := _trial(sandbox._entering(["true"], {"PATH": os.defpath}, Path("/")))) is None:
                return sandbox
            refused.append(f"sealed{', in a user namespace' if user_namespace else ''}: {reason}")
    for prefix in _UNSHARE if strongest != "none" else ():
        if (reason := _trial([*prefix, "true"])) is None:
            return Sandbox("network-namespace", prefix, refused=tuple(refused))
        refused.append(f"{' '.join(prefix)}: {reason}")
    if require_isolation:
        raise MismatchError(
            "This machine gives a build no network namespace of its own.",
            remedy="Allow user namespaces (sysctl user.max_user_namespaces), "
            "or run the command without --require-isolation.",
            context={"tried": "; ".join(refused)},
        )
    return Sandbox("none", refused=tuple(refused))


def _own_environment() -> dict[str, str]:
    """What this interpreter may need to start, where a module has put it."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _trial(argv: Sequence[str | Path]) -> str | None:
    """Runs `argv`; None, or why it didn't end well."""
    try:
        done = run(
            argv,
            env=_own_environment() | {"PATH": os.environ.get("PATH", os.defpath)},
            timeout_s=_TRIAL_TIMEOUT_S,
        )
    except MismatchError as error:
        return error.message  # there is no unshare here
    if done.returncode == 0:
        return None
    lines = done.output.strip().splitlines()
    return (
        "it took too long" if done.timed_out else lines[-1].removeprefix(COMPLAINT) if lines else "it failed"
    )


def sandbox_environment(
    host: Mapping[str, str],
    *,
    private: Path,
    path: Sequence[Path],
    keep_cuda_libraries: bool,
    sandbox: Sandbox | None = None,
) -> dict[str, str]:
    """The variables that every sandboxed program gets: an allow-list of `host`'s, and private folders.

    `private` gets home and a folder for temporary files; `path` comes first on the PATH, then the host's,
    which names the compilers of loaded modules. Of LD_LIBRARY_PATH, folders that hold a CUDA runtime are left
    out unless `keep_cuda_libraries`: they would shadow the libraries that torch's wheels bring. `private` and
    `path` are given as this machine's; the variables name them as a build in `sandbox` sees them.
    """
    inside = sandbox.inside if sandbox else Path
    environment = {name: host[name] for name in _FROM_HOST if host.get(name)}
    if not keep_cuda_libraries:
        kept = without_cuda_runtime(environment.pop("LD_LIBRARY_PATH", ""))
        environment |= {"LD_LIBRARY_PATH": kept} if kept else {}
    words = [
        *(str(inside(folder)) for folder in path),
        *filter(None, host.get("PATH", "").split(os.pathsep)),
        *_SYSTEM_PATH,
    ]
    for name in ("home", "tmp"):
        (private / name).mkdir(parents=True, exist_ok=True)
    return environment | {
        "PATH": os.pathsep.join(dict.fromkeys(words)),
        "HOME": str(inside(private / "home")),
        "TMPDIR": str(inside(private / "tmp")),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        # What the build prints comes in order with what its compilers print.
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
    }


def without_cuda_runtime(library_path: str) -> str:
    """A LD_LIBRARY_PATH without the folders whose CUDA libraries would shadow those of torch."""
    folders = filter(None, library_path.split(os.pathsep))
    return os.pathsep.join(folder for folder in folders if not _has_cuda_runtime(Path(folder)))


def _has_cuda_runtime(folder: Path) -> bool:
    return any(folder.glob("libcudart.so*")) or any(folder.glob("libnvJitLink.so*"))
