from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.sandbox import find_sandbox, sandbox_environment

NETWORKED = ["python3", "-c", "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])))"]


def test_a_program_in_a_network_namespace_reaches_nothing(tmp_path: Path) -> None:
    sandbox = find_sandbox()
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = sandbox.run(
            [*NETWORKED, str(server.getsockname()[1])],
            env=dict(os.environ),
            cwd=tmp_path,
            log=tmp_path / "log",
        )
    assert (done.returncode == 0) == (sandbox.isolation == "none")


def test_output_goes_to_the_log_and_to_the_listener_line_by_line(tmp_path: Path) -> None:
    lines: list[str] = []
    find_sandbox().run(
        ["sh", "-c", "echo one; echo two >&2"],
        env={"PATH": os.defpath},
        cwd=tmp_path,
        log=tmp_path / "log",
        on_line=lines.append,
    )
    assert lines == ["one\n", "two\n"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\ntwo\n"


def test_what_a_stopped_program_had_started_ends_with_it(tmp_path: Path) -> None:
    # As ninja does: the child has a process group of its own, which a signal to the parent's misses.
    command = "setsid sleep 987654 & echo started; wait"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    sandbox = find_sandbox()
    if sandbox.isolation == "none":
        pytest.skip("this kernel gives no namespaces")
    with pytest.raises(KeyboardInterrupt):
        sandbox.run(
            ["sh", "-c", command], env=dict(os.environ), cwd=tmp_path, log=tmp_path / "log", on_line=stop
        )
    deadline = time.monotonic() + 10
    while _is_running("987654"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(word: str) -> bool:
    """Whether any process of this machine has `word` on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if word.encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def test_isolation_that_is_required_and_not_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envbuilder.sandbox._UNSHARE", (("false",), ("no-such-program",)))
    assert find_sandbox().isolation == "none"
    with pytest.raises(MismatchError, match="no network namespace"):
        find_sandbox(require_isolation=True)


def test_an_unshare_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "unshare"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n", encoding="utf-8")
    hanging.chmod(0o755)
    monkeypatch.setattr("envbuilder.sandbox._UNSHARE", ((str(hanging),),))
    monkeypatch.setattr("envbuilder.sandbox._TRIAL_TIMEOUT_S", 0.2)
    assert find_sandbox().isolation == "none"


def test_only_what_a_compiler_needs_passes_from_the_host(tmp_path: Path) -> None:
    host = {
        "PATH": "/modules/gcc/bin:/usr/bin",
        "CPATH": "/modules/include",
        "LIBRARY_PATH": "/modules/lib",
        "HOME": "/home/someone",
        "HF_TOKEN": "secret",
        "PIP_INDEX_URL": "https://user:password@mirror",
        "PYTHONPATH": "/elsewhere",
        "LANG": "de_DE",
    }
    environment = sandbox_environment(
        host, private=tmp_path, path=[Path("/venv/bin")], keep_cuda_libraries=False
    )
    assert environment["PATH"].split(":")[:3] == ["/venv/bin", "/modules/gcc/bin", "/usr/bin"]
    assert environment["CPATH"] == "/modules/include"
    assert environment["LC_ALL"] == "C.UTF-8"
    assert environment.keys().isdisjoint({"HF_TOKEN", "PIP_INDEX_URL", "PYTHONPATH"})
    for name in ("HOME", "TMPDIR"):
        assert Path(environment[name]).is_relative_to(tmp_path)
        assert Path(environment[name]).is_dir()


def test_a_module_with_cuda_does_not_shadow_the_wheels_libraries(tmp_path: Path) -> None:
    cuda, gcc = tmp_path / "cuda", tmp_path / "gcc"
    for folder in (cuda, gcc):
        folder.mkdir()
    (cuda / "libcudart.so.12").touch()
    host = {"LD_LIBRARY_PATH": f"{cuda}:{gcc}:"}

    def library_path(*, keep: bool) -> str:
        return sandbox_environment(host, private=tmp_path, path=[], keep_cuda_libraries=keep)[
            "LD_LIBRARY_PATH"
        ]

    assert library_path(keep=False) == str(gcc)
    assert library_path(keep=True) == f"{cuda}:{gcc}:"
