"""Packed documents train as they do alone: same loss, same gradients, in every kind of layer."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.chat import IGNORED
from trainer.data import Batch, Dataset, Example, Stream, collate, recorded_shape
from trainer.kernels import find_mamba_kernels
from trainer.mamba import prepare_mixer
from trainer.model import TrainingModel, block_kind, blocks_of, checkpoint_activations
from trainer.packing import WINDOW, pack
from trainer.reading import read_config

from .conftest import RunTrainer, losses
from .fused_scan import mamba_split_conv1d_scan_combined
from .test_parallel import torchrun

LENGTHS = ((21, 1, 9), (3, 30, 2), (40,), (16, 16, 8))
"""Of the documents in each row of 40: shorter than the convolution, longer than a scan's chunk, full rows."""
ROW_LENGTH = 40
PLAIN = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FIELDS = {
    "llama": {"model_type": "llama", **PLAIN},
    "qwen3": {"model_type": "qwen3", **PLAIN},
    "qwen3_moe": {"model_type": "qwen3_moe", **PLAIN, **EXPERTS},
}


def packed_rows() -> list[tuple[Example, ...]]:
    chance = random.Random(5)
    rows = []
    for row in LENGTHS:
        ids = [[chance.randrange(256) for _ in range(length)] for length in row]
        rows.append(
            tuple(
                Example(own, [token if chance.random() < 0.7 else IGNORED for token in own], line)
                for line, own in enumerate(ids, start=1)
            )
        )
    return rows


def build(config_file: Path, family: str, attention: str, *, fused: bool) -> Any:
    """A small model in float64 with random weights, all of them trained."""
    find_mamba_kernels("cpu")
    fields = read_config(config_file).model.config
    assert fields is not None
    config = AutoConfig.for_model(**FIELDS.get(family, fields))
    torch.manual_seed(2)
    causal_lm: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="sdpa" if attention == "flash" else attention
    )
    for block in blocks_of(causal_lm):
        if block_kind(block) == "mamba":
            prepare_mixer(block.mixer, (0.0, math.inf), mamba_split_conv1d_scan_combined if fused else None)
    causal_lm.config._experts_implementation = "eager"  # grouped products are not made for float64
    if attention == "flash":
        causal_lm.config._attn_implementation = "flash_attention_2"
    return causal_lm


def loss_and_gradients(causal_lm: Any, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model = TrainingModel(causal_lm)
    model.train()
    model.zero_grad()
    losses = [model(batch.input_ids, batch.labels, **batch.layout) for batch in batches]
    total = torch.stack(losses).sum()
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total.item(), gradients


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, **others: object,
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func in plain torch: each span of the concatenated sequences attends to itself."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert causal
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    spans = [part.split(lengths) for part in (q, k, v)]
    return torch.cat(
        [
            F.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in own), is_causal=True, scale=softmax_scale, enable_gqa=True
            ).transpose(0, 1)
            for own in zip(*spans, strict=True)
        ]
    )


def flash_fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_func: every row of the batch is one sequence."""
    batch, length = q.shape[:2]
    ends = torch.arange(batch + 1, dtype=torch.int32) * length
    sizes = {"max_seqlen_q": length, "max_seqlen_k": length}
    flat = (part.flatten(0, 1) for part in (q, k, v))
    return flash_varlen(*flat, cu_seqlens_q=ends, cu_seqlens_k=ends, **sizes, **options).unflatten(
        0, (batch, length)
    )


@pytest.fixture
def flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's two functions, where transformers looks them up; the way to them is its own."""
    from transformers import modeling_flash_attention_utils as utils

    functions = (flash_fixed, flash_varlen, None, None, None)
    arguments = utils._lazy_define_process_function(flash_varlen)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (arguments, None)))


@pytest.mark.parametrize(
    ("family", "attention", "fused", "recorded"),
    [
        ("nemotron_h", "sdpa", True, False),
        ("nemotron_h", "sdpa", True, True),
        ("nemotron_h", "sdpa", False, True),
        ("nemotron_h", "eager", False, False),
        ("nemotron_h", "flash", False, False),
        ("llama", "sdpa", False, False),
        ("llama", "flash", False, False),
        ("qwen3", "sdpa", False, False),
        ("qwen3", "eager", False, False),
        ("qwen3_moe", "sdpa", False, False),
    ],
)
def test_packed_documents_have_the_loss_and_gradients_of_documents_alone(
    config_file: Path, flash_stand_in: None, family: str, attention: str, fused: bool, recorded: bool
) -> None:
    causal_lm = build(config_file, family, attention, fused=fused)
    rows = packed_rows()
    shape = recorded_shape([rows], longest=ROW_LENGTH) if recorded else None
    together = [collate(rows, pad=7, row_length=ROW_LENGTH, shape=shape)]
    assert ("cu_seq_lens_q" in together[0].layout) != recorded
    alone = [collate([(example,)], pad=7) for row in rows for example in row]
    assert sum(batch.trained_tokens for batch in alone) == together[0].trained_tokens
    expected, gradients = loss_and_gradients(causal_lm, alone)
    found, packed_gradients = loss_and_gradients(causal_lm, together)
    assert found == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)

    # The same rows without the documents' places: what a leak would look like.
    leaking = Batch(together[0].input_ids, together[0].labels, 0, 0, ())
    assert abs(loss_and_gradients(causal_lm, [leaking])[0] - expected) > 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_no_document_reaches_another_not_even_by_the_last_bit(config_file: Path, fused: bool) -> None:
    causal_lm = build(config_file, "nemotron_h", "sdpa", fused=fused)
    rows = packed_rows()
    first, middle, last = rows[0]
    changed = Example([(token + 1) % 256 for token in middle.input_ids], middle.labels, middle.line)
    with torch.no_grad():
        before, after = (
            causal_lm.model(input_ids=batch.input_ids, use_cache=False, **batch.layout).last_hidden_state[0]
            for batch in (
                collate([row], pad=7, row_length=ROW_LENGTH) for row in (rows[0], (first, changed, last))
            )
        )
    same = (before == after).all(dim=-1).tolist()
    ends = len(first.input_ids), len(first.input_ids) + len(middle.input_ids)
    assert all(same[: ends[0]])
    assert all(same[ends[1] :])
    assert not any(same[ends[0] : ends[1]])


def count_forwards(causal_lm: Any) -> list[int]:
    """How often each block's mixer computes from here on, by the block's number."""
    counts = [0] * len(blocks_of(causal_lm))

    def count(number: int) -> None:
        counts[number] += 1

    for number, block in enumerate(blocks_of(causal_lm)):
        block.mixer.register_forward_pre_hook(lambda *_, number=number: count(number))
    return counts


@pytest.mark.parametrize("again", [None, (1, 2)])
def test_the_places_reach_the_blocks_through_checkpointing(
    config_file: Path, again: tuple[int, ...] | None
) -> None:
    causal_lm = build(config_file, "nemotron_h", "sdpa", fused=True)
    batches = [collate(packed_rows(), pad=7, row_length=ROW_LENGTH)]
    expected, gradients = loss_and_gradients(causal_lm, batches)
    checkpoint_activations(causal_lm, again=again)
    computed = count_forwards(causal_lm)
    found, checkpointed = loss_and_gradients(causal_lm, batches)
    assert computed == [1 + (again is None or number in again) for number in range(len(computed))]
    assert found == expected
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in gradients.items())


def test_a_packed_batch_tells_where_its_documents_lie() -> None:
    row = (Example([5, 6, 7], [5, 6, 7], 1), Example([8, 9], [IGNORED, 9], 2))
    batch = collate([row, row[:1]], pad=0, row_length=8)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert batch.labels[0].tolist() == [IGNORED, 6, 7, IGNORED, 9, *[IGNORED] * 3]
    assert (batch.tokens, batch.trained_tokens, batch.lines) == (8, 5, (1, 2, 1))
    layout = {
        name: part.tolist() if isinstance(part, Tensor) else part for name, part in batch.layout.items()
    }
    assert layout == {
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]],
        "seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]],
        "cu_seq_lens_q": [0, 3, 5, 8, 11, 16],
        "cu_seq_lens_k": [0, 3, 5, 8, 11, 16],
        "max_length_q": 5,
        "max_length_k": 5,
    }


def test_every_document_is_packed_once_and_rows_are_full() -> None:
    chance = random.Random(1)
    lengths = [min(512, int(chance.lognormvariate(4.5, 0.8)) + 1) for _ in range(1000)]
    rows = pack(lengths, 512)
    assert sorted(document for row in rows for document in row) == list(range(1000))
    assert all(sum(lengths[document] for document in row) <= 512 for row in rows)
    assert sum(lengths) / (512 * len(rows)) > 0.99
    assert pack(lengths, 512) == rows
    assert pack([], 512) == []


def test_a_packed_stream_has_every_document_once_an_epoch_and_goes_on_anywhere() -> None:
    chance = random.Random(2)
    documents = tuple(Example([0] * chance.randint(1, 60), [0], line) for line in range(WINDOW + 500))
    data = Dataset("x", documents, row_length=64)
    stream = Stream(data, 1)
    ends = [stream.rows_in(epochs) for epochs in range(4)]
    epochs = [[stream[n] for n in range(*span)] for span in pairwise(ends)]
    for rows in epochs:
        assert sorted(example.line for row in rows for example in row) == list(range(len(documents)))
        assert all(sum(len(example.input_ids) for example in row) <= 64 for row in rows)
    assert epochs[0] != epochs[1] != epochs[2]
    for position in (ends[2] + 5, 0, ends[1], ends[3] + 7):
        assert Stream(data, 1)[position] == stream[position]
    assert Stream(data, 2)[0] != stream[0]
    # Rows aren't sorted by how many documents they hold.
    sizes = [len(row) for row in epochs[0]]
    assert sizes != sorted(sizes)


@pytest.fixture
def uneven_data(config_file: Path) -> None:
    """Answers of very different lengths, so that rows and micro-batches differ in their trained tokens."""
    chance = random.Random(3)
    rows = [
        {"messages": [{"role": "user", "content": "n?"}, {"role": "assistant", "content": "y" * length}]}
        for length in (chance.choice([1, 4, 9, 20, 45]) for _ in range(40))
    ]
    (config_file.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (config_file.parent / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))


PACKED = (
    "dataset.packing=true",
    "validation_dataset={path_or_dataset_id: validation.jsonl, seq_length: 64, packing: true}",
    "step_scheduler.global_batch_size=8",
    "step_scheduler.max_steps=3",
)


def validation_losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "validation"]


def test_every_split_of_a_packed_batch_gives_the_same_curve(
    run_trainer: RunTrainer, uneven_data: None, config_file: Path, tmp_path: Path
) -> None:
    for size in (1, 2, 8):
        code, _ = run_trainer(*PACKED, f"step_scheduler.local_batch_size={size}", run=f"by-{size}")
        assert code == 0
    done = torchrun(config_file, tmp_path / "two", *PACKED, "step_scheduler.local_batch_size=4")
    assert done.returncode == 0, done.stderr
    curves = {run: losses(tmp_path / run) for run in ("by-1", "by-2", "by-8", "two")}
    assert len(curves["by-1"]) == 3
    for run, curve in curves.items():
        assert curve == pytest.approx(curves["by-1"], rel=1e-4), run
        assert validation_losses(tmp_path / run) == pytest.approx(
            validation_losses(tmp_path / "by-1"), rel=1e-4
        )


def test_packing_shows_its_rows_and_goes_on_where_it_stopped(
    run_trainer: RunTrainer, uneven_data: None, tmp_path: Path
) -> None:
    settings = (*PACKED, "step_scheduler.max_steps=null", "step_scheduler.num_epochs=2")
    code, outcome = run_trainer(*settings, run="straight")
    assert code == 0
    start = json.loads((tmp_path / "straight/metrics.jsonl").read_text().splitlines()[0])
    assert start["data"]["examples"] == 40
    assert start["data"]["rows"] < 25
    assert start["data"]["filled"] > 0.8
    assert 4 <= outcome["steps"] <= 6
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/stop").touch()
    assert run_trainer(*settings, run="parts")[0] == 75
    assert run_trainer(*settings, run="parts")[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
