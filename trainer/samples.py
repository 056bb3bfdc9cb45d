"""Answers to fixed prompts, before the first step and after the last: always the likeliest token.

transformers' own `generate` with its cache, through the prepared model and the adapters. In fp32 that gives
the tokens that computing everything again for each one gives; in bf16 it may choose another of two tokens
whose logits are equal in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from trainer.chat import IGNORED
from trainer.config import SamplesSection
from trainer.data import Dataset
from trainer.prepare import Run

VALIDATION_PROMPTS = 2
"""Of the validation data, if the config names no prompts."""


@dataclass(frozen=True)
class Prompt:
    """What is given to the model."""

    ids: tuple[int, ...]
    """Tokens, with the chat template's beginning of an answer."""
    text: str
    expected: str | None = None
    """What the data answers."""


def write_samples(run: Run, when: Literal["before", "after"], pulse: Callable[[], None]) -> None:
    """Records the answers. All processes compute them, for a base that may be sharded; rank 0 writes.

    `pulse` is called after each: a sign of life. Where they can't be computed, that is noted; a full GPU is
    raised where processes share the base.
    """
    prompts = list(prompts_of(run.config.samples, run.validation, run.tokenizer))
    if not prompts:
        return
    run.metrics.say(f"{len(prompts)} sample{'s' if len(prompts) > 1 else ''} {when} training")
    for prompt in prompts:
        began = time.perf_counter()
        try:
            ids = generate(run, prompt.ids)
        except RuntimeError as problem:
            if run.plan.shard and isinstance(problem, torch.OutOfMemoryError):
                raise  # perhaps of this process alone: the others would gather without it
            # Training doesn't need them, and transformers' cached path asks more of a model's sizes.
            run.metrics.note(f"samples {when} training are left out: {str(problem).splitlines()[0]}")
            return
        pulse()
        run.metrics.write(
            "sample",
            when=when,
            step=run.progress.steps,
            prompt=prompt.text,
            text=run.tokenizer.decode(ids, skip_special_tokens=True),
            expected=prompt.expected,
            tokens=len(ids),
            seconds=time.perf_counter() - began,
        )


def prompts_of(section: SamplesSection, validation: Dataset | None, tokenizer: Any) -> Iterator[Prompt]:
    """The config's prompts as a user's turn each; without any, the first of the validation data."""
    if section.prompts is None:
        yield from _of_data(validation, tokenizer)
        return
    for text in section.prompts:
        messages = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        yield Prompt(tuple(tokenizer(shown, add_special_tokens=False)["input_ids"]), text)


def _of_data(validation: Dataset | None, tokenizer: Any) -> Iterator[Prompt]:
    """All before the first trained token of an example, if there is something."""
    for example in (validation.examples if validation else ())[:VALIDATION_PROMPTS]:
        begin = next(place for place, label in enumerate(example.labels) if label != IGNORED)
        answer = takewhile(lambda label: label != IGNORED, example.labels[begin:])
        if ids := tuple(example.input_ids[:begin]):
            expected = tokenizer.decode(list(answer), skip_special_tokens=True)
            yield Prompt(ids, tokenizer.decode(ids), expected)


@torch.no_grad()
def generate(run: Run, prompt: tuple[int, ...]) -> list[int]:
    """The answer's tokens, without the one that ends it. Changes no weight, and draws no random number."""
    model: Any = run.training_model
    by_fsdp2 = run.plan.shard and run.shared is None
    if by_fsdp2:
        # FSDP begins at its root, which it notices around a method of the root's own only.
        model.generate = model.causal_lm.generate
        register_fsdp_forward_method(model, "generate")
    ids = torch.tensor([prompt], device=run.world.device)
    model.eval()
    try:
        tokens: Tensor = (model if by_fsdp2 else model.causal_lm).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=run.config.samples.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=run.tokenizer.eos_token_id,
            pad_token_id=run.pad,
            # A process that is through goes on computing: the others need its part of the weights.
            synced_gpus=run.plan.shard,
        )
    finally:
        model.train()
    answer: list[int] = tokens[0, len(prompt) :].tolist()
    ended = run.tokenizer.eos_token_id
    return answer[: answer.index(ended)] if ended in answer else answer
