"""What a config needs of one GPU's memory, by arithmetic on the model's layers: nothing is allocated.

    weights     the frozen base in its dtype. Every process loads all of it; then, with several processes,
                each keeps its part, the root (embeddings and head) and the blocks gathered at a time
    adapters    fp32, with a gradient and two moments each: 16 bytes a parameter, whole in every process
    activations with checkpointing: each block's input, and one block's activations twice while it is computed
                again; without: those of all blocks, and one block's gradients
    logits      of one chunk of tokens: in the weights' dtype, in fp32, and both gradients
    the rest    the CUDA context, workspaces, what the allocator can't use; NCCL's buffers for several

A linear layer keeps its input and output; one with LoRA an fp32 copy of its input too.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.data import LENGTH_MULTIPLE
from trainer.loss import CHUNK_TOKENS
from trainer.model import blocks_of

FP32 = 4
ADAPTER_BYTES = 16
"""A parameter in fp32, its gradient, and Adam's two moments."""
GATHERED_BLOCKS = 3
"""The block that computes, the one gathered ahead, and the buffer that it is gathered in."""
CONTEXT_BYTES = 2**30
NCCL_BYTES = 2**30
UNCERTAINTY = 0.25
"""Of all but the weights and adapters: kernels differ in what they keep. Held against 61.7 GiB measured for
Nemotron-3-Nano-30B-A3B at 4,096 tokens on one H200 with checkpointing."""


def estimate(
    causal_lm: Any, targets: Collection[str], config: Config, *, processes: int, longest: int
) -> dict[str, int]:
    """Bytes by kind for each process's GPU.

    `causal_lm` may be on the meta device; `targets` are the names of its layers with LoRA; `longest` is the
    longest sequence's length in tokens.
    """
    blocks = blocks_of(causal_lm)
    dtype_bytes = torch.finfo(causal_lm.dtype).bits // 8
    sequences = config.step_scheduler.local_batch_size
    length = math.ceil(min(longest, config.dataset.seq_length) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = sequences * length

    base = _bytes_of(causal_lm)
    of_blocks = [_bytes_of(block) for block in blocks]
    weights = base
    if processes > 1:
        weights = base // processes + (base - sum(of_blocks)) + GATHERED_BLOCKS * max(of_blocks)
    lora = config.peft.dim * sum(
        module.in_features + module.out_features
        for name, module in causal_lm.named_modules()
        if name in targets and isinstance(module, nn.Linear)
    )
    adapted = {id(module) for name, module in causal_lm.named_modules() if name in targets}
    kept = [
        tokens * kept_by_block(block, causal_lm.config, adapted, dtype_bytes=dtype_bytes, length=length)
        for block in blocks
    ]
    hidden = tokens * causal_lm.config.hidden_size
    activations = hidden * FP32  # of the norm before the head
    if config.distributed.activation_checkpointing:
        activations += len(blocks) * hidden * dtype_bytes
        working = 2 * max(kept)
    else:
        activations += sum(kept)
        working = max(kept)
    logits = min(tokens, CHUNK_TOKENS) * causal_lm.config.vocab_size * 2 * (dtype_bytes + FP32)
    other = CONTEXT_BYTES + (NCCL_BYTES if processes > 1 else 0)
    training = weights + lora * ADAPTER_BYTES + activations + max(logits, working)
    loading = base + lora * FP32
    return {
        "parameters": sum(parameter.numel() for parameter in causal_lm.parameters()),
        "trainable_parameters": lora,
        "tokens_per_pass": tokens,
        "base_bytes": base,
        "weights_bytes": weights,
        "adapters_bytes": lora * ADAPTER_BYTES,
        "activations_bytes": activations,
        "working_bytes": working,
        "logits_bytes": logits,
        "other_bytes": other,
        "loading_bytes": loading + other,
        "least_bytes": max(loading, weights + lora * ADAPTER_BYTES),
        "peak_bytes": max(training, loading) + other,
        "uncertain_bytes": int(UNCERTAINTY * (activations + max(logits, working) + other)),
    }


def kept_by_block(block: Any, config: Any, adapted: set[int], *, dtype_bytes: int, length: int) -> int:
    """Bytes for each token that one block keeps for its backward pass.

    `adapted` has the id of every linear layer with LoRA; `length` is the sequence's, in tokens.
    """
    kept = 0
    for module in block.modules():
        if isinstance(module, nn.Linear):
            kept += (module.in_features + module.out_features) * dtype_bytes
            kept += module.in_features * FP32 * (id(module) in adapted)
        elif isinstance(module, nn.Conv1d):
            kept += (module.in_channels + module.out_channels) * dtype_bytes
        else:
            own = list(module.parameters(recurse=False))
            # A norm computes in fp32, and keeps what came in and what went out.
            kept += sum(
                2 * FP32 * p.numel() for p in own if p.dim() == 1 and "norm" in type(module).__name__.lower()
            )
            # The routed experts' weights: [experts, out, in].
            kept += sum(
                sum(p.shape[1:]) * config.num_experts_per_tok * dtype_bytes for p in own if p.dim() == 3
            )
        if hasattr(module, "q_proj"):
            kept += _kept_by_attention(module, config, dtype_bytes, length)
        if hasattr(module, "ssm_state_size"):
            # The scan's state at the end of each chunk, and its gradient.
            state = module.num_heads * module.head_dim * module.ssm_state_size
            kept += 2 * FP32 * state // module.chunk_size
    return kept


def _kept_by_attention(module: Any, config: Any, dtype_bytes: int, length: int) -> int:
    """Queries, keys and values once more as the kernel takes them; written out, the scores too."""
    copies = (
        module.q_proj.out_features + module.k_proj.out_features + module.v_proj.out_features
    ) * dtype_bytes
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        return int(copies + config.num_attention_heads * length * (FP32 + 2 * dtype_bytes))
    return int(copies)


def _bytes_of(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
