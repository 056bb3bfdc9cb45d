"""Batch scripts: rendered, and run by the shell that a node runs them with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from envbuilder.site import Site, load_site
from envbuilder.slurm.joblog import parse_log_end
from envbuilder.slurm.script import Job, render_script
from envbuilder.train.allocation import find_allocation, name_of_node

SITES = sorted((Path(__file__).parents[2] / "recipes/sites").glob("*.toml"))
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
        "--propagate=NONE",
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


def test_what_else_a_cluster_wants_stands_among_them() -> None:
    more = {"constraint": "gpu&hbm80g", "reservation": "course", "exclusive": True}
    script = render(site({**more, "extra-sbatch": ["--hint=nomultithread", "--mail-type=END"]}))
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [option for option in options if option.split("=")[0] in ("--constraint", "--reservation")] == [
        "--constraint=gpu&hbm80g",
        "--reservation=course",
    ]
    last = options.index("--exclusive")
    assert options[last : last + 3] == ["--exclusive", "--hint=nomultithread", "--mail-type=END"]


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("section", ["build", "train"])
def test_each_site_that_is_shipped_makes_a_script(path: Path, section: str) -> None:
    of = load_site(str(path))
    script = render_script(of, getattr(of, section), Job("x", ("true",), Path("/"), Path("/logs/x-%j.log")))
    assert f"#SBATCH --time={getattr(of, section).walltime}\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # sbatch reads options up to the first line that is something else.
    head, _, rest = script.partition("\n\n")
    assert all(line.startswith("#SBATCH --") for line in head.splitlines()[1:])
    assert "#SBATCH" not in rest


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


def test_the_network_of_several_nodes_is_named_and_env_has_the_last_word() -> None:
    of = site(env={"NCCL_SOCKET_IFNAME": "ib1"}, **{"socket-ifname": "ib0"})
    variables = shown(of)[2]
    assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib1")
    assert "GLOO_SOCKET_IFNAME" not in shown(site())[2]


def test_several_nodes_meet_by_their_names_with_the_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[1-2]"}
    variables = shown(site(**{"node-suffix": "-ib"}))[2]
    assert find_allocation({**job, **variables}).first == "node1-ib"
    assert name_of_node("node2", variables) == "node2-ib"
    assert find_allocation(job).first == "node1"


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
    # As envbuilder's own errors, so that they are told to whoever follows the job.
    end = parse_log_end(completed.stderr)
    assert end.message == "The module gcc/12.2.0 does not load."
    assert "module spider gcc/12.2.0" in (end.remedy or "")
    assert "ran" not in completed.stdout


def test_a_node_without_modules_is_told_with_the_remedy() -> None:
    # The init files of this machine must not bring a module command: none of them is read without a `[`.
    hidden = "[() { return 1; }"
    completed = run(render(site(setup=[hidden], modules=["gcc"]), ("echo", "ran")))
    assert completed.returncode == 7
    assert "Add the line that makes it to setup in the site file of mine" in completed.stderr


def test_the_program_s_exit_code_is_the_job_s() -> None:
    assert run(render(site(), ("sh", "-c", "exit 75"))).returncode == 75
