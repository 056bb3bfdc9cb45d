"""NeMo Automodel's own model, LoRA, loss and clipping, called as its fine-tuning recipe does on one GPU.

Written against nemo-automodel 0.7.0 and the settings of its single-GPU LoRA recipe for this model: sdpa
attention, torch linear layers, fp32 RMSNorm, torch dispatcher, experts by torch._grouped_mm, its Triton
LoRA, masked cross-entropy in fp32, its Triton norm for clipping, Adam. No logging, no data loader and no FSDP
around it, which it doesn't use on one GPU either. Adapters have the base's dtype, its default; no mask goes
with the tokens, so attention takes its fastest path. The weights are those of the other contestants.

Options: `bf16-loss` computes the loss without fp32 logits; `torch-lora` its LoRA without Triton;
`recipe-adapters` the adapters of its recipe: every linear layer but out_proj, lm_head too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.utils import calculate_loss
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.training.utils import scale_grads_and_clip_grad_norm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.training.rows import batches
from benchmarks.training.work import DENSE, Work
from trainer.chat import IGNORED
from trainer.config import Config
from trainer.loading import random_weights
from trainer.model import blocks_of, model_config
from trainer.reading import read_config

NAMES = {
    "embeddings.weight": "embed_tokens.weight",
    "norm_f.weight": "norm.weight",
    "mixer.A_log": "mixer._fp32_params.A_log",
    "mixer.D": "mixer._fp32_params.D",
    "mixer.dt_bias": "mixer._fp32_params.dt_bias",
    "experts.up_proj": "experts.gate_and_up_projs",
    "experts.down_proj": "experts.down_projs",
}
"""How the ending of a name in transformers reads in NeMo Automodel; the experts' weights are transposed."""


class WithNemo:
    """A NeMo Automodel model in training."""

    processes = 1

    def __init__(self, work: Work, config: Config) -> None:
        self.device = torch.device(config.device)
        self.config = config
        base_config = model_config(config.model)
        self.batch = batches(config, base_config)
        dtype = getattr(torch, config.model.dtype)
        if work.adapters == "dense":
            chosen: dict[str, Any] = {"target_modules": [f"*.{name}" for name in DENSE]}
        else:
            chosen = {"target_modules": [*(f"*.{name}" for name in DENSE), "*.mixer.experts"]}
        if "recipe-adapters" in work.options:
            chosen = {"exclude_modules": ["*.out_proj"]}
        triton = "torch-lora" not in work.options
        base_config.architectures = ["NemotronHForCausalLM"]  # by which NeMo Automodel finds its own model
        self.model: Any = NeMoAutoModelForCausalLM.from_config(
            base_config,
            dtype=dtype,
            backend=BackendConfig(
                attn="sdpa",
                linear="torch",
                rms_norm="torch_fp32",
                rope_fusion=False,
                experts="torch_mm",
                dispatcher="torch",
            ),
            peft_config=PeftConfig(
                **chosen, dim=config.peft.dim, alpha=int(config.peft.alpha), use_triton=triton
            ),
        )
        take_weights(self.model, base_config, config, self.device)
        if work.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        section = config.optimizer
        self.optimizer = torch.optim.Adam(
            self.trained,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )
        self.loss = MaskedCrossEntropy(fp32_upcast="bf16-loss" not in work.options)
        self.trainable = sum(weight.numel() for weight in self.trained)
        self.precision = f"base {config.model.dtype}, adapters {self.trained[0].dtype}".replace("torch.", "")
        self.notes = [f"options: {', '.join(work.options) or 'none'}"]
        self.kept: list[Tensor] = []

    def step(self, number: int) -> None:
        input_ids, labels = self.batch(number)
        # Here a label is the next place's token.
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        trained = int((labels != IGNORED).sum())
        out = self.model(input_ids=input_ids.to(self.device, non_blocking=True))
        loss = calculate_loss(
            self.loss,
            logits=getattr(out, "logits", out),
            labels=labels.to(self.device, non_blocking=True),
            model=self.model,
            num_label_tokens=trained,
        )
        del out
        self.kept.append(loss.detach().clone())
        loss.backward()
        scale_grads_and_clip_grad_norm(
            self.config.optimizer.max_grad_norm,
            [self.model],
            norm_type=2.0,
            foreach=True,
            num_label_tokens=trained,
            dp_group_size=1,
            grad_norm_backend="triton",
        )
        self.optimizer.step()
        self.optimizer.zero_grad()

    def losses(self) -> list[float]:
        return [loss.item() for loss in self.kept]


@torch.no_grad()
def take_weights(model: nn.Module, base_config: Any, config: Config, device: torch.device) -> None:
    """Copies transformers' random weights into NeMo Automodel's `model`; both are on the device for that."""
    with torch.device("meta"):
        source: Any = AutoModelForCausalLM.from_config(base_config, dtype=getattr(torch, config.model.dtype))
    source.to_empty(device=device)
    random_weights(source, blocks_of(source), config.seed)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    taken = set()
    for name, tensor in {**dict(source.named_parameters()), **dict(source.named_buffers())}.items():
        target = next(
            (name.removesuffix(theirs) + ours for theirs, ours in NAMES.items() if name.endswith(theirs)),
            name,
        )
        own[target].copy_(tensor.transpose(1, 2) if ".experts." in name else tensor)
        taken.add(target)
    left = {name for name in own if name not in taken and "lora_" not in name}
    assert not left, f"no weights for {sorted(left)[:5]}"
    del source, tensor
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def contestant(work: Work) -> Iterator[WithNemo]:
    yield WithNemo(work, read_config(work.config, work.config_overrides(1)))
