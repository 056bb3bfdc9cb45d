"""The slow half of `inspection.py`: tokenizer, template, token counts, layers, memory and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.chat import IGNORED, InexactTemplate, encode, marks_generation
from trainer.config import Config, DatasetSection
from trainer.conversations import Conversation, numbered_lines, read_conversation
from trainer.errors import ConfigError, TrainerError
from trainer.kernels import find_mamba_kernels
from trainer.lora import choose_targets
from trainer.model import model_config
from trainer.packing import pack
from trainer.placement import choose, layers_alone, plans
from trainer.prepare import check_batch_sizes, check_vocabulary, steps_of
from trainer.tokenizer import open_tokenizer

SAMPLE_BYTES = 8_000_000
"""Of a larger file, every nth line is tokenized, as many as make this."""
SHOWN_LINES = 10
QUESTION = {"role": "user", "content": "What is 2 and 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
SAMPLE_TALKS = {"one turn": [QUESTION, ANSWER], "two turns": [QUESTION, ANSWER, QUESTION, ANSWER]}

Facts = dict[str, Any]


def inspect_model(config: Config, processes: int) -> Facts:
    """The parts `tokenizer`, `template`, `tokens`, `model`, `memory`, `batch` and `steps`."""
    found: Facts = {"batch": _attempt(lambda: check_batch_sizes(config, processes), config)[0]}
    find_mamba_kernels("cpu")  # their modules are for a node with a GPU, and no layer is run here
    found["tokenizer"], tokenizer = _attempt(lambda: open_tokenizer(config.model), config)
    found["model"], base_config = _attempt(lambda: model_config(config.model), config)
    longest = config.dataset.seq_length
    if tokenizer is not None:
        found["tokenizer"] = _tokenizer_facts(tokenizer)
        found["template"] = template_facts(tokenizer)
        found["tokens"] = {
            name: count_tokens(section, tokenizer)
            for name, section in (("data", config.dataset), ("validation_data", config.validation_dataset))
            if section is not None
        }
        counted = found["tokens"]["data"]
        complete = counted.get("sampled") == counted.get("lines")
        if complete and counted.get("longest") and not config.dataset.packing:
            longest = counted["longest"]
        if counted.get("examples"):
            found["steps"] = _steps(config, counted)
    if base_config is not None:
        found |= _parts(
            lambda: _model_and_memory(config, base_config, tokenizer, processes=processes, longest=longest),
            config,
        )
    return found


def _attempt(action: Callable[[], Any], config: Config) -> tuple[Facts, Any]:
    """What `action` made, or the part that tells why it couldn't."""
    try:
        return {}, action()
    except TrainerError as problem:
        return {"error": problem.described()}, None
    except Exception as problem:  # libraries raise all kinds of errors on a damaged file
        text = (str(problem).splitlines() or [""])[0]
        folder = config.model.pretrained_model_name_or_path or config.model.tokenizer
        error = ConfigError(
            f"The model's files are damaged, or of another version: {type(problem).__name__}: {text}",
            remedy=f"ls -l {folder}  # bring the model's folder once more",
        )
        return {"error": error.described()}, None


def _parts(action: Callable[[], Facts], config: Config) -> Facts:
    """The parts that `action` makes, or its error as the part `model`."""
    error, parts = _attempt(action, config)
    return {"model": error} if parts is None else dict(parts)


def _tokenizer_facts(tokenizer: Any) -> Facts:
    vocabulary = tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "special": special,
        "unknown_special": sorted(token for token in special.values() if token not in vocabulary),
        "has_end": tokenizer.eos_token is not None,
        "has_padding": tokenizer.pad_token_id is not None,
    }


def template_facts(tokenizer: Any) -> Facts:
    """How the chat template tells the assistant's tokens apart, tried on conversations of one and two turns.

    For each: `tokens`, `trained`, and `trained_text`, what the loss would be on; or why it can't be told.
    """
    talks: Facts = {}
    for name, messages in SAMPLE_TALKS.items():
        try:
            ids, labels = encode(messages, tokenizer)
        except InexactTemplate as problem:
            talks[name] = {"inexact": str(problem)}
        except Exception as problem:  # a template's own errors, and those of its interpreter
            talks[name] = {"broken": f"{type(problem).__name__}: {problem}"}
        else:
            trained = [label for label in labels[1:] if label != IGNORED]
            talks[name] = {
                "tokens": len(ids),
                "trained": len(trained),
                "trained_text": tokenizer.decode(trained),
            }
    return {"marks_generation": marks_generation(tokenizer), "talks": talks}


def count_tokens(section: DatasetSection, tokenizer: Any) -> Facts:
    """Lengths in tokens, before and after cutting, of all lines or of a sample that is spread over the file.

    Lines that aren't conversations are left out: `conversations.scan` tells them.
    """
    if section.kind == "synthetic":
        tokens = section.examples * section.seq_length
        return {
            "synthetic": True,
            "lines": section.examples,
            "sampled": section.examples,
            "examples": section.examples,
            "rows": section.examples,
            "tokens": tokens,
            "trained": tokens - section.examples,
            "longest": section.seq_length,
        }
    file = section.path_or_dataset_id
    assert file is not None
    if not file.is_file():
        return {}
    lines = sum(1 for _ in numbered_lines(file))
    stride = max(1, math.ceil(file.stat().st_size / SAMPLE_BYTES))
    lengths: list[int] = []
    refused: list[str] = []
    truncated: list[int] = []
    dropped: list[int] = []
    sampled = trained = 0
    kept: list[int] = []
    for number, talk in _conversations(file, stride):
        sampled += 1
        try:
            ids, labels = encode(talk.messages, tokenizer, tools=talk.tools, train_on=section.train_on)
        except Exception as problem:  # see template_facts
            refused.append(f"line {number}: {problem}")
            continue
        lengths.append(len(ids))
        of_example = sum(label != IGNORED for label in labels[1 : section.seq_length])
        too_long = len(ids) > section.seq_length
        if (too_long and section.overlong == "drop") or not of_example:
            dropped.append(number)
            continue
        if too_long:
            truncated.append(number)
        kept.append(min(len(ids), section.seq_length))
        trained += of_example
    lengths.sort()
    return {
        "lines": lines if stride > 1 else sampled,
        "sampled": sampled,
        "examples": len(lengths) - len(dropped),
        "rows": len(pack(kept, section.seq_length)) if section.packing else len(kept),
        "tokens": sum(kept),
        "trained": trained,
        "truncated": len(truncated),
        "truncated_lines": truncated[:SHOWN_LINES],
        "dropped": len(dropped),
        "dropped_lines": dropped[:SHOWN_LINES],
        "refused": len(refused),
        "refused_lines": refused[:SHOWN_LINES],
        "p50": _percentile(lengths, 50),
        "p95": _percentile(lengths, 95),
        "longest": lengths[-1] if lengths else 0,
        "seq_length": section.seq_length,
        "overlong": section.overlong,
    }


def _conversations(file: Path, stride: int) -> Iterator[tuple[int, Conversation]]:
    for position, (number, line) in enumerate(numbered_lines(file)):
        if position % stride == 0:
            try:
                yield number, read_conversation(line)
            except ValueError:
                continue


def _percentile(ordered: list[int], percent: int) -> int:
    """The smallest value that `percent` of all do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def _model_and_memory(
    config: Config, base_config: Any, tokenizer: Any, *, processes: int, longest: int
) -> Facts:
    if tokenizer is not None:
        check_vocabulary(tokenizer, base_config)
    causal_lm = layers_alone(config, base_config)
    targets = choose_targets(causal_lm, config.peft)
    ways = plans(config, causal_lm, targets, processes=processes, longest=longest)
    return {
        "model": {
            "model_type": base_config.model_type,
            "vocab_size": base_config.vocab_size,
            "max_positions": getattr(base_config, "max_position_embeddings", None),
            "linear_layers": targets.linear_layers,
            "adapted_layers": len(targets.names),
            "notes": list(targets.notes),
        },
        "memory": choose(config, ways).memory,
    }


def _steps(config: Config, counted: Facts) -> Facts:
    # Of a sample, the whole file's by its share.
    examples, rows = (
        max(1, round(counted[kind] * counted["lines"] / counted["sampled"])) for kind in ("examples", "rows")
    )
    steps = steps_of(config, rows * (config.step_scheduler.num_epochs or 0))
    batch = config.step_scheduler.global_batch_size
    return {
        "examples": examples,
        "steps": steps,
        "epochs": round(steps * batch / rows, 2),
        "tokens_per_step": round(batch * counted["tokens"] / counted["rows"]),
    }
