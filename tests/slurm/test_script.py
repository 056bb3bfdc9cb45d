"""Batch scripts: rendered, and run by the shell that a node runs them with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from envbuilder.site import Site
from envbuilder.slurm.script import Job, render_script

SECTION = {"partition": "gpu", "walltime": "00:30:00", "cpus": 8, "memory": "64G"}
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"


def site(section: dict[str, Any] | None = None, **keys: Any) -> Site:
    return Site.model_validate(
        {"name": "mine", "build": {**SECTION, **(section or {})}, "train": SECTION, **keys}
    )


def render(of: Site, command: tuple[str, ...] = ("true",), workdir: Path = Path("/")) -> str:
    return render_script(of, of.build, Job("envbuilder-x", command, workdir, Path("/logs/x-%j.log")))


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-s"],
        input=script,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def shown(
    of: Site, arguments: tuple[str, ...] = (), workdir: Path = Path("/")
) -> tuple[list[str], str, dict[str, str]]:
    """Arguments, current folder and variables of the program that the script runs."""
    completed = run(render(of, (sys.executable, "-c", SHOW, *arguments), workdir))
    assert completed.returncode == 0, completed.stderr
    words, folder, variables = json.loads(completed.stdout)
    return words, folder, variables


def test_the_section_becomes_sbatch_options() -> None:
    script = render(site({"account": "proj", "qos": "debug"}))
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    assert [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")] == [
        "--job-name=envbuilder-x",
        "--partition=gpu",
        "--account=proj",
        "--qos=debug",
        "--time=00:30:00",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=8",
        "--mem=64G",
        '--output="/logs/x-%j.log"',
        "--open-mode=append",
    ]


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ({"gpus": 4, "gpu-request": "gres"}, "--gres=gpu:4"),
        ({"gpus": 4, "gpu-request": "typed-gres", "gpu-type": "a100"}, "--gres=gpu:a100:4"),
        ({"gpus": 4, "gpu-request": "gpus-per-node"}, "--gpus-per-node=4"),
    ],
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(section: dict[str, Any], option: str) -> None:
    assert f"#SBATCH {option}\n" in render(site(section))


def test_without_gpus_none_are_asked_for() -> None:
    assert "gpu:" not in render(site())


def test_arguments_reach_the_program_as_they_are() -> None:
    odd = ("--root", "/a folder", "it's", '"quoted"', "$HOME", "`id`", "a\nb", "*")
    assert shown(site(), odd)[0] == list(odd)


def test_the_program_runs_where_the_job_was_submitted(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    assert shown(site(), workdir=folder)[1] == str(folder)


def test_a_folder_that_the_node_does_not_see_ends_the_job() -> None:
    completed = run(render(site(), ("echo", "ran"), Path("/nowhere/at/all")))
    assert completed.returncode != 0
    assert "ran" not in completed.stdout


def test_the_site_s_variables_are_taken_literally() -> None:
    assert shown(site(env={"CUDA_HOME": "/opt/cuda $X", "EMPTY": ""}))[2].items() >= {
        ("CUDA_HOME", "/opt/cuda $X"),
        ("EMPTY", ""),
    }


def test_setup_lines_run_first() -> None:
    assert shown(site(setup=["export A=$(echo from setup)"]))[2]["A"] == "from setup"


def test_scratch_becomes_the_temporary_folder(tmp_path: Path) -> None:
    of = site(setup=["export WHO=me"], scratch=f"{tmp_path}/$WHO/tmp")
    assert shown(of)[2]["TMPDIR"] == f"{tmp_path}/me/tmp"
    assert (tmp_path / "me" / "tmp").is_dir()


def test_a_scratch_folder_runs_no_command(tmp_path: Path) -> None:
    assert (
        shown(site(scratch=f"{tmp_path}/$(echo x)`echo y`"))[2]["TMPDIR"] == f"{tmp_path}/$(echo x)`echo y`"
    )


def test_modules_are_loaded_in_order() -> None:
    module = 'module() { [ "$1" = load ] && export LOADED="${LOADED:-} $2"; }'
    assert shown(site(setup=[module], modules=["gcc/12.2.0", "python/3.11.7"]))[2]["LOADED"] == (
        " gcc/12.2.0 python/3.11.7"
    )


def test_a_module_that_does_not_load_ends_the_job_with_its_name() -> None:
    completed = run(render(site(setup=["module() { return 1; }"], modules=["gcc/12.2.0"]), ("echo", "ran")))
    assert completed.returncode == 7
    assert "module gcc/12.2.0 does not load" in completed.stderr
    assert "ran" not in completed.stdout


def test_a_node_without_modules_is_told_with_the_remedy() -> None:
    # The init files of this machine must not bring a module command: none of them is read without a `[`.
    hidden = "[() { return 1; }"
    completed = run(render(site(setup=[hidden], modules=["gcc"]), ("echo", "ran")))
    assert completed.returncode == 7
    assert "add the line that makes it to setup in the site file of mine" in completed.stderr


def test_the_program_s_exit_code_is_the_job_s() -> None:
    assert run(render(site(), ("sh", "-c", "exit 75"))).returncode == 75
