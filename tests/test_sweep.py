"""Which runs a sweep has, and what they are called; and what is noted of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.errors import InputError, UsageError
from envbuilder.paths import Root
from envbuilder.sweep import Sweep, make_sweep, ranges
from envbuilder.sweep_record import check_same_sweep, note_sweep, read_sweep

Run = Callable[..., tuple[int, str, str]]


def swept(*over: str, sets: tuple[str, ...] = (), name: str = "x") -> Sweep:
    return make_sweep(name, "/c/x.yaml", "tiny", sets, over)


def names(*over: str) -> list[str]:
    return [member.run for member in swept(*over).members]


def test_every_combination_is_a_member_with_a_number_a_name_and_overrides() -> None:
    sweep = swept("seed=1,2", "dataset.path_or_dataset_id=in/a.jsonl,b.jsonl", sets=("optimizer.lr=1e-4",))
    assert [(member.index, member.run) for member in sweep.members] == [
        (0, "x-seed1-a"), (1, "x-seed1-b"), (2, "x-seed2-a"), (3, "x-seed2-b"),
    ]  # fmt: skip
    assert sweep.overrides_of(sweep.members[2]) == (
        "optimizer.lr=1e-4", "seed=2", "dataset.path_or_dataset_id=in/a.jsonl",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("over", "called"),
    [
        ("optimizer.lr=2e-5,1.0E-4", ["x-lr2e-5", "x-lr1.0E-4"]),
        ("optimizer.weight_decay=-1,.5", ["x-weight_decay-1", "x-weight_decay-.5"]),
        ("dataset.packing=true,false", ["x-packing-true", "x-packing-false"]),
        ("lr_scheduler.lr_decay_style=cosine", ["x-cosine"]),
        ("model.pretrained_model_name_or_path=/m/Nano-3.1-8B/,/m/b.v2", ["x-Nano-3.1-8B", "x-b"]),
        ("dataset.path_or_dataset_id=a/t.jsonl,b/t.jsonl,c/t.jsonl", ["x-t", "x-t-2", "x-t-3"]),
        ("optimizer.betas=[0.9, 0.95],[0.9, 0.99]", ["x-0.9-0.95", "x-0.9-0.99"]),
        ("samples.prompts=['one, two'],…", ["x-one-two", "x-x"]),
        ("a.b='one, two',three", ["x-one-two", "x-three"]),
    ],
)
def test_a_member_is_called_after_its_values(over: str, called: list[str]) -> None:
    assert names(over) == called


def test_names_are_different_whatever_the_values_are() -> None:
    called = names("a.x=a-b,a", "a.y=c,b-c,b/c")
    assert len(set(called)) == len(called) == 6


def test_a_comma_within_brackets_or_quotes_is_a_part_of_the_value() -> None:
    members = swept("optimizer.betas=[0.9,0.95],[0.9,0.99]", "a.b='1,2',3").members
    assert members[0].overrides == ("optimizer.betas=[0.9,0.95]", "a.b='1,2'")
    assert len(members) == 4


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ((), "is over something"),
        (("seed",), "not a key and its values"),
        (("seed=",), "none of them empty"),
        (("seed=1,,2",), "none of them empty"),
        (("seed=1,",), "none of them empty"),
        (("seed=1, ,2",), "none of them empty"),
        (("a..b=1",), "not a key"),
        (("seed=1,2,1",), "has the value 1 twice"),
        (("seed=1", "seed=2"), "The key seed is set twice"),
        (("optimizer.lr=1",), "The key optimizer.lr is set twice"),
    ],
)
def test_what_is_no_sweep_is_said(over: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        swept(*over, sets=("optimizer.lr=1e-4",))


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), ([1, 3], "1,3")]
)
def test_indices_are_written_as_slurm_takes_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_a_sweep_is_noted_and_another_of_its_name_is_told_from_it(tmp_path: Path) -> None:
    root, sweep = Root(tmp_path), swept("seed=1,2")
    assert read_sweep(root, "x") is None
    check_same_sweep(root, sweep)
    note_sweep(root, sweep)
    assert read_sweep(root, "x") == sweep
    root.run("x-seed1").mkdir(parents=True)
    check_same_sweep(root, sweep)
    with pytest.raises(InputError, match="differs in --set, --over") as caught:
        check_same_sweep(root, swept("seed=1,3", sets=("optimizer.lr=1",)))
    assert "--over: seed=1,2 there, seed=1,3 here" in caught.value.context["differs"]
    assert "--name x-2" in caught.value.remedy


def test_a_run_of_that_name_that_is_not_of_the_sweep_is_left_alone(tmp_path: Path) -> None:
    Root(tmp_path).run("x-seed2").mkdir(parents=True)
    with pytest.raises(UsageError, match="There is a run called x-seed2 already"):
        check_same_sweep(Root(tmp_path), swept("seed=1,2"))


def test_the_script_is_an_array_that_runs_the_member_of_its_index(run: Run, tmp_path: Path) -> None:
    section = 'walltime = "00:30:00"\ncpus = 4\n'
    (tmp_path / "mine.toml").write_text(f'name = "mine"\n[build]\n{section}[train]\n{section}')
    words = ("sweep", "c.yaml", "--recipe", "one", "--site", "mine.toml", "--over", "seed=1,2,3")
    done = tmp_path / ".envbuilder" / "runs" / "c-seed2"
    code, out, _ = run(*words, "--at-once", "2", "--print-script")
    assert code == 0
    assert "#SBATCH --array=0-2%2\n" in out
    assert f'#SBATCH --output="{tmp_path}/.envbuilder/logs/slurm/sweep-c-%A_%a.log"\n' in out
    assert out.endswith(f"sweep-member {tmp_path}/c.yaml --name c --recipe one --over seed=1,2,3\n")
    assert not (tmp_path / ".envbuilder").exists()
    (tmp_path / ".envbuilder" / "sweeps").mkdir(parents=True)
    note_sweep(
        Root(tmp_path / ".envbuilder"), make_sweep("c", f"{tmp_path}/c.yaml", "one", (), ("seed=1,2,3",))
    )
    done.mkdir(parents=True)
    (done / "outcome.json").write_text('{"status": "finished", "exit_code": 0}')
    assert "#SBATCH --array=0,2\n" in run(*words, "--print-script")[1]


def test_a_template_has_to_leave_the_array_its_place(run: Run, tmp_path: Path) -> None:
    section = 'walltime = "00:30:00"\ncpus = 4\n'
    (tmp_path / "mine.toml").write_text(f'name = "mine"\n[build]\n{section}[train]\n{section}')
    template = tmp_path / "job.sh"
    template.write_text("#!/bin/bash\n#SBATCH --array=5\n{{sbatch}}\n{{environment}}\n{{command}}\n")
    words = ("sweep", "c.yaml", "--recipe", "one", "--site", "mine.toml", "--over", "seed=1,2,3")
    code, _, error = run(*words, "--template", template, "--print-script")
    assert code == 3
    assert "what they need: --array" in error
    template.write_text("#!/bin/bash\n{{sbatch}}\n{{environment}}\n{{command}}\n")
    assert "#SBATCH --array=0-2\n" in run(*words, "--template", template, "--print-script")[1]


def test_a_member_s_command_outside_of_an_array_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("sweep-member", "c.yaml", "--recipe", "one", "--name", "c", "--over", "seed=1,2")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert run(*words)[0] == 2
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    code, _, error = run(*words)
    assert code == 2
    assert "no task of an array of the sweep c" in error
