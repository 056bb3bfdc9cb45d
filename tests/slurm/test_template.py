"""A user's own batch script: what is filled in, what counts, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.paths import Root
from envbuilder.site import Site, load_site
from envbuilder.slurm.plan import Plan, Wishes, plan_train
from envbuilder.slurm.template import head_options
from tests.slurm.test_submit import SITE

WHOLE = """#!/bin/bash
#SBATCH -q long --mail-type=END
#SBATCH --time 03:00:00
{{sbatch}}
echo before
{{ environment }}
{{command}}
"""


def planned(folder: Path, template: str, wishes: Wishes | None = None) -> Plan:
    (folder / "job.sh").write_text(template)
    (folder / "mine.toml").write_text(f'template = "job.sh"\nsetup = ["echo set up"]\n{SITE}')
    site: Site = load_site(str(folder / "mine.toml"))
    return plan_train(Path("/c.yaml"), "r", site, Root(folder / "root"), [], wishes or Wishes())


def test_the_markers_are_filled_and_the_template_s_own_options_count(tmp_path: Path) -> None:
    plan = planned(tmp_path, WHOLE, Wishes(requeue=True))
    options = head_options(plan.script)
    assert options["qos"] == "long"
    assert (options["time"], options["mail-type"]) == ("03:00:00", "END")
    assert (options["partition"], options["cpus-per-task"]) == ("gpu", "8")
    assert (options["job-name"], options["signal"]) == ("envbuilder-train-r", "B:USR1@120")
    assert options["output"] == f"{tmp_path}/root/logs/slurm/train-r-%j.log"
    assert "requeue" in options
    assert plan.script.count("--time") == 1
    assert plan.walltime.seconds == 3 * 3600
    assert plan.own_options == ("--time",)
    lines = plan.script.splitlines()
    assert lines.index("echo before") < lines.index("echo set up") < len(lines) - 1
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith("train /c.yaml --run r --requeue-job")
    subprocess.run(["bash", "-n"], input=plan.script, text=True, check=True)


def test_a_template_s_own_nodes_each_have_a_task(tmp_path: Path) -> None:
    options = head_options(planned(tmp_path, WHOLE.replace("--mail-type=END", "-N 2")).script)
    assert options["nodes"] == "2"
    assert "ntasks" not in options


def test_a_template_may_write_all_options_itself(tmp_path: Path) -> None:
    own = (
        "#!/bin/bash\n#SBATCH -J {{name}}\n#SBATCH -o {{log}} --open-mode=append\n"
        "#SBATCH --signal=B:USR1@300\n#SBATCH -t 01:00:00\n{{command}}\n"
    )
    script = planned(tmp_path, own).script
    assert head_options(script)["signal"] == "B:USR1@300"
    assert "--partition" not in script


@pytest.mark.parametrize(
    ("head", "lacking"),
    [
        ("", "--job-name, --output, --open-mode, --signal, --requeue"),
        ("#SBATCH --output=mine.log\n{{sbatch}}\n", "--output"),
        ("#SBATCH --signal=USR2@60\n{{sbatch}}\n", "--signal"),
        ("cd /tmp\n{{sbatch}}\n", "--job-name, --output, --open-mode, --signal, --requeue"),
    ],
)
def test_what_every_job_needs_can_t_be_taken_from_it(tmp_path: Path, head: str, lacking: str) -> None:
    plan = planned(tmp_path, f"#!/bin/bash\n{head}{{{{command}}}}\n", Wishes(requeue=True))
    with pytest.raises(InputError, match="does not leave") as caught:
        _ = plan.script
    assert caught.value.message.endswith(f": {lacking}.")
    assert f"#SBATCH {lacking.split(', ', maxsplit=1)[0]}=" in caught.value.context["needed"]


@pytest.mark.parametrize(
    ("template", "line", "why"),
    [
        ("{{command}}\n", 1, "begins with its interpreter"),
        ("#!/bin/bash\n{{comand}}\n{{command}}\n", 2, "there is no marker {{comand}}"),
        ("#!/bin/bash\n{{sbatch}}\n", 2, "{{command}} has to stand there once"),
        ("#!/bin/bash\n{{command}}\n{{command}}\n", 3, "{{command}} has to stand there once"),
        ("#!/bin/bash\n{{sbatch}}\nsrun {{command}}\n", 3, "stands for whole lines"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, template: str, line: int, why: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(tmp_path, template)
    assert f"in line {line}: " in caught.value.message
    assert why in caught.value.message


def test_a_template_that_is_not_there_and_a_time_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not understood: 90"):
        planned(tmp_path, WHOLE.replace("03:00:00", "90"))
    plan_site = load_site(str(tmp_path / "mine.toml"))
    (tmp_path / "job.sh").unlink()
    with pytest.raises(InputError, match="can't be read"):
        plan_train(Path("/c.yaml"), "r", plan_site, Root(tmp_path), [], Wishes())
