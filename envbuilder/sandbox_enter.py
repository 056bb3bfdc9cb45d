"""Enters a sealed sandbox: no network, homes, devices or rights, a root of its own; and runs a program there.

Its words are PLAN NAME=VALUE… PROGRAM ARGUMENT…, where PLAN is JSON with the keys of `Plan`. It ends as
the program ends, with its exit status or of its signal; REFUSED, with one line that begins with COMPLAINT,
says that the program was not started. It runs in a bare interpreter (`python -I -S`, see COMMAND), with the
standard library only.

Three processes: this one stays outside and passes the status on; its child is process 1 of the new
namespaces, sets up the root, and reaps; the program is that one's child. When the first dies, the kernel ends
the rest.
Manuals: namespaces(7), user_namespaces(7), capabilities(7), prctl(2).
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from envbuilder.sandbox_root import Plan, Refusal, call, set_up_root

REFUSED = 125
COMPLAINT = "envbuilder's sandbox: "
COMMAND = """\
import sys
sys.path.append(sys.argv.pop(1))
from envbuilder.sandbox_enter import start
start(sys.argv[1:])
"""
"""For `python -c`; then come the folder that envbuilder is imported from, and the words. What is imported is
compiled once, a script each time that it runs."""

# linux/sched.h, linux/prctl.h, linux/securebits.h, linux/capability.h, linux/keyctl.h
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _SECUREBITS, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 4, 24, 28, 38, 47
_CLEAR_AMBIENT = 4
_NO_POWERS_FOR_ROOT = 0xEF  # user id 0 is like any other, for good
_CAPABILITY_VERSION_3 = 0x20080522
_KEYCTL = {"x86_64": 250, "aarch64": 219, "ppc64le": 271}
_JOIN_SESSION_KEYRING = 1


def _drop_rights() -> None:
    """Gives up every capability, and every way to get one; and the user's keys."""
    if number := _KEYCTL.get(os.uname().machine):
        with suppress(OSError):  # a kernel without keys
            call("syscall", ctypes.c_long(number), ctypes.c_long(_JOIN_SESSION_KEYRING), None)
    call("prctl", _SECUREBITS, ctypes.c_ulong(_NO_POWERS_FOR_ROOT), 0, 0, 0)
    for number in range(64):
        try:
            call("prctl", _CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break  # the kernel has no more of them
            raise
    call("prctl", _CAP_AMBIENT, ctypes.c_ulong(_CLEAR_AMBIENT), 0, 0, 0)
    call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    call("prctl", _NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)


def _loopback_up() -> None:
    """The new network's own loopback, for what a build tells itself; nothing else is on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def _die_with_parent() -> None:
    call("prctl", _PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _unshare(user_namespace: bool) -> None:
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if not user_namespace:
        call("unshare", flags)
        return
    user, group = os.geteuid(), os.getegid()
    call("unshare", flags | _NEWUSER)
    # The program keeps the user's own ids, and has no others.
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        _write(f"/proc/self/{name}", line)


def _program(plan: Plan, variables: dict[str, str], argv: list[str]) -> None:
    """Becomes the program; returns only where that fails."""
    os.chdir(plan.cwd)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is ignored is inherited
    try:
        os.execvpe(argv[0], argv, variables)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode(errors="replace"))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _first_process(plan: Plan, start: Callable[[], None], outside: int, status: int) -> None:
    """Process 1 of the namespaces: `start`s the program, and writes its wait status to `status`.

    `outside` can be read once the parent is dead.
    """
    _die_with_parent()
    if select.select([outside], [], [], 0)[0]:
        return  # it was dead before
    os.setsid()
    if plan.user_namespace:
        # The limit is that of the new user namespace: the program can't get rights in one of its own.
        with suppress(OSError):
            _write("/proc/sys/user/max_user_namespaces", "0")
    set_up_root(plan)
    socket.sethostname("build")
    _loopback_up()
    _drop_rights()
    call("prctl", _DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)  # the program may not look into this process
    program = os.fork()
    if program == 0:
        guarded(start)
    while True:
        ended, how = os.wait()
        if ended == program:
            os.write(status, struct.pack("=i", how))
            return


def _where(error: BaseException) -> str:
    """The innermost function of this file, for the message: which step the kernel refused."""
    trace, names = error.__traceback__, ["start"]
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name.strip("_"))
        trace = trace.tb_next
    return next(name for name in reversed(names) if name not in ("call", "mount"))


def guarded(work: Callable[[], None]) -> None:
    """Does `work` and ends this process: what fails is told in one line."""
    code = REFUSED
    try:
        work()
        code = 0
    except (OSError, Refusal) as error:
        os.write(2, f"{COMPLAINT}{_where(error)}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(code)


def main(words: list[str]) -> None:
    """Runs the program, and ends as it ended."""
    plan = Plan(**json.loads(words[0]))
    split = 1 + plan.variables
    variables = dict(word.split("=", 1) for word in words[1:split])
    _die_with_parent()
    if os.getppid() != plan.parent:
        return
    _unshare(plan.user_namespace)
    _die_with_parent()  # new rights can undo it

    def program() -> None:
        _program(plan, variables, words[split:])

    outside, lifeline = os.pipe()
    status, result = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(lifeline)
        os.close(status)
        guarded(lambda: _first_process(plan, program, outside, result))
    os.close(outside)
    os.close(result)
    told = os.read(status, 4)
    _, how = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(struct.unpack("=i", told)[0] if len(told) == 4 else how)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has left one, if it may
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def start(words: list[str]) -> None:
    """As `main`; never returns."""
    guarded(lambda: main(words))
