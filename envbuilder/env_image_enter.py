"""Runs a program that sees an env's image mounted at a folder, which nobody else does.

Its words are SQUASHFUSE IMAGE FOLDER PROGRAM ARGUMENT…. It ends as the program ends, with its exit status or
of its signal; REFUSED, with one line that begins with COMPLAINT, says that the program was not started. It
runs in a bare interpreter (`python -I -S`, see COMMAND), with the standard library only.

The mount is in a mount namespace of its own. So it needs no rights and no set-user-ID helper, two jobs on one
node never meet in it, and the kernel removes it with its last process, however that ended: nothing is left to
unmount. An ordinary user gets the right to mount from a user namespace, in which squashfuse runs; the program
runs in a second one inside, under the user's own ids and without rights.
Manuals: user_namespaces(7), mount_namespaces(7), mount(2), prctl(2).
"""

import ctypes
import os
import signal
import subprocess
import time
from types import FrameType
from typing import Optional

from envbuilder.sandbox_root import call

REFUSED = 125
COMPLAINT = "envbuilder's image: "
COMMAND = """\
import sys
sys.path.append(sys.argv.pop(1))
from envbuilder.env_image_enter import start
start(sys.argv[1:])
"""
"""For `python -c`; then come the folder that envbuilder is imported from, and the words."""

# linux/sched.h, linux/mount.h, linux/prctl.h
_NEWNS, _NEWUSER = 1 << 17, 1 << 28
_REC, _SLAVE = 1 << 14, 1 << 19
_PDEATHSIG = 1
_TIMEOUT_S = 60.0
_PAUSE_S = 0.005
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Refusal(Exception):
    """The image can't be mounted, and why."""


def start(words: list[str]) -> None:
    """Runs the program, and ends as it ended."""
    squashfuse, image, folder, *program = words
    user, group = os.geteuid(), os.getegid()
    try:
        _own_mounts(user, group)
        server = _mount(squashfuse, image, folder)
    except (OSError, Refusal) as error:
        os.write(2, f"{COMPLAINT}{error}\n".encode(errors="replace"))
        os._exit(REFUSED)
    try:
        code = _run(program, user, group)
    finally:
        server.kill()
        server.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _own_mounts(user: int, group: int) -> None:
    """From here on, what this process mounts is seen by it and its children alone."""
    if user == 0:
        call("unshare", _NEWNS)
    else:
        call("unshare", _NEWNS | _NEWUSER)
        _map_ids(0, user, 0, group)
    # What the machine mounts later, as automounters do, is still seen here.
    call("mount", b"none", b"/", None, ctypes.c_ulong(_REC | _SLAVE), None)


def _map_ids(user: int, outer_user: int, group: int, outer_group: int) -> None:
    """Says who this process is in its new user namespace, and who that is outside."""
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outer_user} 1"),
        ("gid_map", f"{group} {outer_group} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _mount(squashfuse: str, image: str, folder: str) -> "subprocess.Popen[bytes]":
    """Mounts the image; returns the running squashfuse, which ends with this process at the latest.

    It complains to this process's own stderr: nobody would empty a pipe of ours later, and a full one would
    stop it, and with it every program that reads the env.
    """
    before = os.stat(folder).st_dev  # noqa: PTH116
    server = subprocess.Popen(
        [squashfuse, "-f", image, folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Ctrl-C at the terminal is for the program: until it has ended, it needs its files.
        start_new_session=True,
        preexec_fn=lambda: call("prctl", _PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0),
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while os.stat(folder).st_dev == before:  # noqa: PTH116
        if server.poll() is not None:
            raise Refusal(f"{squashfuse} ended with {server.returncode}")
        if time.monotonic() > deadline:
            server.kill()
            raise Refusal(f"{squashfuse} has not mounted the image within {_TIMEOUT_S:.0f} s")
        time.sleep(_PAUSE_S)
    return server


def _run(program: list[str], user: int, group: int) -> int:
    """Runs `program` to its end; what it ended with, as `subprocess` gives it."""

    def own_ids() -> None:
        if user != 0:
            call("unshare", _NEWUSER)
            _map_ids(user, 0, group, 0)

    try:
        process = subprocess.Popen(program, preexec_fn=own_ids)
    except FileNotFoundError as error:
        os.write(2, f"{program[0]}: {error.strerror}\n".encode(errors="replace"))
        return 127
    except (OSError, subprocess.SubprocessError) as error:
        os.write(2, f"{COMPLAINT}{program[0]} can't be started: {error}\n".encode(errors="replace"))
        return REFUSED

    def pass_on(number: int, frame: Optional[FrameType]) -> None:
        process.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the terminal sends it to the program too
    return process.wait()
