"""Where the base model lies and whether activations are computed again: chosen from the memory it takes.

Of the ways that fit, the fastest is taken: a base on every GPU needs no gathering, and computing a block
again costs less than gathering its weights over and over. `python -m trainer CONFIG --plan` shows them, and
needs no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainer.config import Config
from trainer.errors import EnvironmentMismatch
from trainer.kernels import find_mamba_kernels
from trainer.lora import Targets, choose_targets
from trainer.memory import estimate
from trainer.model import empty_model, model_config
from trainer.parallel import World

GIB = 2**30
KINDS = {
    "weights_bytes": "base weights (with the blocks gathered at a time)",
    "adapters_bytes": "adapters, their gradients and optimizer",
    "activations_bytes": "activations kept for the backward pass",
    "working_bytes": "one block's work, or",
    "logits_bytes": "a chunk of logits, if that is more",
    "other_bytes": "CUDA context and buffers",
}


@dataclass(frozen=True)
class Plan:
    """One way to train, and what it takes of each GPU."""

    placement: Literal["replicate", "shard"]
    checkpointing: bool
    memory: Mapping[str, int]
    """See `memory.estimate`."""

    @property
    def shard(self) -> bool:
        """Whether the base is sharded over all processes."""
        return self.placement == "shard"

    @property
    def needed_bytes(self) -> int:
        """The peak, and what the estimate may be off by."""
        return self.memory["peak_bytes"] + self.memory["uncertain_bytes"]

    def __str__(self) -> str:
        again = "with" if self.checkpointing else "without"
        return f"{self.placement}, {again} activation checkpointing"


def plans(
    config: Config, causal_lm: Any, targets: Targets, *, processes: int, longest: int
) -> tuple[Plan, ...]:
    """The ways that the config leaves open, the fastest first.

    `causal_lm` may be on the meta device; `longest` is the longest sequence's length in tokens.
    """
    wanted = config.distributed
    placements: list[Literal["replicate", "shard"]] = ["replicate", "shard"]
    return tuple(
        Plan(
            placement,
            checkpointing,
            estimate(
                causal_lm,
                targets,
                config,
                processes=processes,
                longest=longest,
                shard=placement == "shard",
                checkpointing=checkpointing,
            ),
        )
        for placement in placements
        if (placement == "replicate" if processes == 1 else wanted.placement in ("auto", placement))
        for checkpointing in (False, True)
        if wanted.activation_checkpointing in ("auto", checkpointing)
    )


def choose(config: Config, ways: Sequence[Plan], memory: float | None = None) -> Plan:
    """The first of `ways` that fits into so many bytes; the smallest if none does, or if they aren't known.

    On a CPU the first.
    """
    if config.device == "cpu":
        return ways[0]
    fitting = [way for way in ways if memory is not None and way.needed_bytes <= memory]
    return fitting[0] if fitting else min(ways, key=lambda way: way.needed_bytes)


def plan_run(config: Config, causal_lm: Any, targets: Targets, world: World, *, longest: int) -> Plan:
    """The plan for this run, the same on every process; see `plans`.

    Raises EnvironmentMismatch where the weights and adapters alone are more than a GPU has.
    """
    ways = plans(config, causal_lm, targets, processes=world.size, longest=longest)
    if world.device.type == "cpu":
        return choose(config, ways)
    free, total = torch.cuda.mem_get_info(world.device)
    if limit := config.distributed.gpu_memory_gib:
        free = min(free, int(limit * GIB))
        torch.cuda.set_per_process_memory_fraction(free / total, world.device)
    smallest = min(world.gather(free))
    plan = choose(config, ways, smallest)
    if plan.memory["least_bytes"] > smallest:
        raise EnvironmentMismatch(
            f"The weights and adapters alone take {_gib(plan.memory['least_bytes'])} of each GPU ({plan}), "
            f"and {_gib(smallest)} are free.",
            remedy="nvidia-smi  # is it another's? else more GPUs, or --set distributed.placement=auto",
            context={"processes": world.size, "free": smallest},
        )
    return plan


def layers_alone(config: Config, base_config: Any) -> Any:
    """The model on the meta device, also where the packages that it will compute with are missing."""
    # Which attention is computed makes no difference to the layers, and its package may be missing here.
    attention: Literal["eager", "sdpa"] = "eager" if config.model.attn_implementation == "eager" else "sdpa"
    section = config.model.model_copy(update={"attn_implementation": attention})
    # The mamba kernels' modules are for a node with a GPU, and no layer is run here.
    return empty_model(section, base_config, find_mamba_kernels("cpu"), torch.device("cpu"))


def describe(config: Config, *, processes: int) -> str:
    """What `--plan` prints: every way that the config leaves open, and the one that would be taken.

    No weight is read and no GPU is asked. Raises ConfigError.
    """
    causal_lm = layers_alone(config, model_config(config.model))
    targets = choose_targets(causal_lm, config.peft)
    ways = plans(config, causal_lm, targets, processes=processes, longest=config.dataset.seq_length)
    limit = config.distributed.gpu_memory_gib
    memory = limit * GIB if limit else None
    facts = ways[0].memory
    lines = [
        f"{facts['parameters']:,} parameters, {_gib(facts['base_bytes'])}; "
        f"{facts['trainable_parameters']:,} trained; {facts['tokens_per_pass']:,} tokens in a pass; "
        f"{processes} processes"
    ]
    for way in ways:
        lines += ["", f"{way}:"]
        lines += [f"  {_gib(way.memory[kind]):>10}  {meaning}" for kind, meaning in KINDS.items()]
        lines.append(f"  {_gib(way.memory['loading_bytes']):>10}  while the weights are loaded")
        lines.append(
            f"  {_gib(way.memory['peak_bytes']):>10}  at the peak, ± {_gib(way.memory['uncertain_bytes'])}"
            + ("" if memory is None else f": {_verdict(way, memory)} in {_gib(memory)}")
        )
    if config.device == "cpu":
        chosen = f"On a CPU: {choose(config, ways)}."
    elif memory is None:
        chosen = "The first of these that fits is taken: give --gpu-memory-gib to see which."
    else:
        way = choose(config, ways, memory)
        fits = way.needed_bytes <= memory
        chosen = f"Taken: {way}." if fits else f"None surely fits; taken: {way}, the smallest."
    return "\n".join([*lines, "", chosen])


def _verdict(way: Plan, memory: float) -> str:
    if way.needed_bytes <= memory:
        return "fits"
    return "may not fit" if way.memory["peak_bytes"] <= memory else "doesn't fit"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
