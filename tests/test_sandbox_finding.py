"""Which sandbox is found, what variables a program gets in it, and what is hidden from it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.sandbox import Sandbox, find_sandbox, sandbox_environment
from envbuilder.sandbox_plan import follow, hidden_folders, secrets, steps
from envbuilder.sandbox_root import read_mounts


def test_isolation_that_is_required_and_not_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envbuilder.sandbox.COMMAND", "raise SystemExit('no')")
    monkeypatch.setattr("envbuilder.sandbox._UNSHARE", (("false",), ("no-such-program",)))
    sandbox = find_sandbox()
    assert sandbox.isolation == "none"
    assert sandbox.refused == (
        "sealed: no",
        "sealed, in a user namespace: no",
        "false: it failed",
        "no-such-program: The program no-such-program is not on this machine.",
    )
    with pytest.raises(MismatchError, match="no network namespace") as caught:
        find_sandbox(require_isolation=True)
    assert "sealed: no" in caught.value.context["tried"]


def test_an_attempt_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "unshare"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n", encoding="utf-8")
    hanging.chmod(0o755)
    monkeypatch.setattr("envbuilder.sandbox._UNSHARE", ((str(hanging),),))
    monkeypatch.setattr("envbuilder.sandbox.COMMAND", "import time; time.sleep(600)")
    monkeypatch.setattr("envbuilder.sandbox._TRIAL_TIMEOUT_S", 0.2)
    sandbox = find_sandbox()
    assert sandbox.isolation == "none"
    assert all(reason.endswith("it took too long") for reason in sandbox.refused)


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


def test_the_variables_of_a_sealed_build_name_its_own_paths(tmp_path: Path) -> None:
    sandbox = Sandbox("sealed", private=tmp_path, binds={"/build/venv": Path("/cache/venv-1")})
    folders = [Path("/cache/venv-1/bin"), Path("/opt/bin")]
    environment: Mapping[str, str] = sandbox_environment(
        {}, private=tmp_path, path=folders, keep_cuda_libraries=False, sandbox=sandbox
    )
    assert environment["PATH"].startswith("/build/venv/bin:/opt/bin:")
    assert (environment["HOME"], environment["TMPDIR"]) == ("/build/home", "/build/tmp")
    assert (tmp_path / "tmp").is_dir()


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


@pytest.mark.parametrize("home", ["/", "/usr", "/usr/bin", "/etc", "relative", "/no/such/folder", ""])
def test_a_strange_home_hides_nothing_that_programs_need(home: str) -> None:
    assert set(hidden_folders({"HOME": home})) == set(hidden_folders({}))


def test_a_home_is_hidden_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert str(tmp_path.resolve() / "real") in hidden_folders({"HOME": str(tmp_path / "link")})


def test_secrets_are_found_by_their_variables_and_sockets_by_their_names(tmp_path: Path) -> None:
    for name in ("token", "krb5cc", "not-a-socket", "a b"):
        (tmp_path / name).touch()
    (tmp_path / "a b").unlink()
    host = {
        "HF_HOME": str(tmp_path),
        "KRB5CCNAME": f"FILE:{tmp_path}/krb5cc",
        "NETRC": "relative",
        "KUBECONFIG": "/no/such/file",
        "XDG_CONFIG_HOME": "/",
    }
    table = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    for name in ("@abstract", f"{tmp_path}/not-a-socket", f"{tmp_path}/a b", f"{tmp_path}/gone"):
        table += f"0000000000000000: 00000002 00000000 00010000 0001 01 12345 {name}\n"
    table += "0000000000000000: 00000003 00000000 00000000 0001 03 12346\n"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "a b"))
        found = set(secrets(host, table)) - set(secrets({}, ""))
    real = tmp_path.resolve()
    assert found == {str(real / "token"), str(real / "krb5cc"), str(real / "a b")}


def test_links_in_a_circle_are_given_up(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        follow(str(tmp_path / "a"))
    assert steps([], ["/tmp"], [tmp_path / "a"]) == [("scratch", "/tmp", "")]


def test_steps_go_from_the_outside_in(tmp_path: Path) -> None:
    home, tool = tmp_path / "home", tmp_path / "home/tool"
    tool.mkdir(parents=True)
    made = steps([str(home)], [str(tmp_path)], [tool, Path("/usr"), tmp_path / "gone"])
    assert made == [("scratch", str(tmp_path), ""), ("hide", str(home), ""), ("show", str(tool), "")]


def test_the_upper_of_two_mounts_at_one_path_counts() -> None:
    mounts = read_mounts(
        "22 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw\n"
        "30 22 0:5 / /a\\040space ro,nosuid - tmpfs none rw\n"
        "31 30 0:6 / /a\\040space rw - proc - rw\n"
    )
    assert {path: (mounted.kind, set(mounted.options)) for path, mounted in mounts.items()} == {
        "/": ("ext4", {"rw", "relatime"}),
        "/a space": ("proc", {"rw"}),
    }
