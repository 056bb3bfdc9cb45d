"""What a config needs of one GPU's memory, by arithmetic on the model's layers: nothing is allocated.

    weights     the frozen base in its dtype. Replicated, all of it; sharded, what each process keeps whole
                (embeddings, head, and perhaps some blocks), its part of the other blocks, and the blocks
                gathered at a time
    adapters    fp32, with a gradient and two moments each: 16 bytes a parameter, whole in every process
    activations of blocks that are computed again their input, and one block's activations twice while that is
                done; of the others all, and one block's gradients
    logits      of one chunk of tokens, in the weights' dtype; through an adapted head also in fp32, and both
                gradients
    the rest    the CUDA context, workspaces, what the allocator can't use; NCCL's buffers for several
    loading     what the process keeps of the base; random weights of a sharded block are made whole first
    beside      what a validating pass takes beside those recorded as CUDA graphs, which give nothing back,
                and the graphs

A linear layer keeps its output, for what comes after it, and one with LoRA its input. What CUDA runs is
counted, whatever this machine has: the fused mamba scan, norms and activations that keep their input alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from trainer.config import Config
from trainer.data import LENGTH_MULTIPLE
from trainer.lora import Targets
from trainer.loss import CHUNK_TOKENS
from trainer.model import blocks_of
from trainer.sharding import PLACES

FP32 = 4
ADAPTER_BYTES = 16
"""A parameter in fp32, its gradient, and Adam's two moments."""
GATHERED_BLOCKS = {"in_place": PLACES, "fsdp2": 3}
"""The block that computes and the one gathered ahead; FSDP2 gathers into a buffer besides."""
GRAPHS_BYTES = 2**30
"""Of the CUDA graphs themselves, which PyTorch doesn't count: a guess."""
LAST_PROJECTIONS = ("out_proj", "o_proj", "down_proj")
CONTEXT_BYTES = 2**30
NCCL_BYTES = 2**30
"""For each group of processes."""
UNCERTAINTY = 0.25
"""Of all but the weights and adapters: kernels differ in what they keep. Held against what was measured for
Nemotron-3-Nano-30B-A3B on one H200 without checkpointing: 68.6 GiB at 4,096 tokens in a pass, 94.9 at
16,384."""


def estimate(
    causal_lm: Any,
    targets: Targets,
    config: Config,
    *,
    processes: int,
    sharers: int,
    longest: int,
    whole: Collection[int] = (),
    again: Collection[int] = (),
) -> dict[str, int]:
    """Bytes by kind for each process's GPU.

    `causal_lm` may be on the meta device; `sharers` is how many processes share one copy of the base, 1 where
    each has its own; `whole` has the numbers of the blocks that each keeps whole all the same, `again` of
    those whose activations are computed again; `longest` is the longest sequence's length in tokens.
    """
    blocks = blocks_of(causal_lm)
    dtype_bytes = torch.finfo(causal_lm.dtype).bits // 8
    length = math.ceil(min(longest, config.dataset.seq_length) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens = config.step_scheduler.local_batch_size * length

    base = bytes_of(causal_lm)
    of_blocks = [bytes_of(block) for block in blocks]
    sharded = [size for number, size in enumerate(of_blocks) if sharers > 1 and number not in whole]
    kept_base = base - sum(sharded) + math.ceil(sum(sharded) / sharers)
    gathering = config.distributed.gathering
    gathered = GATHERED_BLOCKS[gathering] * max(sharded, default=0)
    weights = kept_base + gathered
    lora = _lora_parameters(causal_lm, targets, config.peft.dim)
    adapted = adapted_layers(causal_lm, targets)
    kept = [
        tokens
        * kept_by_block(
            block,
            causal_lm.config,
            adapted,
            dtype_bytes=dtype_bytes,
            length=length,
            packed=config.dataset.packing,
        )
        for block in blocks
    ]
    used = [
        of_block + tokens * used_by_block(block, causal_lm.config, dtype_bytes=dtype_bytes)
        for block, of_block in zip(blocks, kept, strict=True)
    ]
    hidden = tokens * causal_lm.config.hidden_size
    of_input = hidden * dtype_bytes
    packed = config.dataset.packing and causal_lm.config._attn_implementation == "sdpa"
    activations = hidden * FP32  # of the norm before the head
    activations += tokens * length * dtype_bytes * packed  # the mask of the documents
    activations += sum(of_input if number in again else size for number, size in enumerate(kept))
    working = max(used) * (2 if again else 1)
    head_is_adapted = id(causal_lm.get_output_embeddings()) in adapted
    of_logit = 2 * (dtype_bytes + FP32) if head_is_adapted else dtype_bytes
    logits = min(tokens, CHUNK_TOKENS) * causal_lm.config.vocab_size * of_logit
    groups = (processes > 1) + (1 < sharers < processes)
    other = CONTEXT_BYTES + groups * NCCL_BYTES
    adapters = lora * ADAPTER_BYTES
    a_pass = activations + max(logits, working)
    beside = max(logits, working) + 2 * of_input + GRAPHS_BYTES
    training = weights + adapters + a_pass
    made_whole = max(sharded, default=0) if config.model.init == "random" else 0
    loading = kept_base + made_whole
    return {
        "parameters": sum(parameter.numel() for parameter in causal_lm.parameters()),
        "trainable_parameters": lora,
        "tokens_per_pass": tokens,
        "base_bytes": base,
        "weights_bytes": weights,
        "adapters_bytes": adapters,
        "activations_bytes": activations,
        "working_bytes": working,
        "logits_bytes": logits,
        "other_bytes": other,
        "loading_bytes": loading + other,
        "least_bytes": max(loading, weights + adapters),
        "peak_bytes": max(training, loading) + other,
        "beside_bytes": beside,
        "uncertain_bytes": int(UNCERTAINTY * (a_pass + other)),
    }


def _lora_parameters(causal_lm: Any, targets: Targets, rank: int) -> int:
    """Of A and B on every target; each routed expert has its own pair."""
    modules = dict(causal_lm.named_modules())
    layers = [modules[name] for name in targets.names]
    experts = [causal_lm.get_parameter(name).shape for name in targets.experts]
    of_layers = sum(layer.in_features + layer.out_features for layer in layers)
    return int(rank * (of_layers + sum(shape[0] * (shape[1] + shape[2]) for shape in experts)))


def adapted_layers(causal_lm: Any, targets: Targets) -> set[int]:
    """The id of every linear layer with LoRA."""
    return {id(causal_lm.get_submodule(name)) for name in targets.names}


def kept_by_block(
    block: Any, config: Any, adapted: set[int], *, dtype_bytes: int, length: int, packed: bool = False
) -> int:
    """Bytes for each token that one block keeps for its backward pass.

    `adapted` has the id of every linear layer with LoRA; `length` is the sequence's, in tokens; `packed` is
    whether several documents are in it.
    """
    kept = 0
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            # A frozen layer's gradient needs its weight alone. What a block ends with goes into a sum.
            kept += module.in_features * dtype_bytes * (id(module) in adapted)
            kept += module.out_features * dtype_bytes * (name.rpartition(".")[2] not in LAST_PROJECTIONS)
        elif _is_norm(module):
            kept += sum(dtype_bytes * p.numel() for p in module.parameters(recurse=False))  # its input
        if hasattr(module, "q_proj"):
            kept += _kept_by_attention(module, config, dtype_bytes, length, packed)
        if hasattr(module, "ssm_state_size"):
            # The fused scan keeps what it is given, in_proj's output, and its own output before the norm.
            kept += module.num_heads * module.head_dim * dtype_bytes
        if experts := _expert_shapes(module):
            # `experts.py` keeps what the first projection of each token's experts gives.
            kept += experts[0][0] * config.num_experts_per_tok * dtype_bytes
    return kept


def used_by_block(block: Any, config: Any, *, dtype_bytes: int) -> int:
    """Bytes for each token that one block needs while it computes, beside what it keeps."""
    used = 0
    for module in block.modules():
        if experts := _expert_shapes(module):
            used += sum(map(sum, experts)) * config.num_experts_per_tok * dtype_bytes
        if hasattr(module, "ssm_state_size"):
            used += (module.conv1d.in_channels + module.conv1d.out_channels) * dtype_bytes
            # The norm after the scan, and the scan's state at the end of each chunk; both with a gradient.
            state = module.ssm_state_size / module.chunk_size
            used += int(2 * FP32 * module.num_heads * module.head_dim * (1 + state))
    return used


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm that keeps something: the one after the mamba scan is in the fused kernel."""
    name = type(module).__name__.lower()
    return "norm" in name and "gated" not in name


def _expert_shapes(module: nn.Module) -> list[tuple[int, int]]:
    """[out, in] of each projection of routed experts, the first one first."""
    own = [p for p in module.parameters(recurse=False) if p.dim() == 3 and not isinstance(module, nn.Conv1d)]
    return [(p.shape[1], p.shape[2]) for p in own]


def _kept_by_attention(module: Any, config: Any, dtype_bytes: int, length: int, packed: bool) -> int:
    """Queries, keys and values once more as the kernel takes them; written out, the scores too."""
    copies = (
        module.q_proj.out_features + module.k_proj.out_features + module.v_proj.out_features
    ) * dtype_bytes
    if getattr(config, "_attn_implementation", "sdpa") == "eager":
        return int(copies + config.num_attention_heads * length * (FP32 + 2 * dtype_bytes))
    if packed:  # with a mask, transformers repeats keys and values for each head of the queries
        copies += 2 * module.q_proj.out_features * dtype_bytes
    return int(copies)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
