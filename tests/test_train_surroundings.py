"""What a run is given of the cluster: the modules of its builds, and the network as NCCL finds it."""

from __future__ import annotations

import json
import os
import venv
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.model import LoadedModule
from envbuilder.paths import Root
from envbuilder.site import load_site
from envbuilder.slurm.script import Job, render_script
from envbuilder.train.kernel_cache import KernelCache
from envbuilder.train.launch import environment
from envbuilder.train.network import warn_of_tcp
from tests.test_nccl_log import INFINIBAND, SOCKET_2_18
from tests.test_train import INSPECTION, RECEIPT, STAND_IN, Lab, Progress

SITES = sorted((Path(__file__).parent.parent / "recipes" / "sites").glob("*.toml"))


def lab_with(folder: Path, *modules: LoadedModule) -> Lab:
    """A root with an env that was compiled with `modules`, and whose trainer does what its config says."""
    env = folder / "root" / "envs" / "tiny"
    venv.create(env, symlinks=True)
    site_packages = next((env / "lib").glob("python3.*")) / "site-packages"
    for name, text in {
        "trainer/__init__.py": "",
        "trainer/__main__.py": STAND_IN,
        "trainer/inspection.py": INSPECTION,
    }.items():
        (site_packages / name).parent.mkdir(exist_ok=True)
        (site_packages / name).write_text(text)
    receipt = {**RECEIPT, "modules": [module.model_dump() for module in modules]}
    (env / "envbuilder.json").write_text(json.dumps(receipt))
    return Lab(Root(folder / "root"), folder)


def test_what_the_modules_of_the_builds_had_added_is_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcc = tmp_path / "gcc"
    for name in ("bin", "lib64", "mine"):
        (gcc / name).mkdir(parents=True)
    module = LoadedModule(
        name="gcc/13.2.0",
        folders={"PATH": (str(gcc / "bin"),), "LD_LIBRARY_PATH": (str(gcc / "lib64"),)},
        variables={"CC": "gcc-13"},
    )
    lab = lab_with(tmp_path, module)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(gcc / "mine"))
    monkeypatch.delenv("CC", raising=False)
    lab.train("(run / 'seen').write_text(json.dumps(dict(os.environ)))\noutcome('finished', 0)")
    seen = json.loads((lab.run / "seen").read_text())
    assert seen["LD_LIBRARY_PATH"] == f"{gcc / 'lib64'}:{gcc / 'mine'}"
    first, *others = seen["PATH"].split(":")
    assert (first, set(others)) == (str(gcc / "bin"), set(os.environ["PATH"].split(":")))
    assert seen["CC"] == "gcc-13"


def test_a_module_whose_folder_is_gone_keeps_the_run_from_starting(tmp_path: Path) -> None:
    lab = lab_with(tmp_path, LoadedModule(name="gcc/13.2.0", folders={"PATH": ("/gone/bin",)}))
    with pytest.raises(MismatchError, match=r"the module gcc/13\.2\.0, whose folder /gone/bin is not here"):
        lab.train()
    assert not lab.run.exists()


def variables(outside: dict[str, str], *, one_node: bool) -> dict[str, str]:
    cache = KernelCache(Path("/cache"), Path("/kept"))
    return environment(outside, run=Path("/run"), cache=cache, processes=1, one_node=one_node)


@pytest.mark.parametrize("one_node", [True, False])
def test_no_setting_of_infiniband_is_made_by_default(one_node: bool) -> None:
    made = variables({"PATH": "/usr/bin"}, one_node=one_node)
    assert not [name for name in made if name.startswith(("NCCL_IB", "NCCL_NET", "NCCL_P2P", "NCCL_SOCKET"))]
    assert variables({"NCCL_IB_HCA": "mlx5_0"}, one_node=one_node)["NCCL_IB_HCA"] == "mlx5_0"


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_no_site_that_is_shipped_sets_infiniband(path: Path) -> None:
    site = load_site(str(path))
    for spec in (site.build, site.train):
        assert "NCCL_IB" not in render_script(site, spec, Job("x", ("true",), Path("/w"), Path("/w/log")))


def test_on_several_nodes_nccl_writes_its_way_into_the_run_unless_the_user_has_a_say() -> None:
    made = variables({}, one_node=False)
    assert (made["NCCL_DEBUG"], made["NCCL_DEBUG_FILE"]) == ("INFO", "/run/ranks/nccl.%h.%p.log")
    assert "NCCL_DEBUG_FILE" not in variables({"NCCL_DEBUG": "WARN"}, one_node=False)
    assert not [name for name in variables({}, one_node=True) if name.startswith("NCCL_")]


@pytest.mark.parametrize(("text", "warnings"), [(SOCKET_2_18, 1), (INFINIBAND, 0)])
def test_a_way_over_tcp_is_told_of(tmp_path: Path, text: str, warnings: int) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "stamp.json").touch()
    path = tmp_path / "ranks" / "nccl.node1.77.log"
    path.write_text(text)
    reporter = Progress()
    warn_of_tcp(tmp_path, reporter)
    assert len(reporter.warnings) == warnings
    assert all(f"envbuilder doctor --log {path}" in warning for warning in reporter.warnings)


def test_a_log_of_an_earlier_part_of_the_run_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    path = tmp_path / "ranks" / "nccl.node1.77.log"
    path.write_text(SOCKET_2_18)
    os.utime(path, (1, 1))
    (tmp_path / "stamp.json").touch()
    reporter = Progress()
    warn_of_tcp(tmp_path, reporter)
    assert reporter.warnings == []
