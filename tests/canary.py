"""Tries all that a build must not do, and prints as JSON what it could do.

Runs in a sandbox, in any Python: `python -I -S canary.py WISHES`, JSON with the keys that `main` reads.
"""

import contextlib
import ctypes
import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path


def works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def reads(path: str) -> bool:
    """Whether there is anything to read at `path`."""
    with contextlib.suppress(OSError):
        return bool(list(Path(path).iterdir()) if Path(path).is_dir() else Path(path).read_bytes())
    return False


def connects(kind: int, address: object) -> bool:
    with socket.socket(kind, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        return works(lambda: client.connect(address))  # type: ignore[arg-type]


def devices() -> list[str]:
    """The devices that can be opened, of all that this finds or makes."""
    folders = [folder for folder, _, _ in os.walk("/dev")]
    found = [path for folder in folders for path in Path(folder).iterdir() if not path.is_symlink()]
    for folder in ("/tmp", os.getcwd()):  # noqa: PTH109
        made = Path(folder) / "device"
        with contextlib.suppress(OSError):
            os.mknod(made, stat.S_IFCHR | 0o666, os.makedev(1, 5))
            found.append(made)
    return sorted(
        str(path)
        for path in found
        if stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFCHR, stat.S_IFBLK)
        and works(lambda path=path: path.open("rb").close())  # type: ignore[misc]
    )


def undone(paths: list[str]) -> list[str]:
    """What rights in a user namespace of its own undo: mounts made writable or taken away, at `paths`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(0x10000000 | 0x20000)  # CLONE_NEWUSER | CLONE_NEWNS
    undone = []
    for path in paths:
        if libc.mount(b"none", path.encode(), None, ctypes.c_ulong(32 | 4096), None) == 0:
            undone.append(f"remount {path}")
        if libc.umount2(path.encode(), 2) == 0:
            undone.append(f"umount {path}")
    return undone


def main(wishes: dict[str, list[str]]) -> dict[str, object]:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {
        "reads": [path for path in wishes["read"] if reads(path)],
        "writes": [
            path
            for path in wishes["write"]
            if works(lambda path=path: Path(path).open("a").close())  # type: ignore[misc]
        ],
        "connects": [
            *(port for port in wishes["ports"] if connects(socket.AF_INET, ("127.0.0.1", int(port)))),
            *(name for name in wishes["sockets"] if connects(socket.AF_UNIX, name)),
        ],
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),  # noqa: PTH208
        "environment": dict(os.environ),
        "rights": [line.split()[1] for line in status if line.startswith(("CapPrm", "CapEff", "CapBnd"))],
        "devices": devices(),
        "ids": [os.getuid(), os.geteuid(), os.getgid()],
        "cwd": os.getcwd(),  # noqa: PTH109
        "tmp": sorted(os.listdir("/tmp")),  # noqa: PTH208
        "undone": undone(wishes["mounts"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
