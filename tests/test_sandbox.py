from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

import envbuilder
from envbuilder.errors import MismatchError
from envbuilder.process import Completed
from envbuilder.sandbox import Sandbox, find_sandbox, sandbox_environment
from tests import canary

PYTHON = (Path(sys.executable), Path(sys.base_prefix), Path(sys.prefix))
"""What has to be readable for this interpreter to run in a sandbox, wherever it is."""
CANARY = Path(canary.__file__)
PATIENCE = 120.0
"""Seconds after which a test that waits has failed, on a machine however busy."""


@pytest.fixture
def sealed() -> Sandbox:
    sandbox = find_sandbox()
    if sandbox.isolation != "sealed":
        pytest.skip(f"this kernel refuses: {sandbox.refused}")
    return sandbox


@pytest.fixture
def private(tmp_path: Path) -> Path:
    folder = tmp_path / "root/cache/build"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with secrets in it."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".netrc").write_text("secret", encoding="utf-8")
    (home / ".ssh/id").write_text("secret", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    return home


def run(sandbox: Sandbox, script: str, log: Path, **variables: str) -> Completed:
    """Runs the shell `script` in `sandbox`, in its private folder."""
    env = {"PATH": os.defpath, **variables}
    return sandbox.run(["sh", "-c", script], env=env, cwd=sandbox.private or Path("/"), log=log)


SOURCES = Path(__file__).parent.parent


def in_tmp(*paths: Path) -> set[str]:
    """What of /tmp leads to those of `paths` that lie there: the tests' own places may."""
    return {path.parts[2] for path in paths if path.parts[1:2] == ("tmp",)}


def test_a_sealed_build_can_do_nothing_but_build(
    sealed: Sandbox, private: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret", encoding="utf-8")
    # In a place that is not hidden as a whole: only this file is.
    shown = tmp_path / "shown"
    (shown / "deep").mkdir(parents=True)
    (shown / "deep/file").write_text("open", encoding="utf-8")
    (shown / "kubeconfig").write_text("secret", encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(shown / "kubeconfig"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    sandbox = sealed.for_build(private, readable=[*PYTHON, CANARY, shown])
    variables = sandbox_environment(
        os.environ, private=private, path=[], keep_cuda_libraries=False, sandbox=sandbox
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as service,
    ):
        for unix, address in (
            (abstract, f"\0envbuilder-test-{os.getpid()}"),
            (named, str(shown / "agent.sock")),
            (service, str(private / "service.sock")),
        ):
            unix.bind(address)
            unix.listen()
        paths = (home, home / ".netrc", home / ".ssh/id", tmp_path / "token", shown / "deep/file")
        wishes = {
            "read": [*map(str, paths), str(shown / "kubeconfig"), "/run", "/etc/shadow"],
            "write": [
                *(
                    "/new",
                    "/etc/new",
                    "/usr/new",
                    "/run/new",
                    "/dev/new",
                    "/home/new",
                    "/root/new",
                    "/sys/new",
                ),
                *("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/self/comm"),
                *(str(private / "new"), str(shown / "deep/file"), str(Path(sys.prefix) / "new"), str(CANARY)),
                *("/build/new", "/tmp/new", "/var/tmp/new", "/dev/shm/new"),
            ],
            "ports": [str(server.getsockname()[1])],
            "sockets": [f"\0envbuilder-test-{os.getpid()}", str(shown / "agent.sock"), "/build/service.sock"],
            "mounts": ["/", "/usr", "/etc", "/home", "/proc", str(shown), str(shown / "kubeconfig")],
        }
        done = sandbox.run(
            [sys.executable, "-I", "-S", CANARY, json.dumps(wishes)],
            env=variables,
            cwd=private,
            log=tmp_path / "log",
        )
    assert done.returncode == 0, done.output
    assert done.argv[0] == sys.executable
    could = json.loads(done.output)
    assert could["reads"] == [str(shown / "deep/file")]
    assert could["writes"] == ["/build/new", "/tmp/new", "/var/tmp/new", "/dev/shm/new"]
    assert could["connects"] == ["/build/service.sock"]
    assert could["processes"] == 2  # what reaps, and the program
    assert {key: could["environment"].get(key) for key in variables} == variables
    assert could["environment"].keys() - variables.keys() <= {"LC_CTYPE"}
    assert set(could["rights"]) == {"0" * 16}
    assert could["devices"] == ["/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"]
    assert could["ids"] == [os.getuid(), os.getuid(), os.getgid()]
    assert could["cwd"] == "/build"
    assert could["undone"] == []
    # /tmp is empty but for what is to be readable and for what the program itself has put there.
    assert set(could["tmp"]) <= {"new", "device", *in_tmp(tmp_path, Path(sys.prefix), Path.home(), SOURCES)}
    assert (variables["HOME"], variables["TMPDIR"]) == ("/build/home", "/build/tmp")
    assert sorted(path.name for path in private.iterdir()) == ["home", "new", "service.sock", "tmp"]


def test_temporary_files_are_gone_with_the_program(sealed: Sandbox, private: Path, tmp_path: Path) -> None:
    sandbox = sealed.for_build(private)
    name = f"envbuilder-test-{os.getpid()}"
    run(sandbox, f"touch /tmp/{name} /dev/shm/{name} kept", tmp_path / "log")
    *found, tmp = run(sandbox, "ls /dev/shm /build; echo; ls /tmp", tmp_path / "log").output.split("\n\n")
    assert " ".join(found).split() == ["/build:", "kept", "/dev/shm:"]
    assert set(tmp.split()) <= in_tmp(Path(sys.prefix), Path.home(), SOURCES)
    assert not Path("/tmp", name).exists()


def test_what_is_bound_into_a_build_is_read_only_and_known_by_its_place_there(
    sealed: Sandbox, private: Path, tmp_path: Path
) -> None:
    venv, link = tmp_path / "buildenvs/some-venv", tmp_path / "link"
    venv.mkdir(parents=True)
    (venv / "tool").write_text("tool", encoding="utf-8")
    link.symlink_to(venv)
    sandbox = sealed.for_build(
        private, binds={"/build/venv": link, "/build/deep/tool": venv / "tool"}, readable=[]
    )
    done = run(sandbox, "cat venv/tool deep/tool; touch venv/new || echo refused", tmp_path / "log")
    assert done.output.startswith("tooltool")
    assert done.output.endswith("refused\n")
    assert not (venv / "new").exists()
    for host, inside in (
        (private, "/build"),
        (private / "tmp/x.o", "/build/tmp/x.o"),
        (link / "bin/python", "/build/venv/bin/python"),
        (venv / "bin/python", "/build/venv/bin/python"),
        (Path("/usr/bin/cc"), "/usr/bin/cc"),
        (Path("/build/x"), "/build/x"),
    ):
        assert sandbox.inside(host) == Path(inside)
    assert sandbox.outside("/build/venv/bin/python") == link / "bin/python"
    assert sandbox.outside("/build/tmp/../x.o") == private / "x.o"
    assert sandbox.outside("/build/../etc/passwd") == Path("/etc/passwd")
    assert sandbox.outside("/buildings/x") == Path("/buildings/x")
    assert sandbox.outside("/usr/bin/cc") == Path("/usr/bin/cc")


@pytest.mark.parametrize("name", ["/build", "/build/../etc", "/etc/x", "venv", "/build/a//b"])
def test_only_places_below_build_can_be_bound(private: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        Sandbox("sealed").for_build(private, binds={name: private})


def test_a_link_that_a_build_left_is_not_followed_when_the_next_one_is_entered(
    sealed: Sandbox, private: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (private / "venv").symlink_to(victim)
    sandbox = sealed.for_build(private, binds={"/build/venv/deep": tmp_path})
    with pytest.raises(MismatchError, match="can't be entered") as caught:
        run(sandbox, "true", tmp_path / "log")
    assert "/build/venv/deep is no place" in caught.value.context["reason"]
    assert list(victim.iterdir()) == []


def test_in_weaker_kinds_paths_stay_and_a_link_leads_to_what_is_bound(private: Path, tmp_path: Path) -> None:
    sandbox = find_sandbox(strongest="none").for_build(private, binds={"/build/a/venv": tmp_path})
    assert sandbox.isolation == "none"
    assert (private / "a/venv").samefile(tmp_path)
    assert sandbox.for_build(private, binds={"/build/a/venv": tmp_path}).inside(private) == private
    assert sandbox.outside(str(private / "x")) == private / "x"
    assert run(sandbox, "pwd", tmp_path / "log").output == f"{private}\n"


def test_what_is_needed_of_a_home_is_shown_links_and_all(
    sealed: Sandbox, private: Path, home: Path, tmp_path: Path
) -> None:
    (home / "pythons/3.11/bin").mkdir(parents=True)
    (home / "pythons/3.11/bin/python").write_text("python", encoding="utf-8")
    (home / "pythons/other").mkdir()
    (home / "current").symlink_to("pythons/3.11")
    (home / "absolute").symlink_to(home / "current")
    readable = [home / "absolute/bin", home / "missing", home / ".ssh/../pythons/3.11/bin/python"]
    sandbox = sealed.for_build(private, readable=readable)
    script = f"cd {home} && cat absolute/bin/python && ls -A . pythons && touch pythons/new"
    assert run(sandbox, script, tmp_path / "log").output.split()[:8] == [
        *("python.:", "absolute", "current", "pythons"),
        *("pythons:", "3.11", "touch:", "cannot"),
    ]


def test_a_home_within_what_is_readable_stays_hidden(
    sealed: Sandbox, private: Path, home: Path, tmp_path: Path
) -> None:
    (home / "compiler").mkdir()
    sandbox = sealed.for_build(private, readable=[tmp_path, home / "compiler"])
    assert run(sandbox, f"ls -A {home}", tmp_path / "log").output == "compiler\n"


def test_a_whole_home_is_not_shown(sealed: Sandbox, private: Path, home: Path) -> None:
    with pytest.raises(MismatchError, match="whole of") as caught:
        sealed.for_build(private, readable=[home])
    assert caught.value.context == {"folder": str(home)}


def test_variables_and_words_pass_through_unchanged(sealed: Sandbox, private: Path, tmp_path: Path) -> None:
    sandbox = sealed.for_build(private)
    strange = "ä =\n\udcff"
    done = sandbox.run(
        ["sh", "-c", 'printf %s "$X$1" | od -An -tx1', "sh", strange],
        env={"PATH": os.defpath, "X": strange, "LD_LIBRARY_PATH": "/nowhere", "LC_ALL": "C"},
        cwd=private,
        log=tmp_path / "log",
    )
    assert bytes.fromhex(done.output.replace(" ", "")) == 2 * os.fsencode(strange)


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), ("kill -KILL $$", -signal.SIGKILL), ("no-such", 127)],
)
def test_a_program_ends_as_it_would_without_a_sandbox(
    sealed: Sandbox, private: Path, tmp_path: Path, script: str, status: int
) -> None:
    assert run(sealed.for_build(private), script, tmp_path / "log").returncode == status


def test_a_program_that_is_not_there_is_named(sealed: Sandbox, private: Path, tmp_path: Path) -> None:
    done = sealed.for_build(private).run(["no-such-program"], env={}, cwd=private, log=tmp_path / "log")
    assert done.returncode == 127
    assert done.output == "no-such-program: No such file or directory\n"


def test_no_ended_process_stays(sealed: Sandbox, private: Path, tmp_path: Path) -> None:
    # The middle process ends at once, and its child becomes nobody's. It may stay for a moment.
    script = """
        sh -c 'true & exit'
        for turn in $(seq 1000); do
            cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z ' || exit 0
            sleep 0.01
        done
        exit 1
    """
    assert run(sealed.for_build(private), script, tmp_path / "log").returncode == 0


def test_a_private_folder_that_is_gone_is_told(sealed: Sandbox, tmp_path: Path) -> None:
    sandbox = sealed.for_build(tmp_path / "gone")
    with pytest.raises(MismatchError, match="can't be entered") as caught:
        sandbox.run(["true"], env={"PATH": os.defpath}, cwd=tmp_path / "gone", log=tmp_path / "log")
    assert "No such file" in caught.value.context["reason"]


def test_two_programs_share_the_private_folder_at_once(
    sealed: Sandbox, private: Path, tmp_path: Path
) -> None:
    sandbox = sealed.for_build(private, binds={"/build/venv": Path("/usr")})
    os.mkfifo(private / "pipe")
    code = "import sys; from tests.test_sandbox import *; "
    code += f"s = find_sandbox().for_build(Path({str(private)!r}), binds={{'/build/venv': Path('/usr')}}); "
    code += f"run(s, 'echo hello > pipe', Path({str(tmp_path / 'log2')!r}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=CANARY.parent.parent):
        assert run(sandbox, "cat pipe", tmp_path / "log").output == "hello\n"


def test_a_program_in_a_network_namespace_reaches_nothing(tmp_path: Path) -> None:
    sandbox = find_sandbox(strongest="network-namespace")
    code = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = sandbox.run(
            [sys.executable, "-c", code, str(server.getsockname()[1])],
            env=dict(os.environ),
            cwd=tmp_path,
            log=tmp_path / "log",
        )
    assert (done.returncode == 0) == (sandbox.isolation == "none")


def test_output_goes_to_the_log_and_to_the_listener_line_by_line(tmp_path: Path) -> None:
    lines: list[str] = []
    find_sandbox().for_build(tmp_path).run(
        ["sh", "-c", "echo one; echo two >&2"],
        env={"PATH": os.defpath},
        cwd=tmp_path,
        log=tmp_path / "log",
        on_line=lines.append,
    )
    assert lines == ["one\n", "two\n"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\ntwo\n"


@pytest.fixture(params=["sealed", "network-namespace"])
def of_both_kinds(request: pytest.FixtureRequest, private: Path) -> Sandbox:
    sandbox = find_sandbox(strongest=request.param)
    if sandbox.isolation != request.param:
        pytest.skip(f"this kernel refuses: {sandbox.refused}")
    return sandbox.for_build(private)


def test_what_a_stopped_program_had_started_ends_with_it(of_both_kinds: Sandbox, tmp_path: Path) -> None:
    # As ninja does: the child has a process group of its own, which a signal to the parent's misses.
    word = f"98765{os.getpid()}"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of_both_kinds.run(
            ["sh", "-c", f"setsid sleep {word} & echo started; wait"],
            env={"PATH": os.defpath},
            cwd=tmp_path if of_both_kinds.isolation != "sealed" else Path("/build"),
            log=tmp_path / "log",
            on_line=stop,
        )
    assert ends(word)


def test_what_a_killed_tool_had_started_ends_with_it(sealed: Sandbox, private: Path, tmp_path: Path) -> None:
    word = f"87654{os.getpid()}"
    code = f"""
        import os, sys
        from pathlib import Path
        from envbuilder.sandbox import find_sandbox
        folder = Path({str(private)!r})
        find_sandbox().for_build(folder).run(
            ["sh", "-c", "setsid sleep {word} & touch started; wait"],
            env={{"PATH": os.defpath}}, cwd=folder, log=Path({str(tmp_path / "log")!r}),
        )
    """
    home = Path(envbuilder.__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=home) as tool:
        deadline = time.monotonic() + PATIENCE
        while not ((private / "started").exists() and is_running(word)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        tool.kill()
    assert ends(word)


def ends(word: str) -> bool:
    """Waits until no process of this machine has `word` on its command line; False where one stays."""
    deadline = time.monotonic() + PATIENCE
    while is_running(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_running(word: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if any(word in part.decode(errors="replace") for part in path.read_bytes().split(b"\0")):
                return True
    return False
