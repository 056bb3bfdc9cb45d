"""publish and use: whole or not at all, byte for byte, and by the group alone."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.errors import InputError, IntegrityError, MismatchError, UsageError
from envbuilder.model import CurrentVersion
from envbuilder.paths import Root
from envbuilder.sharing import list_published, open_shared_folder
from envbuilder.sharing.shared_folder import CURRENT, MANIFEST
from tests.conftest import Run
from tests.sharing.published import KERNEL, MINOR, NAME, make_root, mode, overwrite, published, use

OLD = 1_000_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A ROOT with an installed env; no test changes it."""
    return make_root(tmp_path_factory.mktemp("made"))


def bundle_file_of(version: Path) -> Path:
    return version / f"bundles/{NAME}/files/one-1.0-py3-none-any.whl"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_published_has_the_groups_modes_whatever_the_umask(
    made: Root, shared: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        version = published(made, shared).folder
    finally:
        os.umask(before)
    assert mode(version.parent) == 0o2770
    assert mode(version.parent / CURRENT) == 0o640
    below = [version, *version.rglob("*")]
    assert {mode(path) for path in below if path.is_dir()} == {0o2750}
    assert {mode(path) for path in below if path.is_file()} == {0o440}
    assert {path.stat().st_gid for path in below} == {shared.stat().st_gid}


def test_where_the_group_may_only_read_it_may_not_publish_beside_one(made: Root, shared: Path) -> None:
    shared.chmod(0o2750)
    assert mode(published(made, shared).folder.parent) == 0o2750


def test_a_used_env_is_installed_from_what_was_published(
    made: Root, shared: Path, tmp_path: Path, run: Run
) -> None:
    published(made, shared)
    code, out, err = run("--json", "--root", tmp_path / "mine", "use", NAME, "--from", shared)
    assert code == 0, err
    told = json.loads(out)
    assert told["next"] == f"envbuilder train CONFIG --recipe {NAME}"
    env = Path(told["env"])
    site = env / f"lib/python{MINOR}/site-packages"
    assert {path.name for path in site.glob("*.dist-info")} == {"one-1.0.dist-info", "built-2.0.dist-info"}
    subprocess.run([env / "bin/python", "-c", "import one, built"], check=True)
    kernel = Root(tmp_path / "mine").kernels(NAME) / KERNEL
    assert kernel.read_bytes() == b"machine code"
    # The recipe and the lock that doctor and install take are the published ones.
    code, out, err = run(
        "--root", tmp_path / "mine", "doctor", tmp_path / f"mine/bundles/{NAME}/recipe.toml",
        *("--only", "bundle.complete", "--only", "bundle.files", "--only", "wheelhouse.wheels"),
        *("--only", "env.records"),
    )  # fmt: skip
    assert code == 0, out + err


def test_models_and_packages_are_not_copied_again(made: Root, shared: Path, tmp_path: Path) -> None:
    report = published(made, shared)
    wheel = bundle_file_of(report.folder)
    assert wheel.samefile(made.bundle(NAME) / "files" / wheel.name)
    linked = sum(file.size for file in report.publication.files) - report.copied_bytes
    assert linked == sum(path.stat().st_size for path in (made.bundle(NAME) / "files").iterdir())
    use(shared, tmp_path / "mine")
    assert Root(tmp_path / "mine").bundle(NAME).resolve() == wheel.parent.parent


def test_what_is_not_as_it_will_be_published_is_copied(made: Root, shared: Path) -> None:
    recipe = published(made, shared).folder / f"bundles/{NAME}/recipe.toml"
    assert not recipe.samefile(made.bundle(NAME) / "recipe.toml")


def test_it_can_be_used_in_turn_by_those_who_publish_what_they_use(
    made: Root, shared: Path, tmp_path: Path, run: Run
) -> None:
    published(made, shared)
    mine = tmp_path / "mine"
    assert run("--root", mine, "use", NAME, "--from", shared)[0] == 0
    code, out, _ = run("--root", mine, "publish", NAME, "--to", shared, "--as", "again")
    assert code == 0
    assert f"envbuilder use again --from {shared}" in out
    assert use(shared, tmp_path / "third", name="again").publication.recipe == NAME


def flip(version: Path) -> None:
    wheel = bundle_file_of(version)
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(wheel, bytes(content))


def cut_off(version: Path) -> None:
    overwrite(bundle_file_of(version), bundle_file_of(version).read_bytes()[:-1])


def remove(version: Path) -> None:
    bundle_file_of(version).unlink()


def flip_kernel(version: Path) -> None:
    overwrite(version / f"cache/kernels/{NAME}" / KERNEL, b"Machine code")


def add(version: Path) -> None:
    (version / f"bundles/{NAME}/files/more.whl").write_bytes(b"")


def change_manifest(version: Path) -> None:
    overwrite(version / MANIFEST, (version / MANIFEST).read_bytes().replace(b"one-1.0", b"one-1.1"))


def link(version: Path) -> None:
    wheel = bundle_file_of(version)
    wheel.rename(wheel.with_name("real"))
    wheel.symlink_to("real")


@pytest.mark.parametrize("damage", [flip, cut_off, remove, flip_kernel, add, change_manifest, link])
def test_what_is_not_as_it_was_published_is_refused_and_nothing_is_taken(
    made: Root, shared: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(published(made, shared).folder)
    with pytest.raises(IntegrityError) as caught:
        use(shared, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert "envbuilder publish" in caught.value.remedy or "rm" in caught.value.remedy


def test_publishing_again_mends_it(made: Root, shared: Path, tmp_path: Path) -> None:
    flip(published(made, shared, name="other").folder)
    published(made, shared, name="other")
    use(shared, tmp_path / "mine", name="other")


@pytest.mark.parametrize("place", ["", NAME, "{version}", "{version}/bundles", "{wheel}"])
def test_what_everybody_may_write_to_is_refused(made: Root, shared: Path, tmp_path: Path, place: str) -> None:
    version = published(made, shared).folder
    path = shared / place.format(version=version, wheel=version / f"bundles/{NAME}/start.py")
    path.chmod(mode(path) | stat.S_IWOTH)
    with pytest.raises(MismatchError, match="Everybody may write") as caught:
        use(shared, tmp_path / "mine")
    assert f"chmod o-w {path}" in caught.value.remedy


def test_nor_is_anything_published_there(made: Root, shared: Path) -> None:
    shared.chmod(0o2777)
    with pytest.raises(MismatchError, match="Everybody may write"):
        published(made, shared)
    assert list(shared.iterdir()) == []


def test_a_new_version_takes_the_place_and_the_old_one_stays(
    made: Root, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = published(made, shared).folder
    use(shared, tmp_path / "mine")
    kernel = made.kernels(NAME) / "triton/ABC/newer.cubin"
    kernel.write_bytes(b"newer")
    try:
        second = published(made, shared).folder
    finally:
        kernel.unlink()
    assert first != second
    assert Root(tmp_path / "mine").bundle(NAME).resolve().is_relative_to(first)
    use(shared, tmp_path / "mine")
    assert Root(tmp_path / "mine").bundle(NAME).resolve().is_relative_to(second)


def test_prune_removes_older_versions_but_not_one_that_may_be_about_to_count(
    made: Root, shared: Path
) -> None:
    old, recent = shared / NAME / ("0" * 16), shared / NAME / ("1" * 16)
    published(made, shared)
    old.mkdir()
    recent.mkdir()
    os.utime(old, (OLD, OLD))
    report = published(made, shared, prune=True)
    assert report.removed == (old,)
    assert recent.is_dir()
    assert not old.exists()


def test_a_killed_publisher_leaves_nothing_that_is_seen_and_the_next_one_clears_it_away(
    made: Root, shared: Path, tmp_path: Path
) -> None:
    published(made, shared)
    left = shared / NAME / ".abc.new"
    (left / "bundles").mkdir(parents=True)
    for folder in (left / "bundles", left):
        os.utime(folder, (OLD, OLD))
    use(shared, tmp_path / "mine")
    assert [entry.name for entry in list_published(open_shared_folder(shared))] == [NAME]
    published(made, shared)
    assert not left.exists()


def test_before_the_first_version_is_whole_nothing_is_published(shared: Path, tmp_path: Path) -> None:
    (shared / NAME / ".abc.new").mkdir(parents=True)
    with pytest.raises(UsageError, match="Nothing is published"):
        use(shared, tmp_path / "mine")


def test_a_damaged_root_is_not_published(tmp_path: Path, shared: Path) -> None:
    root = make_root(tmp_path / "bad")
    wheel = root.bundle(NAME) / "files/one-1.0-py3-none-any.whl"
    overwrite(wheel, wheel.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="not what the lock names"):
        published(root, shared)
    assert [path.name for path in (shared / NAME).iterdir()] == []


def test_without_an_env_there_is_nothing_to_publish(made: Root, shared: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bundles").mkdir(parents=True)
    (root / "bundles" / NAME).symlink_to(made.bundle(NAME))
    with pytest.raises(MismatchError, match="no env") as caught:
        published(Root(root), shared)
    assert caught.value.remedy == f"envbuilder install recipes/{NAME}.toml"


def test_a_bundle_of_ones_own_is_not_replaced(made: Root, shared: Path) -> None:
    published(made, shared)
    with pytest.raises(MismatchError, match="its own"):
        use(shared, made.path)
    assert not made.bundle(NAME).is_symlink()


def test_another_python_is_refused(made: Root, shared: Path, tmp_path: Path) -> None:
    published(made, shared)
    other = tmp_path / "python-of-another-version"
    facts = {
        "implementation": "cpython", "version": "3.8.1", "purelib": "/", "platlib": "/", "include": "/",
        "glibc": "2.40", "machine": "x86_64",
    }  # fmt: skip
    other.write_text(f"#!/bin/sh\necho '{json.dumps(facts)}'\n")
    other.chmod(0o755)
    with pytest.raises(MismatchError, match=f"for CPython {MINOR}"):
        use(shared, tmp_path / "mine", python=other)
    assert not (tmp_path / "mine").exists()


def test_what_runs_on_none_of_this_machines_gpus_is_refused(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(make_root(tmp_path / "hopper", architectures=("sm_90",)), shared)
    tools = tmp_path / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA A100, 8.0, 580.65.06, 65536, Default'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(MismatchError, match="compiled for sm_90"):
        use(shared, tmp_path / "mine")
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100, 9.0, 580.65.06, 81559, Default'\n")
    use(shared, tmp_path / "mine")


@pytest.mark.parametrize("name", ["../x", "x/y", ".hidden", ""])
def test_no_name_leads_out_of_the_shared_folder(shared: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name"):
        use(shared, tmp_path / "mine", name=name)


def test_a_pointer_to_a_version_that_is_gone_says_so(made: Root, shared: Path, tmp_path: Path) -> None:
    place = published(made, shared).folder.parent
    (place / CURRENT).unlink()
    (place / CURRENT).write_text(CurrentVersion(manifest_sha256="0" * 64).model_dump_json())
    with pytest.raises(IntegrityError, match="missing"):
        use(shared, tmp_path / "mine")


def test_what_is_published_is_listed(made: Root, shared: Path, tmp_path: Path, run: Run) -> None:
    assert run("use", "--from", shared)[1].strip() == f"Nothing is published in {shared}."
    published(made, shared)
    flip(published(made, shared, name="second").folder)
    (shared / NAME / CURRENT).chmod(0o666)
    code, out, _ = run("--json", "use", "--from", shared)
    assert code == 0
    second, first = json.loads(out)["published"]
    assert (first["name"], "Everybody may write" in first["problem"]) == (NAME, True)
    assert (second["name"], second["recipe"], second["problem"]) == ("second", NAME, "")
    assert {"python", "compute_capabilities", "publisher", "published_at", "bytes"} <= second.keys()


def test_the_site_says_which_folder_is_shared(made: Root, shared: Path, tmp_path: Path, run: Run) -> None:
    job = 'walltime = "00:10:00"\ncpus = 1\n'
    text = f'name = "lab"\nshared-folder = "{shared}"\n[build]\n{job}[train]\n{job}'
    (tmp_path / "lab.toml").write_text(text)
    code, out, err = run("--root", made.path, "publish", NAME, "--site", "./lab.toml")
    assert code == 0, err
    assert f"envbuilder use {NAME} --site ./lab.toml" in out
    (tmp_path / "lab.toml").write_text(text.replace("shared-folder", "shared-group = 'no-such-group'\n#"))
    assert run("use", "--site", "./lab.toml")[0] == InputError.exit_code
    (tmp_path / "lab.toml").write_text(text.replace(f'shared-folder = "{shared}"', ""))
    code, _, err = run("use", "--site", "./lab.toml")
    assert (code, "names no shared-folder" in err) == (InputError.exit_code, True)
    assert run("use")[0] == run("use", "--site", "a", "--from", shared)[0] == UsageError.exit_code


def test_a_group_that_is_not_there_and_a_folder_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no group no-such-group"):
        open_shared_folder(tmp_path, "no-such-group")
    with pytest.raises(MismatchError, match="no shared folder"):
        open_shared_folder(tmp_path / "nowhere")
