"""The base model: its layers without memory first; then, perhaps sharded, its weights on the device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trainer.config import ModelSection
from trainer.elementwise import prepare_elementwise
from trainer.errors import ConfigError, EnvironmentMismatch
from trainer.experts import prepare_experts, routed_experts
from trainer.kernels import MambaKernels
from trainer.loading import computed_buffers, load_weights, random_weights
from trainer.loss import summed_cross_entropy
from trainer.mamba import prepare_mixer
from trainer.packing import document_mask
from trainer.router import prepare_routers

# transformers' annotations of its factories are incomplete.
_CausalLM: Any = AutoModelForCausalLM

FAMILIES = ("nemotron_h", "llama", "qwen3", "qwen3_moe")
"""Model types whose blocks, masks and linear layers are known to train right here."""

NAMES_OF_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


class TrainingModel(nn.Module):
    """Token ids and labels → summed loss. The root of sharding: base weights are read in its forward only."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self, input_ids: Tensor, labels: Tensor, predicting: Tensor | None = None, **layout: Tensor | int
    ) -> Tensor:
        """Both [batch, length], and the documents' places if packed → the summed cross-entropy, in fp32.

        `predicting`: see `summed_cross_entropy`.
        """
        if has_own_masks(self.causal_lm):
            # transformers would ask the device what is needed. Without documents it is plain causality.
            documents = layout.get("seq_idx")
            masks = {}
            if isinstance(documents, Tensor):
                masks["full_attention"] = document_mask(documents, self.causal_lm.dtype)
            layout["attention_mask"] = masks  # type: ignore[assignment]
        # With a cache object the mamba layers would leave the fused path.
        output = self.causal_lm.model(input_ids=input_ids, use_cache=False, **layout)
        return summed_cross_entropy(output.last_hidden_state, labels, self.causal_lm.lm_head, predicting)


def model_config(section: ModelSection) -> Any:
    """The transformers config of the model, before any weight is touched. Raises ConfigError."""
    config = _inline_config(section.config) if section.config is not None else _local_config(section)
    _refuse_untrained_parts(config)
    return config


def empty_model(section: ModelSection, config: Any, kernels: MambaKernels, device: torch.device) -> Any:
    """The base model for `device`, frozen, in the dtype of `section`, on the meta device: shapes, no memory.

    Raises EnvironmentMismatch if kernels are missing on CUDA.
    """
    # What transformers would warn of is either set right here or an error.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    _refuse_missing_kernels(config, kernels, device)
    with torch.device("meta"):
        model = _CausalLM.from_config(
            config, dtype=getattr(torch, section.dtype), attn_implementation=section.attn_implementation
        )
    model.requires_grad_(False)
    for _, experts in routed_experts(model):
        prepare_experts(experts)
    _keep_buffers_in_fp32(model)
    if config.model_type == "nemotron_h":
        prepare_elementwise(model)
        prepare_routers(model)
        low, high = config.time_step_limit
        for block in blocks_of(model):
            if block_kind(block) == "mamba":
                prepare_mixer(block.mixer, (float(low), float(high)), kernels.fused_scan)
    return model


def fill(causal_lm: Any, section: ModelSection, device: torch.device, *, seed: int) -> None:
    """Gives an empty model memory on `device` and its weights; of a sharded one, this process's part.

    What has memory already keeps it. Raises ConfigError for weights that can't be loaded.
    """
    causal_lm._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    causal_lm.tie_weights()
    if section.pretrained_model_name_or_path is None:
        random_weights(causal_lm, blocks_of(causal_lm), seed)
    else:
        load_weights(causal_lm, section.pretrained_model_name_or_path)
        computed_buffers(causal_lm)


def build_model(
    section: ModelSection, config: Any, kernels: MambaKernels, device: torch.device, *, seed: int
) -> Any:
    """The whole base model with its weights, see `empty_model` and `fill`."""
    model = empty_model(section, config, kernels, device)
    fill(model, section, device, seed=seed)
    return model


def _keep_buffers_in_fp32(model: Any) -> None:
    """Those that transformers keeps so whatever the weights' dtype is, such as the router's correction."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name in kept:
                setattr(module, name, buffer.float())


def has_own_masks(causal_lm: Any) -> bool:
    """Whether the model's forward takes masks by kind of block, and attention without one is causal."""
    config = causal_lm.config
    return bool(config.model_type == "nemotron_h" and config._attn_implementation == "sdpa")


def blocks_of(causal_lm: Any) -> Sequence[Any]:
    """The model's blocks, first to last."""
    blocks: Sequence[Any] = causal_lm.model.layers
    return blocks


def block_kind(block: Any) -> str:
    """mamba, attention, moe or mlp; for attention with an MLP or experts in one block, transformer or
    moe_transformer."""
    kind: str | None = getattr(block, "block_type", None)
    if kind is None:
        return "moe_transformer" if hasattr(block.mlp, "experts") else "transformer"
    return NAMES_OF_KINDS.get(kind, kind)


def checkpoint_activations(
    causal_lm: Any, *, again: Collection[int] | None = None, random: bool = True
) -> None:
    """Keeps only a block's input for the backward pass, which computes the block again.

    `again`: the blocks' numbers, by default all. `random`: whether a block draws random numbers, which must
    then be the same the second time.
    """
    # transformers renamed it during version 5.
    enable = (
        getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False, "preserve_rng_state": random})
    for number, block in enumerate(blocks_of(causal_lm)):
        block.gradient_checkpointing = again is None or number in again


def kernels_in_use(causal_lm: Any, kernels: MambaKernels) -> dict[str, str]:
    """For each kind of block: how many there are and what they run on."""
    config = causal_lm.config
    attention, experts = f"{config._attn_implementation} (PyTorch)", "grouped_mm experts (PyTorch)"
    runs_on = {
        "mamba": "the fused scan (mamba_ssm, causal_conv1d)"
        if kernels.fused_scan
        else "the slow reference (PyTorch)",
        "attention": attention,
        "transformer": attention,
        "moe": experts,
        "moe_transformer": f"{attention} and {experts}",
        "mlp": "PyTorch",
    }
    counts = Counter(block_kind(block) for block in blocks_of(causal_lm))
    return {kind: f"{count} layers on {runs_on[kind]}" for kind, count in counts.items()}


def _refuse_untrained_parts(config: Any) -> None:
    """ConfigError for what a model of a supported family may have and would be trained wrongly."""
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ConfigError(
            "The model has experts in some blocks and an MLP in others, which is not supported: PEFT would "
            "take LoRA on the MLP's layers for LoRA on the experts.",
            remedy="take a model with experts in every block: mlp_only_layers empty, decoder_sparse_step 1",
            context={"model_type": config.model_type},
        )
    if getattr(config, "output_router_logits", False):
        raise ConfigError(
            "The model's config asks for the router's balancing loss, which is not computed here.",
            remedy="set output_router_logits to false in the model's config.json",
            context={"model_type": config.model_type},
        )


def _refuse_missing_kernels(config: Any, kernels: MambaKernels, device: torch.device) -> None:
    kinds = getattr(config, "layers_block_type", None) or ()
    has_mamba = "mamba" in {NAMES_OF_KINDS.get(kind, kind) for kind in kinds}
    if device.type == "cuda" and has_mamba and kernels.fused_scan is None:
        raise EnvironmentMismatch(
            f"The mamba layers' kernels can't be imported: {', '.join(kernels.missing)}.",
            remedy="envbuilder doctor  # says what is wrong with the compiled packages",
            context=kernels.missing,
        )


def _inline_config(fields: dict[str, Any]) -> Any:
    model_type = fields["model_type"]
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.config.model_type is {model_type}, which is not supported.",
            remedy=f"take one of: {', '.join(FAMILIES)}",
            context={"key": "model.config.model_type"},
        )
    # transformers keeps unknown fields silently, so a misspelt one would be lost.
    plain = AutoConfig.for_model(model_type)
    read_elsewhere = {"hybrid_override_pattern", "num_hidden_layers", "head_dim"}
    known = {*plain.to_dict(), *plain.attribute_map, *read_elsewhere}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(
            f"model.config has fields that {model_type} doesn't know: {', '.join(unknown)}.",
            remedy="correct or remove them in the training config",
            context={"keys": ", ".join(f"model.config.{name}" for name in unknown)},
        )
    try:
        return AutoConfig.for_model(**fields)
    except Exception as problem:  # each config class checks its fields with errors of its own
        raise ConfigError(
            f"model.config is not a valid {model_type} config: {str(problem).splitlines()[-1].strip()}",
            remedy="correct the field in the training config",
            context={"key": "model.config"},
        ) from problem


def _local_config(section: ModelSection) -> Any:
    folder = section.pretrained_model_name_or_path
    assert folder is not None
    found = folder / "config.json"
    try:
        model_type = json.loads(found.read_bytes()).get("model_type")
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"{folder} holds no readable config.json, so it is not a model's folder.",
            remedy=f"ls {folder}  # nothing is downloaded: give the folder of a model that is already here",
            context={"key": "model.pretrained_model_name_or_path", "problem": problem},
        ) from problem
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has no safetensors files; other weight formats can run code and are not read.",
            remedy=f"ls {folder}  # bring the model's *.safetensors",
            context={"key": "model.pretrained_model_name_or_path"},
        )
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{folder} holds a model of type {model_type}, which is not supported.",
            remedy=f"take a model of one of these types: {', '.join(FAMILIES)}",
            context={"key": "model.pretrained_model_name_or_path"},
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
