"""Trees packed from real repositories: through files, git's own HTTP server, and a static one."""

from __future__ import annotations

import hashlib
import os
import socket
import tarfile
import time
from pathlib import Path

import pytest

from envbuilder import git as git_source
from envbuilder import git_repository
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, MismatchError, NetworkError
from envbuilder.git import pack_tree
from envbuilder.git_connection import absolute_url, connect, connection_settings
from envbuilder.lock import LockedTree
from envbuilder.recipe import GitSource
from tests.lab.git_repositories import Content, GitServer, commit, git, make_repository

FILES: dict[str, Content] = {
    "setup.py": "print('setup')\n" * 9000,
    "kernels/a.cu": "code\r\n",
    "kernels/b.cu": Path("a.cu"),
    "configure": "#!/bin/sh\n",
    "naïve name": b"\x00\xff",
    "empty": "",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, whose .gitconfig is the user's."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The folder that the repositories are in."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


def pack(
    folder: Path,
    url: str,
    commit: str,
    *,
    subdirectory: str | None = None,
    tree: LockedTree | None = None,
) -> tuple[Path, LockedTree]:
    """The archive, and what it was packed from; nothing else may be left beside it."""
    destination = folder / "packed" / "lab_kernels-1.0.tar.gz"
    try:
        locked = pack_tree(
            "lab-kernels",
            GitSource(url=url, commit=commit, subdirectory=subdirectory),
            name="lab-kernels",
            version="1.0",
            destination=destination,
            tree=tree,
        )
    finally:
        assert [path for path in destination.parent.glob("*") if path != destination] == []
    return destination, locked


def members(archive: Path) -> dict[str, tuple[str, bytes | str]]:
    """Path → (mode, content), or ("link", target)."""
    found: dict[str, tuple[str, bytes | str]] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            name = member.name.removeprefix("lab_kernels-1.0/")
            assert name != member.name
            if member.issym():
                found[name] = ("link", member.linkname)
            else:
                content = tar.extractfile(member)
                assert content is not None
                found[name] = (f"{member.mode:o}", content.read())
    return found


def modules(**urls: str) -> str:
    """A .gitmodules: path → URL."""
    return "".join(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n' for path, url in urls.items())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_commit_is_packed_as_it_is_kept(served: Path, tmp_path: Path) -> None:
    made = commit(make_repository(served / "kernels.git"), FILES, executable=("configure",))
    archive, locked = pack(tmp_path, f"file://{served}/kernels.git", made)
    assert locked == LockedTree(made, {})
    assert members(archive) == {
        "configure": ("755", b"#!/bin/sh\n"),
        "empty": ("644", b""),
        "kernels/a.cu": ("644", b"code\r\n"),
        "kernels/b.cu": ("link", "a.cu"),
        "naïve name": ("644", b"\x00\xff"),
        "setup.py": ("644", str(FILES["setup.py"]).encode()),
    }


def test_the_same_commit_gives_the_same_bytes_everywhere(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commit(make_repository(served / "kernels.git"), FILES, executable=("configure",))
    git("clone", "--quiet", "--mirror", served / "kernels.git", served / "clone.git")
    git("--git-dir", served / "clone.git", "repack", "-adfq")
    one, _ = pack(tmp_path / "one", f"file://{served}/kernels.git", made)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    monkeypatch.setenv("LANG", "C")
    old = os.umask(0o077)
    try:
        other, _ = pack(tmp_path / "other", f"file://{served}/clone.git", made)
    finally:
        os.umask(old)
        monkeypatch.undo()
        time.tzset()
    assert sha256(one) == sha256(other)
    # Whatever the versions of Python, zlib and git: a lock of today must be fetched with those of tomorrow.
    assert sha256(one) == "fd37755d7c6ff163d2eb8eceb9fcda74a8efaa817f617cb6e80936349c1f6442"


def test_git_servers_and_static_ones_give_the_same(served: Path, tmp_path: Path) -> None:
    repository = make_repository(served / "kernels.git")
    made = commit(repository, FILES)
    # No branch's newest: a server may refuse to give it alone.
    commit(repository, {"setup.py": "newer"}, parent=made)
    direct, _ = pack(tmp_path / "direct", f"file://{repository}", made)
    for smart in (True, False):
        with GitServer(served, smart=smart) as server:
            archive, _ = pack(tmp_path / str(smart), f"{server.url}/kernels.git", made)
        assert sha256(archive) == sha256(direct)


def test_submodules_are_packed_in_their_places_and_recorded(served: Path, tmp_path: Path) -> None:
    inner = commit(make_repository(served / "inner.git"), {"inner.h": "inner"})
    middle = commit(
        make_repository(served / "group/middle.git"),
        {"middle.h": "m", "in": ("submodule", inner), ".gitmodules": modules(**{"in": "../../inner.git"})},
    )
    with GitServer(served) as server:
        made = commit(
            make_repository(served / "kernels.git"),
            {
                "setup.py": "s",
                "csrc/middle": ("submodule", middle),
                "absolute": ("submodule", inner),
                ".gitmodules": modules(
                    **{"csrc/middle": "../group/middle.git", "absolute": f"{server.url}/inner.git"}
                ),
            },
        )
        archive, locked = pack(tmp_path, f"{server.url}/kernels.git", made)
        submodules = {"absolute": inner, "csrc/middle": middle, "csrc/middle/in": inner}
        assert locked == LockedTree(made, submodules)
        assert {"absolute/inner.h", "csrc/middle/middle.h", "csrc/middle/in/inner.h"} < set(members(archive))
        again, _ = pack(tmp_path / "again", f"{server.url}/kernels.git", made, tree=locked)
        assert sha256(again) == sha256(archive)
        for wrong in ({**submodules, "csrc/middle/in": "0" * 40}, {**submodules, "more": inner}, {}):
            with pytest.raises(IntegrityError, match="not as locked") as caught:
                pack(tmp_path / "wrong", f"{server.url}/kernels.git", made, tree=LockedTree(made, wrong))
            assert caught.value.context["expected"] != caught.value.context["got"]


def test_a_subdirectory_becomes_the_top_and_only_its_submodules_are_fetched(
    served: Path, tmp_path: Path
) -> None:
    made = commit(
        make_repository(served / "kernels.git"),
        {
            "LICENSE": "free",
            "python/setup.py": "s",
            "python/LICENSE": Path("../LICENSE"),
            "python/link": Path("setup.py"),
            "other": ("submodule", "1" * 40),
            ".gitmodules": modules(other="../absent.git"),
        },
    )
    archive, locked = pack(tmp_path, f"file://{served}/kernels.git", made, subdirectory="python")
    assert locked.submodules == {}
    assert members(archive) == {
        "LICENSE": ("644", b"free"),
        "link": ("link", "setup.py"),
        "setup.py": ("644", b"s"),
    }
    with pytest.raises(InputError, match="no folder 'pyth'"):
        pack(tmp_path / "none", f"file://{served}/kernels.git", made, subdirectory="pyth")


def test_nothing_of_the_repository_and_of_the_users_settings_runs_or_changes_a_file(
    served: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    hook = f"#!/bin/sh\necho ran >> {canary}\n"
    (home / "hooks").mkdir()
    for name in ("reference-transaction", "post-checkout", "post-index-change", "fsmonitor-watchman"):
        (home / "hooks" / name).write_text(hook)
        (home / "hooks" / name).chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\n\thooksPath = {home}/hooks\n\tfsmonitor = {home}/hooks/fsmonitor-watchman\n"
        f"\tattributesFile = {home}/attributes\n\tautocrlf = true\n"
        f'[filter "evil"]\n\tsmudge = {home}/hooks/post-checkout\n\trequired = true\n'
        f"[init]\n\ttemplateDir = {home}/template\n[protocol]\n\tversion = 0\n"
    )
    (home / "attributes").write_text("* filter=evil\n")
    (home / "template").mkdir()
    (home / "template" / "hooks").symlink_to(home / "hooks")
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(home / "template"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_TRACE", str(canary))
    files: dict[str, Content] = {
        ".gitattributes": "* filter=evil text eol=crlf ident\n*.md export-ignore\nv export-subst\n",
        "readme.md": "$Id$\n",
        "v": "$Format:%H$\n",
        "setup.py": f"open({str(canary)!r}, 'w')",
    }
    made = commit(make_repository(served / "kernels.git"), files)
    canary.unlink(missing_ok=True)  # making the repository may trace
    archive, _ = pack(tmp_path, f"file://{served}/kernels.git", made)
    assert members(archive) == {name: ("644", str(text).encode()) for name, text in files.items()}
    assert not canary.exists()


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("link", "/etc/passwd"),
        ("link", "../out"),
        ("deep/link", "../../out"),
        ("deep/link", "../deep/../../out"),
        ("link", "nowhere"),
        ("deep/link", "."),
        ("link", "link"),
    ],
)
def test_a_link_that_leaves_the_tree_or_leads_to_nothing_in_it_is_refused(
    served: Path, tmp_path: Path, path: str, target: str
) -> None:
    made = commit(make_repository(served / "kernels.git"), {"setup.py": "s", path: Path(target)})
    with pytest.raises(InputError, match=f"the link {path} leads to") as caught:
        pack(tmp_path, f"file://{served}/kernels.git", made)
    assert "[build.lab-kernels.git]" in caught.value.remedy


@pytest.mark.parametrize("name", [".git", ".GIT", ".."])
def test_a_tree_with_names_that_no_tree_may_have_is_refused(served: Path, tmp_path: Path, name: str) -> None:
    repository = make_repository(served / "kernels.git")
    blob = git("--git-dir", repository, "hash-object", "-w", "--stdin", stdin=b"evil")
    tree = f"100644 {name}\0".encode() + bytes.fromhex(blob)
    written = git(
        "--git-dir", repository, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=tree
    )
    made = git("--git-dir", repository, "commit-tree", written, "-m", "evil")
    git("--git-dir", repository, "update-ref", "refs/heads/main", made)
    with pytest.raises(InputError, match="it has a file"):
        pack(tmp_path, f"file://{repository}", made)


def test_pointers_to_large_files_are_refused_and_named(served: Path, tmp_path: Path) -> None:
    pointer = f"version https://example.org/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    made = commit(make_repository(served / "kernels.git"), {"data/weights": pointer, "setup.py": "s"})
    with pytest.raises(InputError, match="Git LFS: data/weights"):
        pack(tmp_path, f"file://{served}/kernels.git", made)


def test_a_tree_that_is_too_large_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = commit(make_repository(served / "kernels.git"), FILES)
    for limit in ("LARGEST", "MOST_FILES"):
        with monkeypatch.context() as changed:
            changed.setattr(git_source, limit, 5)
            with pytest.raises(InputError, match="are more than"):
                pack(tmp_path, f"file://{served}/kernels.git", made)


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% canary",
        "--upload-pack=touch canary",
        "file://{served}/inner.git",
        "{served}/inner.git",
    ],
)
def test_a_submodule_cannot_run_a_program_or_name_files_of_this_machine(
    served: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = commit(make_repository(served / "inner.git"), {"inner.h": "inner"})
    files: dict[str, Content] = {"in": ("submodule", inner)}
    files[".gitmodules"] = modules(**{"in": url.format(served=served)})
    made = commit(make_repository(served / "kernels.git"), files)
    monkeypatch.chdir(tmp_path)
    with GitServer(served) as server, pytest.raises(InputError, match="doesn't fetch from"):
        pack(tmp_path, f"{server.url}/kernels.git", made)
    assert not list(tmp_path.rglob("canary"))


def test_a_submodule_of_which_nothing_says_where_it_is_from_is_refused(served: Path, tmp_path: Path) -> None:
    made = commit(make_repository(served / "kernels.git"), {"in": ("submodule", "1" * 40), "a": "a"})
    with pytest.raises(InputError, match=r"\.gitmodules doesn't say"):
        pack(tmp_path, f"file://{served}/kernels.git", made)


def test_submodules_in_a_circle_come_to_an_end(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = make_repository(served / "kernels.git")
    made = commit(repository, {"a": "a"})
    for _ in range(3):
        files: dict[str, Content] = {
            "in": ("submodule", made),
            ".gitmodules": modules(**{"in": "../kernels.git"}),
        }
        made = commit(repository, files, parent=made)
    monkeypatch.setattr(git_source, "_DEEPEST", 2)
    with pytest.raises(InputError, match="nested deeper"):
        pack(tmp_path, f"file://{repository}", made)


@pytest.mark.parametrize("smart", [True, False])
def test_a_commit_that_is_not_there_is_the_recipes_fault(served: Path, tmp_path: Path, smart: bool) -> None:
    commit(make_repository(served / "kernels.git"), FILES)
    with (
        GitServer(served, smart=smart) as server,
        pytest.raises(InputError, match="no commit 00000") as caught,
    ):
        pack(tmp_path, f"{server.url}/kernels.git", "0" * 40)
    assert "export ENVBUILDER_GIT_LAB_KERNELS_URL=URL" in caught.value.remedy


def test_a_hash_of_something_else_is_no_commit(served: Path, tmp_path: Path) -> None:
    repository = make_repository(served / "kernels.git")
    made = commit(repository, FILES)
    git(
        "--git-dir",
        repository,
        "-c",
        "user.name=Lab",
        "-c",
        "user.email=l@example.org",
        "tag",
        "-m",
        "t",
        "v1",
        made,
    )
    tag = git("--git-dir", repository, "rev-parse", "v1")
    with pytest.raises(InputError, match="no commit"):
        pack(tmp_path, f"file://{repository}", tag)


def test_what_cannot_be_reached_is_the_networks_fault(served: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/kernels.git", f"file://{served}/absent.git"):
        with pytest.raises(NetworkError, match="can't be fetched") as caught:
            pack(tmp_path, url, "0" * 40)
        assert caught.value.context["url"] == url
        assert "fatal:" in caught.value.context["git"]


def test_a_server_that_says_nothing_is_given_up(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_repository, "_SILENCE_S", 0.3)
    with GitServer(served, silent=True) as server, pytest.raises(NetworkError, match="said nothing"):
        pack(tmp_path, f"{server.url}/kernels.git", "0" * 40)


def test_a_mirror_can_stand_in_and_its_password_is_shown_and_kept_nowhere(
    served: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = commit(make_repository(served / "inner.git"), {"inner.h": "inner"})
    files: dict[str, Content] = {"in": ("submodule", inner), ".gitmodules": modules(**{"in": "../inner.git"})}
    made = commit(make_repository(served / "kernels.git"), files)
    (home / ".gitconfig").write_text(f"[credential]\n\thelper = store --file {home}/stored\n")
    with GitServer(served, login=("me", "s3cret/%")) as server:

        def mirror(password: str, path: str = "kernels.git") -> None:
            url = server.url.replace("://", f"://me:{password}@")
            monkeypatch.setenv("ENVBUILDER_GIT_LAB_KERNELS_URL", f"{url}/{path}")

        mirror("s3cret%2F%25")
        archive, _ = pack(tmp_path, "https://example.org/lab/kernels.git", made)
        assert set(members(archive)) == {".gitmodules", "in/inner.h"}
        for password, path in (("wr0ng", "kernels.git"), ("s3cret%2F%25", "absent.git")):
            mirror(password, path)
            with pytest.raises(EnvbuilderError) as caught:
                pack(tmp_path / "not", "https://example.org/lab/kernels.git", made)
            assert password not in str(caught.value.to_json())
            assert caught.value.context["url"] == f"{server.url}/{path}"
    assert not (home / "stored").exists()


def test_a_bad_mirror_is_refused_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("https://me:s3cret@", "ext::sh -c true", "/srv/kernels.git", "-u"):
        monkeypatch.setenv("ENVBUILDER_GIT_LAB_KERNELS_URL", url)
        with pytest.raises(InputError, match="none that envbuilder fetches from") as caught:
            pack(tmp_path, "https://example.org/lab/kernels.git", "0" * 40)
        assert "s3cret" not in str(caught.value.to_json())


def test_the_users_credential_helper_and_other_addresses_are_used(
    served: Path, tmp_path: Path, home: Path
) -> None:
    made = commit(make_repository(served / "kernels.git"), {"setup.py": "s"})
    with GitServer(served, login=("me", "s3cret")) as server:
        host = server.url.removeprefix("http://")
        (home / "stored").write_text(f"http://me:s3cret@{host}\n")
        (home / ".gitconfig").write_text(
            f"[credential]\n\thelper = store --file {home}/stored\n"
            f'[url "{server.url}/"]\n\tinsteadOf = https://example.org/lab/\n'
        )
        pack(tmp_path, "https://example.org/lab/kernels.git", made)


def test_no_one_is_asked_for_a_password(served: Path, tmp_path: Path) -> None:
    commit(make_repository(served / "kernels.git"), {"setup.py": "s"})
    with GitServer(served, login=("me", "s3cret")) as server, pytest.raises(NetworkError) as caught:
        pack(tmp_path, f"{server.url}/kernels.git", "0" * 40)
    assert "terminal prompts disabled" in caught.value.context["git"]


def test_without_git_the_remedy_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MismatchError, match="git is not on this machine"):
        pack(tmp_path, "https://example.org/lab/kernels.git", "0" * 40)


@pytest.mark.parametrize(
    ("parent", "url", "expected"),
    [
        ("https://example.org/a/b.git", "../c.git", "https://example.org/a/c.git"),
        ("https://example.org/a/b.git/", "../../c/d.git", "https://example.org/c/d.git"),
        ("https://example.org/a/b", "./c", "https://example.org/a/b/c"),
        ("git@example.org:a/b.git", "../c.git", "git@example.org:a/c.git"),
        ("git@example.org:b.git", "../c.git", "git@example.org:c.git"),
        ("ssh://git@example.org/a/b.git", "https://example.org/c", "https://example.org/c"),
    ],
)
def test_relative_submodule_urls_are_read_as_git_reads_them(parent: str, url: str, expected: str) -> None:
    assert absolute_url(parent, url) == expected


def test_credentials_of_the_url_and_of_the_settings_stay_off_the_command_lines(
    served: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".gitconfig").write_text("[http]\n\textraHeader = X-Token: s3cret\n")
    made = commit(make_repository(served / "kernels.git"), {"setup.py": "s"})
    real = git("--exec-path")
    seen = tmp_path / "seen"
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "git"
    # Notes the command line and the variables that a process list may show.
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {seen}\nenv >> {seen}\nexec {real}/git "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with GitServer(served, login=("me", "s3cret")) as server:
        url = server.url.replace("://", "://me:s3cret@")
        git_source.pack_tree(
            "lab-kernels",
            GitSource.model_construct(url=f"{url}/kernels.git", commit=made, subdirectory=None),
            name="lab-kernels",
            version="1.0",
            destination=tmp_path / "out.tar.gz",
            tree=None,
        )
    assert "fetch" in seen.read_text()
    assert "s3cret" not in seen.read_text()


def test_the_settings_taken_from_the_user_are_those_of_the_connection(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".gitconfig").write_text(
        "[http]\n\tproxy = http://proxy.example.org:3128\n\tsslVerify\n"
        '[http "https://example.org/a\\\\b"]\n\textraHeader = "X: \\"y\\" \\\\ # ; z "\n\textraHeader = two\n'
        "[core]\n\tsshCommand = ssh -i key\n\tpager = less\n[alias]\n\tfetch = !evil\n[user]\n\tname = me\n"
    )
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    settings = [
        ("http.proxy", "http://proxy.example.org:3128"),
        ("http.sslverify", "true"),
        ("http.https://example.org/a\\b.extraheader", 'X: "y" \\ # ; z '),
        ("http.https://example.org/a\\b.extraheader", "two"),
        ("core.sshcommand", "ssh -i key"),
    ]
    assert connection_settings() == settings
    # What git is given says the same.
    connection = connect(tmp_path, "lab", "https://example.org/a", variable="V")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", connection.environment["GIT_CONFIG_GLOBAL"])
    assert connection_settings() == settings
    assert "GIT_SSH_COMMAND" not in connection.environment
