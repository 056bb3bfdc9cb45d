"""The plan: its arithmetic on the true-size Nemotron-3-Nano, what it chooses, and how it is shown."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from trainer.__main__ import main
from trainer.config import Config
from trainer.errors import EnvironmentMismatch
from trainer.lora import adapter_parameters, add_lora, choose_targets
from trainer.memory import kept_by_block
from trainer.model import block_kind, blocks_of, build_model, model_config
from trainer.parallel import World
from trainer.placement import (
    GIB,
    Plan,
    _Way,
    blocks_to_keep,
    can_be_recorded,
    choose,
    describe,
    layers_alone,
    plan_run,
    plans,
)
from trainer.reading import read_config

from .test_inspection import kept_in_bytes
from .test_loading import NO_KERNELS

NANO = """\
seed: 1
model:
  config:
    model_type: nemotron_h
    hybrid_override_pattern: MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME
    vocab_size: 131072
    hidden_size: 2688
    num_attention_heads: 32
    num_key_value_heads: 2
    head_dim: 128
    mamba_num_heads: 64
    mamba_head_dim: 64
    n_groups: 8
    ssm_state_size: 128
    moe_intermediate_size: 1856
    moe_shared_expert_intermediate_size: 3712
    n_routed_experts: 128
    num_experts_per_tok: 6
  init: random
  tokenizer: byte
peft: {match_all_linear: true, dim: 8}
dataset: {kind: synthetic, seq_length: 4096}
step_scheduler: {global_batch_size: 16, max_steps: 3}
optimizer: {lr: 1.0e-5}
"""


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("nano") / "nano.yaml"
    file.write_text(NANO)
    return file


@pytest.fixture(scope="module")
def nano(nano_file: Path) -> Any:
    """All layers of the true size, without memory."""
    config = read_config(nano_file)
    return layers_alone(config, model_config(config.model))


def ways(
    nano: Any,
    file: Path,
    processes: int,
    *overrides: str,
    memory: float | None = None,
    on_a_node: int | None = None,
) -> tuple[Config, tuple[Plan, ...]]:
    config = read_config(file, list(overrides))
    targets = choose_targets(nano, config.peft)
    longest = config.dataset.seq_length
    open_ways = plans(
        config, nano, targets, processes=processes, on_a_node=on_a_node, longest=longest, memory=memory
    )
    return config, tuple(open_ways)


def test_the_true_size_sharded_over_four_gpus_of_61_gib_fits_at_4096_tokens(
    nano: Any, nano_file: Path
) -> None:
    config, four = ways(nano, nano_file, 4, "distributed.whole_blocks=0")
    taken = choose(config, four, 61 * GIB)
    assert str(taken) == "shard, without activation checkpointing"
    memory = taken.memory
    assert memory["parameters"] == 31_577_937_344
    assert memory["base_bytes"] / GIB == pytest.approx(58.82, abs=0.01)
    # A quarter of the blocks, embeddings and head, and two blocks of experts.
    blocks = blocks_of(nano)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks) * 2
    root = 2 * (2 * 131072 * 2688 + 2688)
    kept = (memory["base_bytes"] - root) / 4 + root
    assert memory["weights_bytes"] == pytest.approx(kept + 2 * largest, rel=1e-5)
    assert memory["weights_bytes"] / GIB == pytest.approx(20.5, abs=0.1)
    # Loading never holds more than what the process keeps and one block.
    assert memory["loading_bytes"] == pytest.approx(kept + largest + memory["other_bytes"], rel=1e-5)
    assert memory["least_bytes"] < 25 * GIB
    assert taken.needed_bytes < 51 * GIB
    checkpointed = ways(nano, nano_file, 4, "distributed.activation_checkpointing=true")[1][-1]
    assert checkpointed.needed_bytes < 28 * GIB
    by_fsdp2 = ways(nano, nano_file, 4, "distributed.whole_blocks=0", "distributed.gathering=fsdp2")[1][2]
    buffer = by_fsdp2.memory["weights_bytes"] - memory["weights_bytes"]
    assert buffer == pytest.approx(largest, rel=1e-5)


def test_what_memory_is_left_keeps_passes_recorded_and_blocks_whole(nano: Any, nano_file: Path) -> None:
    def taken(gib: float, *overrides: str) -> Plan:
        config, open_ways = ways(nano, nano_file, 4, *overrides, memory=gib * GIB)
        plan = choose(config, open_ways, gib * GIB)
        assert plan.needed_bytes <= gib * GIB
        return plan

    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(nano)]
    experts = {number for number, size in enumerate(blocks) if size > 1e9}
    small = set(range(52)) - experts
    plan = taken(61)
    assert plan.records
    assert str(plan) == (
        f"shard, without activation checkpointing; {len(plan.whole)} of 52 blocks whole on each GPU"
    )
    assert small < plan.whole  # 29 blocks of mamba and attention, and some of the 23 with experts
    fuller = replace(plan, memory={**plan.memory, "peak_bytes": plan.memory["peak_bytes"] + 2 * max(blocks)})
    assert fuller.needed_bytes > 61 * GIB  # another one doesn't fit
    assert taken(56).records
    assert len(taken(56).whole) < len(plan.whole)
    # Without recorded passes there is room for more of them.
    eager = taken(61, "distributed.cuda_graphs=false")
    assert not eager.records
    assert len(eager.whole) > len(plan.whole)
    fixed = taken(61, "distributed.whole_blocks=7")
    assert len(fixed.whole) == 7
    assert fixed.whole < small


def test_as_few_blocks_as_must_be_are_computed_again(nano: Any, nano_file: Path) -> None:
    def taken(gib: float, *overrides: str) -> Plan:
        return choose(*ways(nano, nano_file, 1, *overrides, memory=gib * GIB), gib * GIB)

    assert not taken(80).again
    some = taken(70)
    assert some.records
    assert str(some) == (f"replicate, with activation checkpointing of {len(some.again)} of 52 blocks")
    assert 0 < len(some.again) < len(taken(68).again) < 52
    # One less doesn't fit; and blocks of mamba and attention come before those with experts, whose
    # activations take about as much memory and twice the time.
    spared = max(some.memory["activations_bytes"] - taken(68).memory["activations_bytes"], 1)
    assert some.needed_bytes <= 70 * GIB < some.needed_bytes + spared
    kinds = [block_kind(block) for block in blocks_of(nano)]
    assert {kinds[number] for number in some.again} == {"attention", "mamba"}
    assert "moe" in {kinds[number] for number in taken(66).again}
    # A word of the user's is not weighed.
    assert len(taken(139, "distributed.activation_checkpointing=true").again) == 52
    assert not taken(66, "distributed.activation_checkpointing=false").again


@pytest.mark.parametrize(("rows", "gib"), [(1, 65), (1, 68), (1, 71), (4, 74), (4, 80), (4, 90), (4, 100)])
def test_one_block_less_to_compute_again_would_not_fit(
    nano: Any, nano_file: Path, rows: int, gib: int
) -> None:
    batch = (f"step_scheduler.local_batch_size={rows}", "step_scheduler.global_batch_size=16")
    config = read_config(nano_file, ["device=cuda", *batch])
    way = _Way(config, nano, choose_targets(nano, config.peft), 1, 1, 4096, gib * GIB)
    plan = way.plan(True)
    assert 1 < len(plan.again) < 52
    assert plan.needed_bytes <= gib * GIB < way._with(len(plan.again) - 1, 0, plan.records).needed_bytes


@pytest.mark.parametrize(("processes", "gib"), [(2, 55), (2, 60), (2, 71), (4, 40), (4, 61), (8, 30)])
def test_one_more_block_would_not_fit_whole(nano: Any, nano_file: Path, processes: int, gib: int) -> None:
    config = read_config(nano_file, ["device=cuda"])
    targets = choose_targets(nano, config.peft)
    way = _Way(config, nano, targets, processes, processes, 4096, gib * GIB)
    plan = way.plan(False)
    assert plan.needed_bytes <= gib * GIB
    whole = len(plan.whole)
    assert whole == 51 or way._with(0, whole + 1, plan.records).needed_bytes > gib * GIB


def test_the_mask_of_packed_documents_is_counted(nano: Any, nano_file: Path) -> None:
    def activations(*overrides: str) -> int:
        return ways(nano, nano_file, 1, "dataset.seq_length=32768", *overrides)[1][0].memory[
            "activations_bytes"
        ]

    more = activations("dataset.packing=true") - activations()
    heads = 6 * 32768 * 2 * 32 * 128 * 2  # keys and values of six layers, for each head of the queries
    assert more == 32768**2 * 2 + heads


def test_dropout_and_other_families_are_not_recorded(nano: Any, nano_file: Path, config_file: Path) -> None:
    def records(file: Path, causal_lm: Any, *overrides: str, shares: bool = False) -> bool:
        config = read_config(file, ["device=cuda", *overrides])
        return can_be_recorded(config, causal_lm, choose_targets(causal_lm, config.peft), shares=shares)

    assert records(nano_file, nano)
    assert records(nano_file, nano, shares=True)
    assert records(nano_file, nano, "distributed.gathering=fsdp2")
    assert not records(nano_file, nano, "distributed.gathering=fsdp2", shares=True)
    assert records(nano_file, nano, "dataset.packing=true")
    assert not records(nano_file, nano, "device=cpu")
    assert not records(nano_file, nano, "peft.dropout=0.1")
    assert not records(nano_file, nano, "distributed.cuda_graphs=false")
    assert not records(
        nano_file, nano, "peft.target_modules=[in_proj, lm_head]", "peft.match_all_linear=false"
    )
    llama = layers_alone(
        read_config(config_file), AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=64)
    )
    assert not records(nano_file, llama)


@pytest.mark.parametrize(
    ("sizes", "count", "kept"),
    [
        ([5, 5, 5, 5], 0, set()),
        ([5, 5, 5, 5], 2, {0, 2}),
        ([5, 5, 5, 5], 3, {0, 1, 2}),
        ([5, 5, 5, 5], 4, {0, 1, 2, 3}),
        ([5, 5, 5, 5], 9, {0, 1, 2, 3}),
        ([5, 1, 5, 1, 5, 1], 2, {1, 3}),
        ([5, 1, 5, 1, 5, 1], 4, {0, 1, 3, 5}),
        ([5, 1, 5, 1, 5, 1], 5, {0, 1, 2, 3, 5}),
    ],
)
def test_small_blocks_are_kept_whole_first_and_large_ones_evenly(
    sizes: list[int], count: int, kept: set[int]
) -> None:
    assert blocks_to_keep(sizes, count) == kept


def test_processes_of_a_node_share_a_copy_before_all_do(nano: Any, nano_file: Path) -> None:
    config, open_ways = ways(nano, nano_file, 8, on_a_node=4, memory=48 * GIB)
    assert [way.sharers for way in open_ways] == [1, 1, 4, 4, 8, 8]
    taken = choose(config, open_ways, 48 * GIB)
    assert str(taken).startswith("shard, without activation checkpointing; each 4 processes share a copy")
    # Where a quarter is too much, blocks are computed again; where that doesn't do, all share.
    for gib, expected in ((33, (4, True)), (24, (8, True))):
        smaller = choose(config, ways(nano, nano_file, 8, on_a_node=4)[1], gib * GIB)
        assert (smaller.sharers, len(smaller.again) == 52) == expected
    # A node can't have more than there are, nor a part that doesn't go up.
    assert {way.sharers for way in ways(nano, nano_file, 4, on_a_node=8)[1]} == {1, 4}
    assert {way.sharers for way in ways(nano, nano_file, 6, on_a_node=4)[1]} == {1, 6}
    # One process a node: all share.
    assert {way.sharers for way in ways(nano, nano_file, 4, on_a_node=1)[1]} == {1, 4}


def test_the_estimate_with_checkpointing_is_what_was_measured_on_one_gpu(nano: Any, nano_file: Path) -> None:
    _, (way,) = ways(nano, nano_file, 1, "distributed.activation_checkpointing=true")
    # 61.7 GiB measured, of what torch allocated: without the CUDA context.
    assert (way.memory["peak_bytes"] - way.memory["other_bytes"]) / GIB == pytest.approx(61.7, abs=0.5)


@pytest.mark.parametrize(("rows", "measured"), [(1, 68.6), (4, 94.9)])
def test_the_estimate_without_checkpointing_is_near_what_was_measured_on_one_gpu(
    nano: Any, nano_file: Path, rows: int, measured: float
) -> None:
    _, (way,) = ways(
        nano,
        nano_file,
        1,
        "distributed.activation_checkpointing=false",
        f"step_scheduler.local_batch_size={rows}",
        "step_scheduler.global_batch_size=16",
        "peft.match_all_linear=false",
        "peft.target_modules=[in_proj, q_proj, k_proj, v_proj, o_proj, shared_experts.*]",
    )
    assert (way.memory["peak_bytes"] - way.memory["other_bytes"]) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("processes", "gib", "overrides", "expected"),
    [
        (1, 139, (), "replicate, without"),
        (1, 80, (), "replicate, without"),
        (1, 70, (), "replicate, with"),
        (8, 139, (), "replicate, without"),
        (8, 139, ("distributed.placement=shard",), "shard, without"),
        (8, 66, (), "replicate, with"),
        (8, 48, (), "shard, without"),
        (8, 24, (), "shard, with"),
        (1, 24, (), "replicate, with"),  # nothing fits: the smallest
        (1, 24, ("distributed.placement=shard",), "replicate, with"),  # one process has nothing to share with
        (8, 40, ("distributed.activation_checkpointing=true",), "shard, with"),
        (8, None, (), "shard, with"),
    ],
)
def test_the_fastest_way_that_fits_is_taken(
    nano: Any, nano_file: Path, processes: int, gib: int | None, overrides: tuple[str, ...], expected: str
) -> None:
    config, open_ways = ways(nano, nano_file, processes, *overrides)
    assert str(choose(config, open_ways, gib and gib * GIB)).startswith(f"{expected} activation")


def test_lora_on_the_routed_experts_is_counted(nano: Any, nano_file: Path) -> None:
    _, (way, *_) = ways(nano, nano_file, 1, "peft.match_routed_experts=true")
    experts = 23 * 2 * 128 * 8 * (1856 + 2688)
    assert way.memory["trainable_parameters"] == 5_679_616 + experts


def test_the_activations_of_experts_are_near_those_that_autograd_keeps(config_file: Path) -> None:
    config = read_config(
        config_file,
        [
            "model.config.hybrid_override_pattern=E*E",
            "model.config.moe_intermediate_size=96",
            "model.dtype=bf16",
        ],
    )
    model = build_model(config.model, model_config(config.model), NO_KERNELS, torch.device("cpu"), seed=1)
    targets = choose_targets(model, config.peft)
    adapted = {id(module) for name, module in model.named_modules() if name in targets.names}
    estimated = 128 * sum(
        kept_by_block(block, model.config, adapted, dtype_bytes=2, length=64) for block in blocks_of(model)
    )
    peft_model = add_lora(model, targets, config.peft, seed=1)
    assert sum(p.numel() for p in adapter_parameters(peft_model).values()) > 0
    model.get_input_embeddings().weight.requires_grad_(True)  # else the first block keeps nothing
    really = kept_in_bytes(model, torch.randint(264, (2, 64)))
    assert 0.7 * really < estimated < 1.5 * really, (estimated, really)


def plan_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trainer", *arguments])
    return main()


def test_the_plan_is_printed_without_a_gpu_or_a_run(
    nano_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(nano_file), "--plan", "--processes", "4", "--gpu-memory-gib", "61")
    assert plan_command(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("31,577,937,344 parameters, 58.82 GiB; 5,679,616 trained; 4,096 tokens in a pass")
    taken = r"Taken: shard, without activation checkpointing; \d\d of 52 blocks whole on each GPU\.\n"
    assert re.search(taken + r"\Z", shown)
    assert shown.count("doesn't fit in 61.00 GiB") == 2
    assert shown.count("beside recorded passes, for one that isn't") == 2
    assert plan_command(monkeypatch, *arguments[:-1], "40", "--processes-per-node", "2") == 0
    shown = capsys.readouterr().out
    assert shown.count("each 2 processes share a copy") == 2
    assert "Taken: shard, without activation checkpointing" in shown
    assert list(nano_file.parent.iterdir()) == [nano_file]


def test_a_plan_that_doesnt_fit_and_one_without_a_size_say_so(config_file: Path) -> None:
    small = read_config(config_file, ["device=cuda", "distributed.gpu_memory_gib=0.001"])
    assert "None surely fits; taken: replicate, with" in describe(small, processes=2)
    unknown = read_config(config_file, ["device=cuda"])
    assert "give --gpu-memory-gib" in describe(unknown, processes=2)
    assert "On a CPU: replicate, without" in describe(read_config(config_file), processes=2)


def test_a_wrong_config_ends_the_plan_with_its_error(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_command(monkeypatch, str(config_file), "--plan", "--set", "peft.dim=none") == 3
    assert "peft.dim" in capsys.readouterr().err


class OneGpu:
    """Stands in for torch.cuda where there is no GPU."""

    def __init__(self, free: int) -> None:
        self.free, self.fraction = free, 1.0

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return self.free, 140 * GIB

    def set_per_process_memory_fraction(self, fraction: float, device: object) -> None:
        self.fraction = fraction


@pytest.mark.parametrize(
    ("free", "limit", "expected"), [(139, None, "without"), (139, 70, "with"), (66, None, "with")]
)
def test_a_run_plans_with_what_is_free_or_allowed(
    nano: Any, nano_file: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int | None, expected: str
) -> None:
    gpu = OneGpu(free * GIB)
    monkeypatch.setattr("trainer.placement.torch.cuda", gpu)
    config = read_config(nano_file, [f"distributed.gpu_memory_gib={limit}"] if limit else [])
    world = World(0, 1, torch.device("cuda"))
    plan = plan_run(config, nano, choose_targets(nano, config.peft), world, longest=4096)
    assert str(plan).startswith(f"replicate, {expected} activation checkpointing")
    assert gpu.fraction == (limit / 140 if limit else 1.0)


def test_weights_that_cant_fit_stop_the_run_before_any_is_loaded(
    nano: Any, nano_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.placement.torch.cuda", OneGpu(40 * GIB))
    config = read_config(nano_file)
    world = World(0, 1, torch.device("cuda"))
    with pytest.raises(EnvironmentMismatch, match=r"take 58\.90 GiB of each GPU .*40\.00 GiB are free"):
        plan_run(config, nano, choose_targets(nano, config.peft), world, longest=4096)
