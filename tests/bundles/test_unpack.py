"""`bundle unpack`, and unpack.py on its own: everything, checked, in one step, or nothing (promise 15)."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envbuilder.bundle import open_bundle
from envbuilder.bundles import PackReport, pack_bundle, unpack, unpack_bundle, verify_bundle
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, MismatchError
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.bundles.samples import NAME, Sample, contents, sha256

SCRIPT = Path(unpack.__file__)


@dataclass
class Packed:
    """An archive, and an empty ROOT to unpack it to."""

    report: PackReport
    root: Root
    content: dict[str, bytes]
    """The bundle's."""

    @property
    def archive(self) -> Path:
        return self.report.archive

    @property
    def bundle(self) -> Path:
        return self.root.bundle(NAME)

    def is_refused(self, error: type[EnvbuilderError] = IntegrityError, **how: Any) -> EnvbuilderError:
        """The error, once it is certain that nothing was left."""
        before = everything(self.root.path) | {str(self.root.path / "bundles")}
        with pytest.raises(error) as caught:
            unpack_bundle(self.root, self.archive, Quiet(), **how)
        assert everything(self.root.path) | {str(self.root.path / "bundles")} == before
        return caught.value


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture
def packed(bundle: Bundle, tmp_path: Path) -> Packed:
    report = pack_bundle(bundle, tmp_path, Quiet())
    root = Root(tmp_path / "cluster")
    root.path.mkdir()
    return Packed(report, root, contents(bundle.path))


def run_script(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """As on a bare machine: none of Python's site packages, and nothing of ours."""

    command = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, arguments)]
    if limit is not None:
        command = [sys.executable, "-c", LIMITED, str(limit), *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


LIMITED = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_the_tool_unpacks_what_it_packed(packed: Packed) -> None:
    report = unpack_bundle(
        packed.root, packed.archive, Quiet(), manifest_sha256=packed.report.manifest_sha256
    )

    assert report.bundle == packed.bundle
    assert report.manifest_sha256 == packed.report.manifest_sha256
    assert contents(packed.bundle) == packed.content
    assert verify_bundle(packed.root, NAME, Quiet()).files == report.files - 1  # the record is none of them
    assert list(packed.bundle.parent.iterdir()) == [packed.bundle]


def test_it_unpacks_from_the_archive_alone_through_a_pipe_with_python_and_nothing_else(
    packed: Packed,
) -> None:
    done = subprocess.run(
        [
            *("sh", "-c", 'tar -xOf "$1" unpack.py | "$0" -I -S - "$1" "$2" "$3"'),
            *(sys.executable, packed.archive, packed.root.path, packed.report.manifest_sha256),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].strip() == f"python3 {packed.bundle}/start.py"
    assert contents(packed.bundle) == packed.content


def test_the_script_runs_on_python_3_9() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    newer = {"tomllib", "wsgiref.types"}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names - newer


# Edits of an archive. Each is given the archive's bytes and returns others.
Edit = Callable[[bytes], bytes]
CONFIG = f"{NAME}/models/tiny/config.json"


def offset_of(archive: bytes, name: str) -> int:
    """Of the header of member `name`."""
    return archive.index(unpack.header(name, 3)[:100])


def with_header(**fields: Any) -> Edit:
    """The header of config.json, rewritten by stock tarfile."""

    def edit(archive: bytes) -> bytes:
        start = offset_of(archive, CONFIG)
        member = tarfile.TarInfo.frombuf(archive[start : start + 512], "utf-8", "strict")
        for name, value in fields.items():
            setattr(member, name, value)
        return archive[:start] + member.tobuf(tarfile.USTAR_FORMAT) + archive[start + 512 :]

    return edit


def inserted(block: bytes, before: str = CONFIG) -> Edit:
    def edit(archive: bytes) -> bytes:
        start = offset_of(archive, before)
        return archive[:start] + block + archive[start:]

    return edit


def flipped(what: bytes) -> Edit:
    return lambda archive: archive.replace(what, bytes([what[0] ^ 1]) + what[1:])


def member(name: str, data: bytes = b"", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + data + unpack.padding(len(data))


HOSTILE: dict[str, Edit] = {
    "a symbolic link": with_header(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": with_header(type=tarfile.LNKTYPE, linkname=f"{NAME}/bundle.json"),
    "a device": with_header(type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": with_header(type=tarfile.FIFOTYPE),
    "a folder": with_header(type=tarfile.DIRTYPE),
    "an absolute name": with_header(name="/etc/cron.d/evil"),
    "a name that leads out": with_header(name=f"{NAME}/../../evil"),
    "another file's name": with_header(name=f"{NAME}/models/tiny/config.jsox"),
    "a set-user-id mode": with_header(mode=0o4755),
    "a member larger than announced": with_header(size=4),
    "a name in a PAX header": inserted(member("../" * 40 + "evil" * 20)),
    "a name in a GNU header": inserted(tarfile.TarInfo("../" * 40 + "evil" * 20).tobuf(tarfile.GNU_FORMAT)),
    "a member that the manifest doesn't name": inserted(member(f"{NAME}/evil.py", b"evil")),
    "a member twice": inserted(unpack.header(CONFIG, 3) + b"{}\n" + bytes(509)),
    "other bytes": lambda archive: archive.replace(b"{}\n" + bytes(509), b"[]\n" + bytes(509)),
    "something in the padding": lambda archive: archive.replace(b"{}\n\0", b"{}\n!"),
    "another script": flipped(b"Unpacks a bundle that `envbuilder bundle pack` made"),
    "another manifest": flipped(b'envbuilder-bundle-1",'),
    "bytes after the end": lambda archive: archive + b"x",
    "blocks after the end": lambda archive: archive + bytes(1024),
    "a member after the last": lambda archive: archive[:-1024] + member("evil", b"x") + bytes(1024),
    "no end": lambda archive: archive[:-1024],
    "half an end": lambda archive: archive[:-512],
    "nothing at all": lambda archive: b"",
    "no script": lambda archive: archive[len(archive) // 2 // 512 * 512 :],
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("through", ["a file", "a pipe"])
def test_an_archive_that_is_not_what_pack_writes_is_refused(packed: Packed, edit: Edit, through: str) -> None:
    archive = edit(packed.archive.read_bytes())
    assert archive != packed.archive.read_bytes()
    if through == "a file":
        packed.archive.write_bytes(archive)
        assert "nothing of it was unpacked" in packed.is_refused().message
    else:
        # A pipe's size isn't known beforehand: all is found out on the way.
        done = run_from_pipe(archive, packed.root)
        assert (done.returncode, done.stdout) == (5, b"")
        assert everything(packed.root.path) <= {str(packed.root.path / "bundles")}


def run_from_pipe(archive: bytes, root: Root) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, "/dev/stdin", root.path],
        input=archive,
        capture_output=True,
        check=False,
    )


def test_an_archive_cut_off_anywhere_is_refused(packed: Packed) -> None:
    whole = packed.archive.read_bytes()
    random = Random(1)
    for size in [1, 511, 512, len(whole) - 1, *(random.randrange(len(whole)) for _ in range(20))]:
        os.truncate(packed.archive, 0)
        packed.archive.write_bytes(whole[:size])
        packed.is_refused()


def repacked(packed: Packed, change: Callable[[dict[str, Any]], None]) -> None:
    """Gives the archive a changed manifest; all else in it is as it was."""
    script = SCRIPT.read_bytes()
    entries = [
        {"path": path, "size": len(data), "sha256": sha256(data)} for path, data in packed.content.items()
    ]
    table = {"format": unpack.FORMAT, "name": NAME, "script_sha256": sha256(script), "files": entries}
    change(table)
    manifest = json.dumps(table).encode()
    blocks = [("unpack.py", script), ("manifest.json", manifest)]
    blocks += [(f"{NAME}/{path}", data) for path, data in packed.content.items()]
    packed.archive.write_bytes(
        b"".join(unpack.header(name, len(data)) + data + unpack.padding(len(data)) for name, data in blocks)
        + unpack.END
    )


def entry(path: Any, **fields: Any) -> Callable[[dict[str, Any]], None]:
    new = {"path": path, "size": 4, "sha256": sha256(b"evil"), **fields}
    return lambda table: table["files"].append(new)


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "out of the bundle": entry("../evil"),
    "out of it by a detour": entry("files/../../evil"),
    "absolute": entry("/tmp/evil"),
    "an empty part": entry("files//evil"),
    "a dot": entry("./evil"),
    "a backslash": entry("files\\evil"),
    "a line feed": entry("files/e\nvil"),
    "a null": entry("files/evil\0"),
    "half a character": entry("files/evil\udc80"),
    "too long": entry("evil/" * 300 + "evil"),
    "a part too long": entry("é" * 200),
    "nothing": entry(""),
    "no text": entry(4),
    "a file twice": entry("bundle.json"),
    "beneath a file": entry("bundle.json/evil"),
    "a file that is a folder": entry("files"),
    "a negative size": entry("evil", size=-1),
    "a size that is none": entry("evil", size=True),
    "a weak hash": entry("evil", sha256="0" * 32),
    "more than path, size and sha256": entry("evil", mode=0o4755),
    "another format": lambda table: table.update(format="envbuilder-bundle-9"),
    "a name that leads out": lambda table: table.update(name="../evil"),
    "a hidden name": lambda table: table.update(name=".evil"),
    "no files": lambda table: table.update(files=None),
    "no record": lambda table: table.update(files=[{"path": "a", "size": 0, "sha256": sha256(b"")}]),
}


@pytest.mark.parametrize("change", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_manifest_that_leads_astray_is_refused(
    packed: Packed, change: Callable[[dict[str, Any]], None]
) -> None:
    repacked(packed, change)
    assert "its manifest is wrong" in packed.is_refused().message


def test_the_archive_that_these_tests_write_is_good_but_for_what_they_change(packed: Packed) -> None:
    repacked(packed, lambda table: None)
    unpack_bundle(packed.root, packed.archive, Quiet())
    assert contents(packed.bundle) == packed.content


def test_a_manifest_of_another_hash_than_the_one_given_is_refused(packed: Packed) -> None:
    assert "0" * 64 in packed.is_refused(manifest_sha256="0" * 64).message
    assert run_script(packed.archive, packed.root.path, "0" * 64).returncode == 5


def test_what_is_no_archive_or_not_there_is_refused_with_what_to_do(packed: Packed, tmp_path: Path) -> None:
    packed.archive.unlink()
    packed.is_refused(InputError)
    done = run_script(packed.archive, packed.root.path)
    assert (done.returncode, done.stdout) == (3, "")
    assert run_script(packed.archive).returncode == 2
    assert run_script("--help").stderr.endswith("python3 unpack.py NAME.tar ROOT [SHA256]\n")


@pytest.mark.parametrize("umask", [0o000, 0o077])
@pytest.mark.parametrize(
    ("parent", "folder"), [(0o2750, 0o2750), (0o2770, 0o2770), (0o770, 0o2750), (0o2777, 0o2750)]
)
def test_modes_are_fixed_whatever_the_umask(packed: Packed, umask: int, parent: int, folder: int) -> None:
    packed.root.path.chmod(parent)
    before = os.umask(umask)
    try:
        unpack_bundle(packed.root, packed.archive, Quiet())
    finally:
        os.umask(before)

    for path in [packed.bundle.parent, packed.bundle, *packed.bundle.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else 0o640), path


def test_a_bundle_that_is_there_is_replaced_as_a_whole(packed: Packed) -> None:
    unpack_bundle(packed.root, packed.archive, Quiet())
    (packed.bundle / "files/stray.whl").write_bytes(b"")
    (packed.bundle / "start.py").write_bytes(b"changed")

    unpack_bundle(packed.root, packed.archive, Quiet())

    assert contents(packed.bundle) == packed.content
    assert list(packed.bundle.parent.iterdir()) == [packed.bundle]


def test_a_bundle_that_is_there_stays_when_the_new_one_is_refused(packed: Packed) -> None:
    unpack_bundle(packed.root, packed.archive, Quiet())
    packed.archive.write_bytes(HOSTILE["other bytes"](packed.archive.read_bytes()))
    packed.is_refused()
    assert contents(packed.bundle) == packed.content


def test_a_place_that_is_not_a_bundles_is_left_alone(packed: Packed, tmp_path: Path) -> None:
    packed.bundle.parent.mkdir()
    (tmp_path / "precious").mkdir()
    packed.bundle.symlink_to(tmp_path / "precious")
    packed.is_refused(MismatchError)
    packed.bundle.unlink()
    packed.bundle.write_text("a file")
    packed.is_refused(MismatchError)
    assert packed.bundle.read_text() == "a file"


def test_a_root_that_is_a_file_is_refused(packed: Packed) -> None:
    packed.root.path.rmdir()
    packed.root.path.write_text("a file")
    packed.is_refused(MismatchError)
    assert packed.root.path.read_text() == "a file"


def test_a_folder_that_everybody_may_write_to_is_refused(packed: Packed) -> None:
    packed.bundle.parent.mkdir()
    packed.bundle.parent.chmod(0o777)
    assert packed.is_refused(MismatchError).remedy == f"chmod o-w {packed.bundle.parent}"


def test_without_room_nothing_is_left(packed: Packed) -> None:
    done = run_script(packed.archive, packed.root.path, limit=100_000)
    assert (done.returncode, done.stdout) == (7, "")
    assert "no room" in done.stderr
    assert everything(packed.root.path) == {str(packed.bundle.parent)}


def test_without_room_nothing_is_begun(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(packed.root.path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    packed.is_refused(MismatchError)
    assert everything(packed.root.path) == set()


@pytest.fixture
def fed(packed: Packed) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Starts an unpacking that has got so many of the archive's bytes, and waits for more."""
    started: list[subprocess.Popen[bytes]] = []

    def feed(size: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT, "/dev/stdin", packed.root.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(packed.archive.read_bytes()[:size])
        process.stdin.flush()
        return process

    yield feed
    for process in started:
        process.kill()
        process.communicate()


def test_killed_at_any_moment_there_is_no_bundle_or_the_old_one_and_a_second_run_converges(
    packed: Packed, fed: Callable[[int], subprocess.Popen[bytes]]
) -> None:
    random = Random(2)
    size = packed.archive.stat().st_size
    for there in (None, packed.content):
        for _ in range(6):
            process = fed(random.randrange(size))
            process.kill()
            process.wait()
            assert packed.bundle.exists() == (there is not None)
            assert there is None or contents(packed.bundle) == there
        unpack_bundle(packed.root, packed.archive, Quiet())
        assert contents(packed.bundle) == packed.content


def test_a_job_that_is_ended_tidies_up(packed: Packed, fed: Callable[[int], subprocess.Popen[bytes]]) -> None:
    # All but the end: once a pipe has taken the last of this, the reader is past what it handles at first.
    process = fed(packed.archive.stat().st_size - 2000)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert everything(packed.root.path) == {str(packed.bundle.parent)}


def test_several_at_once_all_succeed(packed: Packed) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(packed.archive), str(packed.root.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert contents(packed.bundle) == packed.content
    assert list(packed.bundle.parent.iterdir()) == [packed.bundle]


def test_an_unpacked_bundle_packs_to_the_same_archive(packed: Packed, tmp_path: Path) -> None:
    unpack_bundle(packed.root, packed.archive, Quiet())
    again = pack_bundle(open_bundle(packed.root, NAME), tmp_path / "again.tar", Quiet())
    assert again.archive.read_bytes() == packed.archive.read_bytes()


def test_a_bundle_of_no_model_is_packed_and_unpacked_too(tmp_path: Path) -> None:
    sample = Sample(Root(tmp_path / "root"), model_files={})
    bundle = sample.make()
    report = pack_bundle(bundle, tmp_path, Quiet())
    unpack_bundle(Root(tmp_path / "cluster"), report.archive, Quiet())
    assert contents(tmp_path / "cluster/bundles" / NAME) == contents(bundle.path)
