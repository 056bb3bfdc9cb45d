"""An env as one squashfs file, with Debian's squashfs-tools and squashfuse: made, mounted, unpacked, used.

As root: one of the tests is an ordinary user. The env's interpreter is the system's, which that user may run.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import envbuilder
from envbuilder.env_image import EnvImage, env_receipt, find_squashfuse, usable_env, way_here
from envbuilder.env_image_enter import COMMAND
from envbuilder.errors import IntegrityError, TrainingError
from envbuilder.image.make import ImageReport
from envbuilder.kept_images import marker_of
from envbuilder.paths import Root
from envbuilder.report import Quiet
from envbuilder.train import run_training
from tests.lab.images import SYSTEM_PYTHON, make_tiny_image, need_fuse

pytestmark = pytest.mark.lab

USER = 61_008


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ImageReport:
    need_fuse()
    return make_tiny_image(tmp_path_factory.mktemp("image") / "made")


@pytest.fixture
def root(made: ImageReport, tmp_path: Path) -> Iterator[Root]:
    """A ROOT of its own with the image; no mount and no process stays behind."""
    root = Root(tmp_path / "root")
    shutil.copytree(made.image.path.parent, root.images)
    yield root
    assert "squashfuse" not in Path("/proc/self/mounts").read_text()
    assert not squashfuses_of(root)


def squashfuses_of(root: Root) -> list[int]:
    """The processes of this machine that serve an image of `root`."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if b"squashfuse" in words[0] and any(word.startswith(os.fsencode(root.path)) for word in words):
            found.append(int(line.parent.name))
    return found


def image_in(root: Root) -> EnvImage:
    image = env_receipt(root, "tiny")[1]
    assert image is not None
    return image


def envbuilder_in(root: Root, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "envbuilder", "--root", root.path, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def only_unsquashfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node without squashfuse; returns the folder for temporary files."""
    (tmp_path / "bin").mkdir()
    unsquashfs = shutil.which("unsquashfs")
    assert unsquashfs is not None
    (tmp_path / "bin/unsquashfs").symlink_to(unsquashfs)
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return tmp_path / "node"


def train(root: Root, body: str, *, processes: int = 1) -> Path:
    """Trains with the config `body`, lines of Python that the stand-in runs; returns the run."""
    config = root.path / "small.yaml"
    config.write_text(body)
    report = run_training(
        config,
        root=root,
        recipe_name="tiny",
        processes=processes,
        overrides=(),
        run_name=None,
        reporter=Quiet(),
    )
    return report.run


def test_the_same_wheels_give_the_same_bytes_wherever_and_whenever(made: ImageReport, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = make_tiny_image(tmp_path / "a place of another depth" / "again")
    finally:
        os.umask(before)
    assert again.image.receipt.sha256 == made.image.receipt.sha256
    assert again.image.path.read_bytes() == made.image.path.read_bytes()


def test_the_shared_disk_gets_the_image_and_its_receipt_alone(made: ImageReport) -> None:
    image = made.image
    assert {path.name for path in image.path.parent.iterdir()} == {image.path.name, "tiny.json"}
    assert image.path.name == f"tiny-{image.receipt.sha256[:12]}.squashfs"
    assert image.path.stat().st_mode & 0o777 == 0o440
    assert not Root(image.path.parent.parent).env("tiny").exists()
    assert image.receipt.plain_files > 20
    assert image.receipt.plain_bytes > image.receipt.size == image.path.stat().st_size


def test_a_run_trains_in_the_mounted_image_which_nobody_else_sees(root: Root) -> None:
    run = train(
        root,
        "import one\nplaces = {'prefix': sys.prefix, 'one': one.__file__, 'cached': one.__cached__}\n"
        "(run / 'places.json').write_text(json.dumps(places))\n"
        "(run / 'mounts').write_text(pathlib.Path('/proc/self/mounts').read_text())\noutcome('finished', 0)",
    )
    places = json.loads((run / "places.json").read_text())
    prefix = Path("/tmp", f"envbuilder-{os.getuid()}", "envs/tiny")
    assert Path(places["prefix"]) == prefix
    assert Path(places["one"]).is_relative_to(prefix)
    assert f" {prefix} fuse.squashfuse" in (run / "mounts").read_text()
    assert list(prefix.iterdir()) == []
    stamp = json.loads((run / "stamp.json").read_text())
    assert stamp["env"] == f"sha256:{image_in(root).receipt.sha256}"
    assert stamp["env is of"] == "the image"


def test_modules_are_compiled_in_the_image(root: Root) -> None:
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        told = subprocess.run(
            [*used.python, "-v", "-c", "import one"], capture_output=True, text=True, check=True
        )
    assert "one.cpython" in told.stderr
    assert any("matches" in line and "one.py" in line for line in told.stderr.splitlines())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_leaves_no_mount(root: Root, processes: int) -> None:
    with pytest.raises(TrainingError):
        train(root, "sys.exit(3)", processes=processes)


def test_one_changed_byte_is_refused_and_nothing_is_run(root: Root) -> None:
    path = image_in(root).path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256 differs"):
        train(root, "outcome('finished', 0)")
    assert not root.run("small").exists()


def test_two_at_once_never_meet(root: Root) -> None:
    """Each has a mount of its own: the first one's end takes nothing from the second."""
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        words = [*used.python, "-c", "input(); import one; one.main()"]
        first, second = (
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        )
        for process in (first, second):
            out, _ = process.communicate("\n", timeout=240)
            assert (process.returncode, out) == (0, "one runs\n")


def test_nothing_can_be_written_into_the_mounted_env(root: Root) -> None:
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        done = subprocess.run(
            [*used.launcher, "touch", used.folder / "lib/new"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert "Read-only" in done.stderr


@pytest.mark.parametrize("ended", ["exit", "signal"])
def test_the_program_s_own_end_is_passed_on(root: Root, ended: str) -> None:
    body = {"exit": "raise SystemExit(75)", "signal": "import os; os.kill(os.getpid(), 9)"}[ended]
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        done = subprocess.run([*used.python, "-c", body], check=False)
    assert done.returncode == {"exit": 75, "signal": -signal.SIGKILL}[ended]


def test_what_mounts_ends_with_the_killed_launcher(root: Root) -> None:
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        # The program is in a session of its own, as torchrun's workers are, and waits for its input's end.
        words = [*used.launcher, "setsid", "sh", "-c", "echo ready; read line"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (server,) = squashfuses_of(root)
        watched = os.pidfd_open(server)
        process.kill()
        process.communicate()
        ended, _, _ = select.select([watched], [], [], 60)
        os.close(watched)
        assert ended


def test_a_node_without_squashfuse_unpacks_for_the_run_and_removes_it(
    root: Root, only_unsquashfs: Path
) -> None:
    run = train(root, "import one\n(run / 'place').write_text(one.__file__)\noutcome('finished', 0)")
    assert Path((run / "place").read_text()).is_relative_to(only_unsquashfs)
    assert list(only_unsquashfs.iterdir()) == []
    assert json.loads((run / "stamp.json").read_text())["env"] == f"sha256:{image_in(root).receipt.sha256}"
    with pytest.raises(TrainingError):
        train(root, "(run / 'outcome.json').unlink(missing_ok=True)\nsys.exit(3)")
    assert list(only_unsquashfs.iterdir()) == []


def test_what_a_killed_job_has_unpacked_is_removed_by_the_next_and_a_living_one_s_is_not(
    root: Root, only_unsquashfs: Path
) -> None:
    abandoned = only_unsquashfs / "envbuilder-env-tiny-dead" / "tiny"
    abandoned.mkdir(parents=True)
    with usable_env(root, "tiny", image_in(root), Quiet()) as first:
        assert not abandoned.exists()
        with usable_env(root, "tiny", image_in(root), Quiet()) as second:
            assert first.folder != second.folder
            assert (first.folder / "envbuilder.json").is_file()
    assert list(only_unsquashfs.iterdir()) == []


def test_the_env_works_wherever_it_is_and_names_no_place(root: Root, only_unsquashfs: Path) -> None:
    with usable_env(root, "tiny", image_in(root), Quiet()) as used:
        done = subprocess.run(
            [used.folder / "bin/one"], env={"PATH": os.defpath}, capture_output=True, check=True
        )
        assert done.stdout == b"one runs\n"
        scratch = os.fsencode(tempfile.gettempdir())
        for path in used.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                assert b"/tmp/" not in content, path
                assert scratch not in content, path


def test_exec_runs_a_program_in_the_env(root: Root) -> None:
    def exec_(name: str, *command: str) -> subprocess.CompletedProcess[str]:
        return envbuilder_in(root, "--quiet", "exec", name, "--", *command)

    done = exec_("tiny", "one")
    assert (done.returncode, done.stdout) == (0, "one runs\n"), done.stderr
    # -q and -v are the program's, though envbuilder has such options too.
    ended = exec_(
        "tiny", "python", "-q", "-c", "import os, sys; print(os.environ['VIRTUAL_ENV']); sys.exit(3)"
    )
    assert (ended.returncode, ended.stdout) == (3, f"/tmp/envbuilder-{os.getuid()}/envs/tiny\n"), ended.stderr
    missing = exec_("other", "true")
    assert missing.returncode == 7
    assert "There is no env of the recipe other" in missing.stderr


def test_doctor_looks_into_the_image(root: Root, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('name = "tiny"\nrequirements = ["one", "torch"]\n')

    checks = ("env.distributions", "env.records", "env.strays", "env.scripts")
    options = [word for check in checks for word in ("--only", check)]
    done = envbuilder_in(root, "--json", "doctor", recipe, *options)
    findings = {one["check"]: one["verdict"] for one in json.loads(done.stdout)["findings"]}
    assert findings == dict.fromkeys(checks, "ok")
    assert done.returncode == 0
    path = image_in(root).path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[::-1])
    assert envbuilder_in(root, "doctor", recipe, *options).returncode == IntegrityError.exit_code


def test_what_squashfuse_complains_of_never_stops_it(root: Root, tmp_path: Path) -> None:
    """Once the image is mounted, more is said than a pipe holds: the program goes on when all is said."""
    said, mounted = tmp_path / "said", tmp_path / "mounted"
    mounted.mkdir()
    squashfuse = tmp_path / "squashfuse"
    squashfuse.write_text(
        "#!/bin/sh\n"
        f"( until [ -e {mounted}/envbuilder.json ]; do kill -0 $$ || exit; sleep 0.05; done\n"
        f"  yes complaint | head -c 1000000 >&2; touch {said} ) &\n"
        f'exec {find_squashfuse()} "$@"\n'
    )
    squashfuse.chmod(0o755)
    home = Path(envbuilder.__file__).parent.parent
    program = f"until [ -e {said} ]; do sleep 0.05; done; exec {mounted}/bin/one"
    launcher = (sys.executable, "-I", "-S", "-c", COMMAND, home, squashfuse, image_in(root).path, mounted)
    words: list[str | Path] = [*launcher, "sh", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, "one runs\n")
    assert len(done.stderr) == 1_000_000


def test_what_squashfuse_says_of_an_image_that_it_can_t_mount_is_told(root: Root) -> None:
    path = image_in(root).path
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    assert "ended with 255: This doesn't look like a squashfs image" in way_here(image_in(root))


def test_who_uses_it_marks_it_on_the_shared_disk(root: Root) -> None:
    marker = marker_of(image_in(root).path)
    with usable_env(root, "tiny", image_in(root), Quiet()):
        first = marker.stat().st_mtime_ns
    assert marker.stat().st_size == 0
    with usable_env(root, "tiny", image_in(root), Quiet()):
        assert marker.stat().st_mtime_ns > first


@pytest.fixture
def everybodys(made: ImageReport) -> Iterator[Path]:
    """A copy of the image and of the entering program, where every user may read them."""
    folder = Path(tempfile.mkdtemp(prefix="envbuilder-test-"))
    folder.chmod(0o755)
    shutil.copy(made.image.path, folder / "image")
    (folder / "image").chmod(0o644)
    (folder / "envbuilder").mkdir()
    for name in ("__init__", "env_image_enter", "sandbox_root"):
        shutil.copy(Path(envbuilder.__file__).with_name(f"{name}.py"), folder / "envbuilder")
    (folder / "mounted").mkdir()
    os.chown(folder / "mounted", USER, USER)
    yield folder
    shutil.rmtree(folder)


def test_an_ordinary_user_mounts_without_any_helper_and_stays_who_they_are(everybodys: Path) -> None:
    squashfuse = find_squashfuse()
    assert squashfuse is not None
    folder = everybodys / "mounted"
    body = (
        "import os, one; one.main(); print(os.getuid(), os.getgid(), os.stat(one.__file__).st_mode & 0o777);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')])"
    )
    done = subprocess.run(
        [
            *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
            *(SYSTEM_PYTHON, "-I", "-S", "-c", COMMAND, everybodys, squashfuse, everybodys / "image", folder),
            *(folder / "bin/python", "-c", body),
        ],
        env={"PATH": os.defpath},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["one runs", f"{USER} {USER} {0o644}", f"['{0:016x}']"]
    assert list(folder.iterdir()) == []


def test_the_way_that_this_node_takes_is_told(
    root: Root, only_unsquashfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert way_here(image_in(root)) == f"unpacked to {only_unsquashfs} (there is no squashfuse)"
    monkeypatch.setenv("PATH", f"{os.defpath}:/usr/bin")
    assert way_here(image_in(root)).startswith(f"mounted by {find_squashfuse()} at /tmp/envbuilder-")
