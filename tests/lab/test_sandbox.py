"""The sandbox as an ordinary user meets it, on kernels and in containers that allow less.

As root only: it makes such users and such containers.

Programs run as a user that has no account, in the machine's own Python: this one's folder is perhaps root's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import envbuilder
from tests import canary

pytestmark = pytest.mark.lab

USER = 61_007
SYSTEM_PYTHON = "/usr/bin/python3"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
SOURCES = Path(envbuilder.__file__).parent.parent
NEEDED = ("__init__", "errors", "process", "sandbox", "sandbox_enter", "sandbox_plan", "sandbox_root")

_TOOL = """
import json, os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import envbuilder.sandbox
from envbuilder.sandbox import find_sandbox
private, command = Path(sys.argv[2]), sys.argv[3:]
envbuilder.sandbox.COMMAND = os.environ.get("COMMAND", envbuilder.sandbox.COMMAND)
found = find_sandbox()
readable = [Path(path) for path in os.environ["READABLE"].split(":")]
log = private / "log"
done = found.for_build(private, readable=readable).run(
    command, env={"PATH": os.defpath}, cwd=private, log=log
) if command else None
print(json.dumps({
    "isolation": found.isolation, "user_namespace": found.user_namespace, "refused": found.refused,
    "status": done and done.returncode, "output": done and done.output,
}))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the user's, with a home and a private folder, and a copy of the sandbox's modules."""
    folder = Path("/var/lib", f"envbuilder-test-{os.getpid()}")
    modules = folder / "modules/envbuilder"
    modules.mkdir(parents=True)
    for name in NEEDED:
        shutil.copy(SOURCES / f"envbuilder/{name}.py", modules)
    shutil.copy(canary.__file__, folder / "modules/canary.py")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    for name in ("home", "private"):
        (folder / name).mkdir()
        os.chown(folder / name, USER, USER)
    yield folder
    shutil.rmtree(folder)


def tool(
    folder: Path, *command: str, within: tuple[str, ...] = (), readable: str = "/var/lib", **variables: str
) -> dict[str, object]:
    """What the tool finds as the ordinary user, with `within` in front of it; what `command` does there."""
    words = [*AS_USER, *within, SYSTEM_PYTHON, "-c", _TOOL, folder / "modules", folder / "private"]
    env = {"PATH": os.defpath + ":/usr/sbin:/sbin", "HOME": str(folder / "home"), "READABLE": readable}
    done = subprocess.run(
        [*words, *command], env=env | variables, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_an_ordinary_users_build_can_do_nothing_but_build(folder: Path) -> None:
    secret = folder / "home/.netrc"
    secret.write_text("secret", encoding="utf-8")
    os.chown(secret, USER, USER)
    wishes = {
        "read": [str(secret), "/etc/shadow", "/run"],
        "write": [
            str(folder / "home/new"),
            str(folder / "private/new"),
            "/usr/new",
            "/dev/new",
            "/build/new",
        ],
        "ports": [],
        "sockets": [],
        "mounts": ["/", "/usr", "/proc", "/home", str(folder / "home")],
    }
    got = tool(folder, SYSTEM_PYTHON, "-I", str(folder / "modules/canary.py"), json.dumps(wishes))
    assert (got["isolation"], got["user_namespace"], got["status"]) == ("sealed", True, 0), got
    could = json.loads(str(got["output"]))
    assert (could["reads"], could["writes"], could["undone"]) == ([], ["/build/new"], [])
    assert could["ids"] == [USER, USER, USER]
    assert (folder / "private/new").stat().st_uid == USER
    assert could["processes"] == 2
    assert set(could["rights"]) == {"0" * 16}
    assert could["devices"] == ["/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"]


def test_a_program_with_roots_set_user_id_gets_nothing_by_it(folder: Path) -> None:
    program = folder / "modules/id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    outside = subprocess.run([*AS_USER, program, "-u"], capture_output=True, text=True, check=True)
    assert outside.stdout == "0\n"  # so this file would do it
    assert tool(folder, str(program), "-u")["output"] == f"{USER}\n"


def test_a_kernel_without_mount_setattr_seals_as_well(folder: Path) -> None:
    command = (
        "import sys; sys.path.append(sys.argv.pop(1)); import envbuilder.sandbox_root as root; "
        "root._MOUNT_SETATTR = 9999; from envbuilder.sandbox_enter import start; start(sys.argv[1:])"
    )
    # A mount that is read-only, one with flags that must be kept, one with a space in its name.
    mounts = folder / "mounts"
    for name, options in (("ro", "ro"), ("flags", "nosuid,noexec,noatime"), ("a space", "rw,mode=777")):
        (mounts / name).mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", mounts / name], check=True)
    try:
        script = (
            f"cd {mounts}; touch 'a space/new' flags/new ro/new new; cut -d' ' -f5,6 /proc/self/mountinfo"
        )
        got = tool(folder, "sh", "-c", script, COMMAND=command)
    finally:
        for path in mounts.iterdir():
            subprocess.run(["umount", path], check=True)
    assert got["isolation"] == "sealed"
    lines = str(got["output"]).splitlines()
    assert sum("Read-only file system" in line for line in lines) == 4
    seen = dict(line.split() for line in lines if line.startswith("/"))
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(seen[str(mounts / "flags")].split(","))
    writable = {path for path, options in seen.items() if "ro" not in options.split(",")}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "shm")}
    assert writable == devices | {"/build", "/tmp", "/var/tmp"}


def test_another_proc_shows_nothing_of_the_machine(folder: Path) -> None:
    # As chroots have. Through a process in it, all of the machine could be read and written.
    proc = folder / "chroot/proc"
    proc.mkdir(parents=True)
    subprocess.run(["mount", "-t", "proc", "none", proc], check=True)
    try:
        got = tool(folder, "sh", "-c", f"ls -A {proc}; echo $?")
    finally:
        subprocess.run(["umount", proc], check=True)
    assert (got["isolation"], got["output"]) == ("sealed", "0\n")


def test_where_user_namespaces_are_off_nothing_is_claimed(folder: Path) -> None:
    # Inside one of its own the limit can be set without touching the machine's.
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all "$@"'
    got = tool(folder, within=("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"))
    assert got["isolation"] == "none"
    refused = got["refused"]
    assert isinstance(refused, list)
    assert [reason.split(":")[0] for reason in refused[:2]] == ["sealed", "sealed, in a user namespace"]
    assert "unshare: [Errno 1] Operation not permitted" in refused[0]


def test_in_a_container_that_masks_proc_the_network_is_cut_off_all_the_same(folder: Path) -> None:
    # As container engines do; a new /proc that would show what they hide is refused by the kernel.
    script = 'mount -t tmpfs none /proc/sys; exec setpriv --bounding-set=-sys_admin "$@"'
    within = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    got = tool(folder, "sh", "-c", "cat /proc/net/dev | wc -l", within=within)
    assert got["isolation"] == "network-namespace"
    assert "Operation not permitted" in str(got["refused"])
    assert str(got["output"]).strip() == "3"  # two lines of heading, and the loopback


def test_root_without_the_right_to_mount_has_a_user_namespace(folder: Path) -> None:
    words = ["setpriv", "--bounding-set=-sys_admin", SYSTEM_PYTHON, "-c", _TOOL, folder / "modules"]
    (folder / "root").mkdir()
    env = {"PATH": os.defpath, "HOME": str(folder / "home"), "READABLE": "/var/lib"}
    done = subprocess.run(
        [*words, folder / "root", "id", "-u"], env=env, cwd="/", capture_output=True, text=True, check=True
    )
    got = json.loads(done.stdout)
    assert (got["isolation"], got["user_namespace"], got["output"]) == ("sealed", True, "0\n")
