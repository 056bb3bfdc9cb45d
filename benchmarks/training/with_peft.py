"""transformers and PEFT as they come, in a plain loop: no Trainer around it, which would only add to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.training.rows import batches
from benchmarks.training.work import EXPERTS, Work
from trainer.config import Config
from trainer.kernels import find_mamba_kernels
from trainer.loading import random_weights
from trainer.model import blocks_of, model_config
from trainer.reading import read_config


class WithPeft:
    """A PEFT model in training."""

    processes = 1

    def __init__(self, work: Work, config: Config, missing: dict[str, str]) -> None:
        self.device = torch.device(config.device)
        self.config = config
        base_config = model_config(config.model)
        self.batch = batches(config, base_config)
        dtype = getattr(torch, config.model.dtype)
        with torch.device("meta"):
            causal_lm: Any = AutoModelForCausalLM.from_config(
                base_config, dtype=dtype, attn_implementation=config.model.attn_implementation
            )
        causal_lm.to_empty(device=self.device)
        causal_lm.tie_weights()
        random_weights(causal_lm, blocks_of(causal_lm), config.seed)
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.peft.dim,
            lora_alpha=int(config.peft.alpha),
            target_modules=[name for name in work.targets if name not in EXPERTS],
            target_parameters=[name for name in work.targets if name in EXPERTS] or None,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(causal_lm, lora)
        if work.checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        section = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )
        self.autocast = work.contestant == "peft-autocast"
        self.trainable = sum(weight.numel() for weight in self.trained)
        self.precision = f"base {config.model.dtype}, adapters {self.trained[0].dtype}".replace("torch.", "")
        self.notes = ["under autocast" if self.autocast else "without autocast"]
        self.notes += [f"without {name}: {problem}" for name, problem in missing.items()]
        self.kept: list[Tensor] = []

    def step(self, number: int) -> None:
        input_ids, labels = (tensor.to(self.device) for tensor in self.batch(number))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        if self.config.optimizer.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.kept.append(loss.detach())

    def losses(self) -> list[float]:
        return [loss.item() for loss in self.kept]


@contextmanager
def contestant(work: Work) -> Iterator[WithPeft]:
    config = read_config(work.config, work.config_overrides(1))
    kernels = find_mamba_kernels(config.device)
    yield WithPeft(work, config, kernels.missing)
