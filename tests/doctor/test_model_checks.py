"""Checks of a training config's model, each made to fail. What needs torch runs three times in all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.doctor.inspecting import Inspection
from envbuilder.lock import SourceLock
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.conftest import Quickstart
from tests.doctor.conftest import nvidia_smi, run_one
from tests.doctor.training import (
    RECIPE,
    TEMPLATE,
    lock_with_model,
    make_site,
    make_trainer_env,
    write_config,
    write_model,
)

pytestmark = pytest.mark.needs_env

LARGE = """\
model:
  config:
    model_type: llama
    vocab_size: 128256
    hidden_size: 4096
    intermediate_size: 14336
    num_hidden_layers: 32
    num_attention_heads: 32
    num_key_value_heads: 8
    max_position_embeddings: 32
    tie_word_embeddings: false
  init: random
  tokenizer: small
"""
LARGE_PARAMETERS = 8_030_261_248
"""By hand: 2 x 128256 x 4096, 32 x (2 x 4096² + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096), 4096."""
SMALL = "model:\n  pretrained_model_name_or_path: small\n"
SHARD = "model-00002-of-00002.safetensors"
GIB = 1024
"""MiB"""


@dataclass
class Case:
    """A config, and all that was found about it."""

    subject: Subject
    findings: dict[str, Finding]

    def elsewhere(self, check: str, parts: dict[str, Any] | None = None, **changes: Any) -> Finding:
        """The finding of one check on this machine and at another site: what was inspected stays the same,
        but for `parts`."""
        subject = replace(self.subject, **changes)
        subject.__dict__["config_files"] = self.subject.config_files
        subject.__dict__["inspected"] = Inspection({**self.subject.inspected.parts, **(parts or {})})
        (finding,) = run_checks(subject, Quiet(), choose_checks({check}))
        assert finding.remedy or finding.verdict in ("ok", "skipped")
        return finding


@pytest.fixture(scope="module")
def trainer_root(tmp_path_factory: pytest.TempPathFactory, quickstart: Quickstart) -> Root:
    root = Root(tmp_path_factory.mktemp("model") / "root")
    make_trainer_env(root, quickstart)
    return root


@pytest.fixture
def gpu(programs: Callable[..., Path]) -> Callable[[int], None]:
    """Puts one GPU of so many MiB into this machine."""

    def put(mib: int) -> None:
        programs(nvidia_smi=nvidia_smi().replace("143771", str(mib)))

    return put


def inspected(root: Root, config: Path, lock: SourceLock | None = None) -> Case:
    subject = Subject(RECIPE, root, lock, config=config)
    found = run_checks(subject, Quiet(), choose_checks({"model", "data"}))
    for finding in found:
        assert not finding.summary.startswith("The check itself broke off"), finding.evidence
        assert finding.remedy or finding.verdict in ("ok", "skipped"), finding
    return Case(subject, {finding.check: finding for finding in found})


@pytest.fixture(scope="module")
def good(trainer_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = write_config(tmp_path_factory.mktemp("good"))
    return inspected(trainer_root, config, lock_with_model(config.parent / "small"))


@pytest.fixture(scope="module")
def large(trainer_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """8 billion parameters, a template that marks nothing, and examples that are cut."""
    config = write_config(
        tmp_path_factory.mktemp("large"),
        model=f"{SMALL}={LARGE}",
        checkpoint="optimizer:=checkpoint:\n  enabled: false\noptimizer:",
    )
    shutil.rmtree(config.parent / "small")
    start, content, end = TEMPLATE.partition("{% if m['role'] == 'assistant' %}{{ m['content']")
    template = start + "{% endgeneration %}" + content + end.replace("{% endgeneration %}", "")
    write_model(config.parent / "small", template=template)
    return inspected(trainer_root, config)


@pytest.fixture(scope="module")
def wrong(trainer_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """No tokenizer, and LoRA on a layer that the model has not."""
    config = write_config(tmp_path_factory.mktemp("wrong"), target="q_proj, v_proj=q_proj, in_proj")
    (config.parent / "small/tokenizer.json").unlink()
    return inspected(trainer_root, config)


def check(name: str, root: Root, config: Path, lock: SourceLock | None = None) -> Finding:
    return run_one(name, root=root, recipe=RECIPE, config=config, lock=lock)


def test_all_checks_of_a_right_config_are_ok(good: Case) -> None:
    assert {name: f.verdict for name, f in good.findings.items()} == dict.fromkeys(good.findings, "ok"), [
        finding for finding in good.findings.values() if finding.verdict != "ok"
    ]
    assert "one turn: 9 of 28 tokens trained: 'It is 4.<|end|>'" in good.findings["model.template"].evidence


def test_mistakes_in_the_config_are_the_trainers_own_words(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path, rank="  target_modules=  rank: 3\n  target_modules")
    found = check("model.config", trainer_root, config)
    assert found.verdict == "failed"
    assert "line 5: peft.rank: unknown key" in found.summary
    assert found.remedy == f"edit {config}"
    other = check("data.lines", trainer_root, config)
    assert other.verdict == "skipped"
    assert "model.config" in other.summary


def test_an_env_whose_trainer_is_too_old_is_told_once(quickstart: Quickstart, tmp_path: Path) -> None:
    root = Root(tmp_path / "old")
    make_trainer_env(root, quickstart)
    (trainer,) = root.env("tiny").glob("lib/*/site-packages/trainer")
    (trainer / "inspection.py").unlink()
    config = write_config(tmp_path)
    found = check("model.config", root, config)
    assert found.verdict == "failed"
    assert "too old" in found.summary
    assert (
        found.remedy
        == "envbuilder fetch recipes/tiny.toml && envbuilder install recipes/tiny.toml --reinstall"
    )
    assert check("model.weights", root, config).verdict == "skipped"


def test_a_recipe_without_the_trainer_is_no_failure(trainer_root: Root, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"trainer": False})
    found = run_one("model.config", root=trainer_root, recipe=recipe, config=write_config(tmp_path))
    assert found.verdict == "skipped"


def cut_off(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-100])


def git_lfs(folder: Path) -> None:
    (folder / SHARD).write_text("version 1\noid sha256:aaaa\nsize 4000\n")


def not_listed(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**names, "model.extra.weight": SHARD}}))


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: is missing, and 11 tensors are in it"),
        (cut_off, f"{SHARD}: is cut off: "),
        (git_lfs, f"{SHARD}: is a pointer of git-lfs"),
        (lambda folder: (folder / SHARD).write_bytes(b"\xff" * 40), f"{SHARD}: is cut off or damaged"),
        (not_listed, f"{SHARD}: lacks 1 of its tensors, the first is model.extra.weight"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "index.json: is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json: is damaged"),
        (only_pickles, "has no *.safetensors; pytorch_model.bin can run code"),
        (shutil.rmtree, "is not there"),
    ],
)
def test_each_fault_of_the_weight_files_is_named(
    trainer_root: Root, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    config = write_config(tmp_path)
    damage(tmp_path / "small")
    found = check("model.weights", trainer_root, config)
    assert found.verdict == "failed"
    assert told in found.evidence[0], found.evidence
    assert str(tmp_path / "small") in str(found.remedy)


def test_a_file_of_another_size_than_locked_is_named(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    lock = lock_with_model(tmp_path / "small")
    cut_off(tmp_path / "small")
    (tmp_path / "small/tokenizer_config.json").unlink()
    found = check("model.lock", trainer_root, config, lock)
    assert found.verdict == "failed"
    assert found.summary.startswith("2 of 6 files")
    assert "envbuilder fetch recipes/tiny.toml --verify && cp -rL" in str(found.remedy)
    assert check("model.lock", trainer_root, config).verdict == "skipped"


def test_a_byte_that_differs_from_the_lock_is_found(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shard = tmp_path / "small" / SHARD
    lock = lock_with_model(tmp_path / "small")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert check("model.lock", trainer_root, config, lock).verdict == "ok"
    found = check("model.bytes", trainer_root, config, lock)
    assert found.verdict == "failed"
    assert any(f"{SHARD}: expected sha256" in line for line in found.evidence)


def test_a_folder_without_a_tokenizer_fails_and_what_needs_one_is_skipped(wrong: Case) -> None:
    found = wrong.findings["model.tokenizer"]
    assert found.verdict == "failed"
    assert "tokenizer" in found.summary
    for name in ("model.template", "data.tokens"):
        assert wrong.findings[name].verdict == "skipped"
        assert "model.tokenizer" in wrong.findings[name].summary


def test_a_lora_target_that_matches_no_layer_fails(wrong: Case) -> None:
    found = wrong.findings["model.layers"]
    assert found.verdict == "failed"
    assert "peft.target_modules names in_proj" in found.summary
    assert "q_proj" in str(found.remedy)
    assert wrong.findings["model.memory"].verdict == "skipped"


def test_a_template_whose_markers_hold_nothing_fails(large: Case) -> None:
    found = large.findings["model.template"]
    assert found.verdict == "failed"
    assert "one turn: 0 of 28 tokens trained: ''" in found.evidence
    assert "generation" in str(found.remedy)
    assert large.findings["data.tokens"].verdict == "failed"
    assert "generation" in str(large.findings["data.tokens"].remedy)


def test_a_template_that_rewrites_earlier_turns_is_warned_of(good: Case) -> None:
    parts = good.subject.inspected.parts
    one = parts["template"]["talks"]["one turn"]
    talks = {"one turn": one, "two turns": {"inexact": "renders turn 2 differently in context"}}
    found = good.elsewhere("model.template", parts={"template": {"marks_generation": False, "talks": talks}})
    assert found.verdict == "warning"
    assert "two turns: renders turn 2 differently in context" in found.evidence


def test_many_examples_that_are_cut_are_warned_of_and_refused_ones_fail(good: Case) -> None:
    counted = good.subject.inspected.parts["tokens"]["data"]
    cut = {**counted, "truncated": 3, "truncated_lines": [1, 2, 4], "longest": 90}
    found = good.elsewhere("data.tokens", parts={"tokens": {"data": cut}})
    assert found.verdict == "warning"
    assert "cuts or leaves out 3 of 8 examples" in found.summary
    assert "seq_length=90" in str(found.remedy)
    refused = {**counted, "refused": 1, "refused_lines": ["line 7: the template has no such role"]}
    found = good.elsewhere("data.tokens", parts={"tokens": {"data": refused}})
    assert found.verdict == "failed"
    assert any("line 7: the template has no such role" in line for line in found.evidence)


def test_sequences_longer_than_the_model_knows_are_warned_of(large: Case) -> None:
    found = large.findings["model.layers"]
    assert found.verdict == "warning"
    assert found.remedy == "--set dataset.seq_length=32"


def test_weights_that_are_larger_than_the_gpu_fail(large: Case, gpu: Callable[[int], None]) -> None:
    gpu(12 * GIB)
    found = large.elsewhere("model.memory")
    assert found.verdict == "failed"
    assert "15.0 GiB, the GPU has 12.0 GiB" in found.summary
    assert f"{LARGE_PARAMETERS:,} parameters" in " ".join(found.evidence)


def test_a_gpu_that_would_be_nearly_full_is_warned_of(large: Case, gpu: Callable[[int], None]) -> None:
    gpu(16 * GIB)
    assert large.elsewhere("model.memory").verdict == "warning"
    gpu(80 * GIB)
    assert large.elsewhere("model.memory").verdict == "ok"


def test_a_login_nodes_gpu_is_not_taken_for_the_jobs(large: Case, gpu: Callable[[int], None]) -> None:
    gpu(4 * GIB)
    site = make_site(walltime="00:30:00", gpus=1)
    found = large.elsewhere("model.memory", site=site)
    assert found.verdict == "ok"
    assert "is not known here" in found.summary


@pytest.fixture
def former_run(tmp_path: Path) -> Callable[[int], Root]:
    """A ROOT with a run of a model of so many parameters: 100 tokens a second, 60 s for its first step."""

    def write(parameters: int) -> Root:
        root = Root(tmp_path / "runs-root")
        root.run("before").mkdir(parents=True)
        start = {"kind": "start", "device": "NVIDIA H200", "processes": 1, "seconds_to_prepare": 40}
        steps = [
            {"kind": "step", "step": n, "seconds": 20, "tokens_per_second": speed}
            for n, speed in enumerate((1, 100, 100, 90, 110), start=1)
        ]
        rows = [{**start, "model": {"parameters": parameters}}, *steps]
        (root.run("before") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        root.env("tiny").mkdir(parents=True)
        return root

    return write


@pytest.fixture
def small_parameters(good: Case) -> int:
    return int(good.subject.inspected.parts["memory"]["parameters"])


def test_a_training_longer_than_a_job_tells_how_many_it_takes(
    good: Case, former_run: Callable[[int], Root], small_parameters: int
) -> None:
    root = former_run(small_parameters)
    # 10 steps of 28 tokens at 100 a second: 2.8 s, and a minute to start.
    found = good.elsewhere("model.steps", root=root, site=make_site(walltime="00:01:02", gpus=1))
    assert found.verdict == "warning"
    assert "2 jobs of 62 s" in found.summary
    found = good.elsewhere("model.steps", root=root, site=make_site(walltime="00:30:00", gpus=1))
    assert found.verdict == "ok"
    assert "within one job of 30 min" in found.summary


def test_a_job_that_ends_before_its_first_step_fails(
    good: Case, former_run: Callable[[int], Root], small_parameters: int
) -> None:
    root = former_run(small_parameters)
    found = good.elsewhere("model.steps", root=root, site=make_site(walltime="00:00:50", gpus=1))
    assert found.verdict == "failed"
    assert "never finish" in found.summary


def test_without_a_former_run_the_steps_alone_are_told(good: Case, former_run: Callable[[int], Root]) -> None:
    found = good.elsewhere("model.steps", root=former_run(1), site=make_site(walltime="00:30:00", gpus=1))
    assert found.verdict == "ok"
    assert "10 steps" in found.summary
    assert "no former run" in found.summary
