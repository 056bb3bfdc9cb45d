"""What the inspection tells of a config, against what training really does with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainer.conftest import RunTrainer
from trainer.config import Config
from trainer.conversations import numbered_lines, read_conversation
from trainer.inspection import inspect
from trainer.lora import add_lora, choose_targets
from trainer.memory import estimate, kept_by_block
from trainer.model import blocks_of, checkpoint_activations
from trainer.model_inspection import count_tokens, template_facts
from trainer.reading import read_config
from trainer.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
UNMARKED = BYTE_CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def found_in(file: Path, *overrides: str, files: bool = False, processes: int = 1) -> dict[str, Any]:
    return inspect(file, list(overrides), files=files, processes=processes)


def test_the_quick_half_imports_no_torch(config_file: Path) -> None:
    program = "import sys, trainer.inspection as i; i.main(); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, str(config_file), "--files"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert json.loads(done.stdout)["data"]["lines"] == 12


def test_tokens_steps_and_parameters_are_those_of_the_run(
    config_file: Path, run_trainer: RunTrainer, tmp_path: Path
) -> None:
    found = found_in(config_file)
    code, _ = run_trainer()
    assert code == 0
    start = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    counted, data = found["tokens"]["data"], start["data"]
    assert (counted["examples"], counted["tokens"], counted["trained"]) == (
        data["examples"],
        data["tokens"],
        data["trained_tokens"],
    )
    assert found["steps"]["steps"] == start["steps"]
    for name in ("parameters", "trainable_parameters"):
        assert found["memory"][name] == start["model"][name]


def test_a_wrong_config_is_one_error_and_nothing_else(config_file: Path) -> None:
    found = found_in(config_file, "peft.dim=none", files=True)
    assert list(found) == ["config"]
    assert "peft.dim" in found["config"]["error"]["message"]


def test_a_batch_that_cant_be_shared_out_is_told(config_file: Path) -> None:
    assert not found_in(config_file, processes=2)["batch"]
    assert "3 processes" in found_in(config_file, processes=3)["batch"]["error"]["message"]


def test_a_tokenizer_larger_than_the_vocabulary_is_told(config_file: Path) -> None:
    error = found_in(config_file, "model.config.vocab_size=200")["model"]["error"]
    assert "262 tokens" in error["message"]


def test_lines_are_numbered_as_the_trainer_numbers_them(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"a\r\n\nb\rc\n \nd")
    expected = [(n, line) for n, line in enumerate(file.read_bytes().splitlines(), 1) if line.strip()]
    assert list(numbered_lines(file)) == expected


def test_half_a_character_is_refused_before_a_tokenizer_breaks_on_it() -> None:
    row = {"messages": [*TALK["messages"], {"role": "user", "content": "\ud83d"}]}
    with pytest.raises(ValueError, match=r"message 3 holds half of a character \(U\+D83D\)"):
        read_conversation(json.dumps(row).encode())


def test_a_file_that_takes_too_long_is_told_as_read_in_part(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.inspection.READING_S", -1.0)
    data = found_in(config_file, files=True)["data"]
    assert not data["complete"]
    assert data["lines"] == 0


def test_a_large_file_is_sampled_all_over(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = config_file.parent / "train.jsonl"
    monkeypatch.setattr("trainer.model_inspection.SAMPLE_BYTES", file.stat().st_size // 3)
    counted = count_tokens(read_config(config_file).dataset, byte_tokenizer())
    assert (counted["sampled"], counted["lines"]) == (3, 12)
    assert found_in(config_file)["steps"]["examples"] == 12


def test_cut_and_left_out_examples_are_counted_with_their_lines(config_file: Path) -> None:
    file = config_file.parent / "train.jsonl"
    long_answer = {"messages": [TALK["messages"][0], {"role": "assistant", "content": "x" * 100}]}
    long_question = {"messages": [{"role": "user", "content": "x" * 100}, TALK["messages"][1]]}
    file.write_text("".join(json.dumps(row) + "\n" for row in (TALK, long_answer, long_question)))
    counted = count_tokens(read_config(config_file).dataset, byte_tokenizer())
    assert counted["truncated_lines"] == [2]
    assert counted["dropped_lines"] == [3]
    assert counted["longest"] == 109
    assert counted["p50"] == 106


def test_a_template_without_markers_is_told_apart_turn_by_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = UNMARKED
    facts = template_facts(tokenizer)
    assert not facts["marks_generation"]
    assert facts["talks"] == template_facts(byte_tokenizer())["talks"]


def test_a_template_that_rewrites_earlier_turns_is_told() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages[-2:] %}{{ m['role'] + m['content'] }}{% endfor %}"
    talks = template_facts(tokenizer)["talks"]
    assert "inexact" in talks["two turns"]


def test_a_template_that_breaks_is_told() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert "no such role" in template_facts(tokenizer)["talks"]["one turn"]["broken"]


LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip


def with_model(file: Path, **fields: object) -> Config:
    """The config with this model and LoRA everywhere, in bf16."""
    text = json.dumps({**LLAMA, **fields})
    return read_config(file, [f"model.config={text}", "model.dtype=bf16", "dataset.seq_length=128"])


def kept_in_bytes(model: Any, ids: torch.Tensor) -> int:
    """What the forward pass of the blocks really keeps for the backward pass, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_estimated_activations_are_near_those_that_autograd_keeps(
    config_file: Path, model_type: str, attention: str
) -> None:
    config = with_model(config_file, model_type=model_type, head_dim=16)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config.model.config), dtype=torch.bfloat16, attn_implementation=attention
    )
    model.requires_grad_(False)
    targets = choose_targets(model, config.peft)
    linear = {name: id(module) for name, module in model.named_modules()}
    adapted = {linear[name] for name in targets.names}
    estimated = 256 * sum(
        kept_by_block(block, model.config, adapted, dtype_bytes=2, length=128) for block in blocks_of(model)
    )
    add_lora(model, targets, config.peft, seed=1)
    really = kept_in_bytes(model, torch.randint(300, (2, 128)))
    assert 0.7 * really < estimated < 1.5 * really, (estimated, really)


def test_with_checkpointing_the_blocks_inputs_are_what_is_kept(config_file: Path) -> None:
    config = with_model(config_file)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config.model.config), dtype=torch.bfloat16
    )
    model.requires_grad_(False)
    targets = choose_targets(model, config.peft)
    estimated = estimate(model, targets, config, processes=1, sharers=1, longest=128, again=range(9))[
        "activations_bytes"
    ]
    add_lora(model, targets, config.peft, seed=1)
    checkpoint_activations(model)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(True)  # else the first block keeps nothing
    really = kept_in_bytes(model, torch.randint(300, (2, 128)))
    assert 0.9 * really < estimated < 1.1 * really, (estimated, really)


def test_the_memory_told_is_that_of_the_smallest_way_where_the_gpu_isnt_known(config_file: Path) -> None:
    alone, several = (found_in(config_file, "device=cuda", processes=n)["memory"] for n in (1, 8))
    assert alone["weights_bytes"] == alone["base_bytes"] == several["base_bytes"]
    assert several["peak_bytes"] <= alone["peak_bytes"] + 2**30  # NCCL's
    whole = found_in(config_file, "device=cuda", "distributed.placement=replicate", processes=8)["memory"]
    assert whole["weights_bytes"] == whole["base_bytes"]
