"""The base model: from a local folder, or with random weights from a config, made on the device itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trainer.config import ModelSection
from trainer.errors import ConfigError, EnvironmentMismatch
from trainer.kernels import MambaKernels
from trainer.loss import summed_cross_entropy
from trainer.mamba import prepare_mixer

# transformers' annotations of its factories are incomplete.
_CausalLM: Any = AutoModelForCausalLM

FAMILIES = ("nemotron_h", "llama", "qwen3")
"""Model types whose blocks, masks and linear layers are known to train right here."""

NAMES_OF_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


class TrainingModel(nn.Module):
    """Token ids and labels → summed loss. The root of sharding: base weights are read in its forward only."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Both [batch, length] → the summed cross-entropy, a scalar in fp32."""
        # With a cache object the mamba layers would leave the fused path.
        output = self.causal_lm.model(input_ids=input_ids, use_cache=False)
        return summed_cross_entropy(output.last_hidden_state, labels, self.causal_lm.lm_head)


def model_config(section: ModelSection) -> Any:
    """The transformers config of the model, before any weight is touched. Raises ConfigError."""
    return _inline_config(section.config) if section.config is not None else _local_config(section)


def build_model(
    section: ModelSection, config: Any, kernels: MambaKernels, device: torch.device, *, seed: int
) -> Any:
    """The base model on `device`, frozen, in the dtype of `section`.

    Raises ConfigError for weights that can't be loaded, EnvironmentMismatch if kernels are missing on CUDA.
    """
    # What transformers would warn of is either set right here or an error.
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    _refuse_missing_kernels(config, kernels, device)
    model = (
        _load(section, config, device) if section.config is None else _random(section, config, device, seed)
    )
    model.requires_grad_(False)
    if config.model_type == "nemotron_h":
        low, high = config.time_step_limit
        for block in blocks_of(model):
            if block_kind(block) == "mamba":
                prepare_mixer(block.mixer, (float(low), float(high)), kernels.fused_scan)
    return model


def blocks_of(causal_lm: Any) -> Sequence[Any]:
    """The model's blocks, first to last."""
    blocks: Sequence[Any] = causal_lm.model.layers
    return blocks


def block_kind(block: Any) -> str:
    """mamba, attention, moe or mlp; "transformer" for a block that is attention and MLP at once."""
    kind = getattr(block, "block_type", "transformer")
    return NAMES_OF_KINDS.get(kind, kind)


def checkpoint_activations(causal_lm: Any) -> None:
    """Keeps only each block's input for the backward pass, which computes the block again."""
    # transformers renamed it during version 5.
    enable = (
        getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def kernels_in_use(causal_lm: Any, kernels: MambaKernels) -> dict[str, str]:
    """For each kind of block: how many there are and what they run on."""
    config = causal_lm.config
    attention = f"{config._attn_implementation} (PyTorch)"
    runs_on = {
        "mamba": "the fused scan (mamba_ssm, causal_conv1d)"
        if kernels.fused_scan
        else "the slow reference (PyTorch)",
        "attention": attention,
        "transformer": attention,
        "moe": f"{getattr(config, '_experts_implementation', None) or 'eager'} experts (PyTorch)",
        "mlp": "PyTorch",
    }
    counts = Counter(block_kind(block) for block in blocks_of(causal_lm))
    return {kind: f"{count} layers on {runs_on[kind]}" for kind, count in counts.items()}


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
    known = {*AutoConfig.for_model(model_type).to_dict(), "hybrid_override_pattern", "num_hidden_layers"}
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


def _load(section: ModelSection, config: Any, device: torch.device) -> Any:
    folder = section.pretrained_model_name_or_path
    try:
        model, info = _CausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as problem:
        raise ConfigError(
            f"The model in {folder} can't be loaded: {str(problem).splitlines()[0]}",
            remedy=f"ls -l {folder}  # every shard of model.safetensors.index.json must be there",
            context={"key": "model.pretrained_model_name_or_path"},
        ) from problem
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"The model in {folder} lacks {len(missing)} tensors, the first is {missing[0]}.",
            remedy=f"ls -l {folder}  # every shard of model.safetensors.index.json must be there",
            context={"folder": Path(str(folder)), "missing": ", ".join(missing[:5])},
        )
    return model


def _random(section: ModelSection, config: Any, device: torch.device, seed: int) -> Any:
    """Random weights by the model's own rules, made on the device: no host memory, seconds at true size.

    Every process makes the same ones: the numbers depend on the seed and the kind of device alone.
    """
    with torch.device("meta"):
        model = _CausalLM.from_config(
            config, dtype=getattr(torch, section.dtype), attn_implementation=section.attn_implementation
        )
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(seed)
    model.apply(model._init_weights)
    return model
