"""Where the base model lies and which activations are computed again: chosen from the memory it takes.

Of the ways that fit, the fastest is taken: a base on every GPU needs no gathering, and computing a block
again costs less than gathering its weights over and over. Neither goes further than it must: as few blocks
are computed again as fit, each process keeps as many whole as its memory holds, and processes of one node
share a copy before all do. `python -m trainer CONFIG --plan` shows the ways, and needs no GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import Any, Literal

import torch

from trainer.config import Config
from trainer.errors import EnvironmentMismatch
from trainer.flops import forward_flops
from trainer.kernels import find_mamba_kernels
from trainer.lora import Targets, choose_targets
from trainer.memory import adapted_layers, bytes_of, estimate, kept_by_block
from trainer.model import blocks_of, empty_model, has_own_masks, model_config
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

    processes: int
    sharers: int
    """How many of them share one copy of the base; 1: each has its own."""
    blocks: int
    """How many the model has."""
    memory: Mapping[str, int]
    """See `memory.estimate`."""
    again: frozenset[int] = frozenset()
    """Numbers of the blocks whose activations are computed again in the backward pass."""
    whole: frozenset[int] = frozenset()
    """Numbers of the blocks that each process keeps whole though the base is shared."""
    records: bool = False
    """Whether passes may be recorded as CUDA graphs, which keep their memory for themselves."""

    @property
    def shard(self) -> bool:
        """Whether processes share a copy of the base."""
        return self.sharers > 1

    @property
    def needed_bytes(self) -> int:
        """The peak, and what the estimate may be off by."""
        beside = self.memory["beside_bytes"] if self.records else 0
        return self.memory["peak_bytes"] + self.memory["uncertain_bytes"] + beside

    def __str__(self) -> str:
        some = f" of {len(self.again)} of {self.blocks} blocks" if 0 < len(self.again) < self.blocks else ""
        how = f"{'with' if self.again else 'without'} activation checkpointing{some}"
        parts = [f"{'shard' if self.shard else 'replicate'}, {how}"]
        if self.shard and self.sharers < self.processes:
            parts.append(f"each {self.sharers} processes share a copy")
        if self.whole:
            parts.append(f"{len(self.whole)} of {self.blocks} blocks whole on each GPU")
        return "; ".join(parts)


def plans(
    config: Config,
    causal_lm: Any,
    targets: Targets,
    *,
    processes: int,
    on_a_node: int | None = None,
    longest: int,
    memory: float | None = None,
) -> Iterator[Plan]:
    """The ways that the config leaves open, the fastest first, for so many bytes of `memory` on each GPU.

    `causal_lm` may be on the meta device; `on_a_node` is how many of the processes each node has, by default
    all; `longest` is the longest sequence's length in tokens.
    """
    wanted = config.distributed
    of_placement = {"replicate": (1,), "shard": sharers_of(processes, on_a_node or processes)}
    for placement, groups in of_placement.items():
        if wanted.placement not in ("auto", placement) and processes > 1:
            continue
        # Gathering between nodes costs more than computing again.
        for sharers, checkpointing in product(groups, (False, True)):
            if wanted.activation_checkpointing in ("auto", checkpointing):
                way = _Way(config, causal_lm, targets, processes, sharers, longest, memory)
                yield way.plan(checkpointing)


def sharers_of(processes: int, on_a_node: int) -> tuple[int, ...]:
    """How many processes may share a copy: those of a node, between which gathering is fast; then all."""
    counts = dict.fromkeys((on_a_node, processes))
    return tuple(count for count in counts if 1 < count <= processes and processes % count == 0)


@dataclass(frozen=True)
class _Way:
    """Searches for what fits: each further block that is whole takes memory, each that is computed again
    gives some back."""

    config: Config
    causal_lm: Any
    targets: Targets
    processes: int
    sharers: int
    longest: int
    memory: float | None

    def plan(self, checkpointing: bool) -> Plan:
        """Memory goes to recorded passes first: without them, Python is slower than the GPU.

        Then to the activations of as many blocks as fit, then to whole blocks.
        """
        wanted = self.config.distributed.whole_blocks
        whole = 0 if wanted == "auto" else wanted
        recordable = can_be_recorded(self.config, self.causal_lm, self.targets, shares=self.sharers > 1)
        for records in (True, False) if recordable else (False,):
            again = self._fewest_again(whole, records) if checkpointing else 0
            plan = self._with(again, whole, records)
            if self._fits(plan):
                break
        if wanted == "auto" and self.sharers > 1 and self._fits(plan):
            plan = self._with(again, self._most_whole(again, records), records)
        return plan

    def _fewest_again(self, whole: int, records: bool) -> int:
        """Of the blocks that are computed again; all if fewer don't do."""
        blocks = len(blocks_of(self.causal_lm))
        if self.config.distributed.activation_checkpointing != "auto":
            return blocks
        counts = range(1, blocks)
        return 1 + bisect_left(counts, True, key=lambda count: self._fits(self._with(count, whole, records)))

    def _most_whole(self, again: int, records: bool) -> int:
        counts = range(1, len(blocks_of(self.causal_lm)))
        return bisect_left(counts, True, key=lambda count: not self._fits(self._with(again, count, records)))

    def _fits(self, plan: Plan) -> bool:
        return self.memory is not None and plan.needed_bytes <= self.memory

    def _with(self, again: int, whole: int, records: bool) -> Plan:
        """With so many blocks that are computed again, and that are whole on each GPU."""
        blocks = blocks_of(self.causal_lm)
        kept = blocks_to_keep(self._sizes, whole if self.sharers > 1 else 0)
        computed = self._worth_computing_again[:again]
        memory = estimate(
            self.causal_lm,
            self.targets,
            self.config,
            processes=self.processes,
            sharers=self.sharers,
            longest=self.longest,
            whole=kept,
            again=frozenset(computed),
        )
        return Plan(self.processes, self.sharers, len(blocks), memory, frozenset(computed), kept, records)

    @cached_property
    def _sizes(self) -> list[int]:
        """Of the blocks, in bytes."""
        return [bytes_of(block) for block in blocks_of(self.causal_lm)]

    @cached_property
    def _worth_computing_again(self) -> list[int]:
        """The blocks' numbers, kind by kind: those first that keep the most for what computing them takes."""
        config = self.causal_lm.config
        adapted = adapted_layers(self.causal_lm, self.targets)

        def worth(block: Any) -> float:
            kept = kept_by_block(block, config, adapted, dtype_bytes=2, length=self.longest)
            return kept / forward_flops(block, config, self.longest)

        worths = [worth(block) for block in blocks_of(self.causal_lm)]
        return sorted(range(len(worths)), key=lambda number: (-worths[number], number))


def blocks_to_keep(sizes: Sequence[int], count: int) -> frozenset[int]:
    """The numbers of the `count` blocks that are kept whole, of blocks of these sizes in bytes.

    Small ones first: gathering them costs a message each and saves little. Of one size those that leave the
    others evenly apart, so that each is gathered while several compute.
    """
    kept: list[int] = []
    by_size = sorted(range(len(sizes)), key=lambda number: (sizes[number], number))
    for _, group in groupby(by_size, key=lambda number: sizes[number]):
        alike = list(group)
        apart = max(0, len(alike) - (count - len(kept)))
        kept += [
            number
            for place, number in enumerate(alike)
            if (place + 1) * apart // len(alike) == place * apart // len(alike)
        ]
    return frozenset(kept)


def can_be_recorded(config: Config, causal_lm: Any, targets: Targets, *, shares: bool) -> bool:
    """Whether a pass may become a CUDA graph: the same kernels every time, and nothing asks the device.

    Dropout draws anew; of other models transformers asks the device for the shape of the attention mask; and
    what FSDP2 remembers of a pass would be wrong after a recording that failed.
    """
    head = causal_lm.get_output_embeddings()
    return (
        config.device == "cuda"
        and config.distributed.cuda_graphs
        and not config.peft.dropout
        and not (shares and config.distributed.gathering == "fsdp2")
        and has_own_masks(causal_lm)
        and not any(module is head for name, module in causal_lm.named_modules() if name in targets.names)
    )


def choose(config: Config, ways: Iterable[Plan], memory: float | None = None) -> Plan:
    """The first of `ways` that fits into so many bytes; the smallest if none does, or if they aren't known.

    On a CPU the first.
    """
    seen = []
    for way in ways:
        if config.device == "cpu" or (memory is not None and way.needed_bytes <= memory):
            return way
        seen.append(way)
    return min(seen, key=lambda way: way.needed_bytes)


def plan_run(config: Config, causal_lm: Any, targets: Targets, world: World, *, longest: int) -> Plan:
    """The plan for this run, the same on every process; see `plans`.

    Raises EnvironmentMismatch where the weights and adapters alone are more than a GPU has.
    """
    on_each_node = set(world.gather(world.on_this_node))
    on_a_node = on_each_node.pop() if len(on_each_node) == 1 else None

    def ways(memory: int | None) -> Iterator[Plan]:
        return plans(
            config,
            causal_lm,
            targets,
            processes=world.size,
            on_a_node=on_a_node,
            longest=longest,
            memory=memory,
        )

    if world.device.type == "cpu":
        return choose(config, ways(None))
    free, total = torch.cuda.mem_get_info(world.device)
    if limit := config.distributed.gpu_memory_gib:
        free = min(free, int(limit * GIB))
        torch.cuda.set_per_process_memory_fraction(free / total, world.device)
    smallest = min(world.gather(free))
    plan = choose(config, ways(smallest), smallest)
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


def describe(config: Config, *, processes: int, on_a_node: int | None = None) -> str:
    """What `--plan` prints: every way that the config leaves open, and the one that would be taken.

    No weight is read and no GPU is asked. Raises ConfigError.
    """
    causal_lm = layers_alone(config, model_config(config.model))
    targets = choose_targets(causal_lm, config.peft)
    limit = config.distributed.gpu_memory_gib
    memory = limit * GIB if limit else None
    longest = config.dataset.seq_length
    ways = tuple(
        plans(
            config,
            causal_lm,
            targets,
            processes=processes,
            on_a_node=on_a_node,
            longest=longest,
            memory=memory,
        )
    )
    facts = ways[0].memory
    lines = [
        f"{facts['parameters']:,} parameters, {_gib(facts['base_bytes'])}; "
        f"{facts['trainable_parameters']:,} trained; {facts['tokens_per_pass']:,} tokens in a pass; "
        f"{processes} processes"
    ]
    for way in ways:
        lines += ["", f"{way}:"]
        lines += [f"  {_gib(way.memory[kind]):>10}  {meaning}" for kind, meaning in KINDS.items()]
        if way.records:
            lines.append(
                f"  {_gib(way.memory['beside_bytes']):>10}  beside recorded passes, for one that isn't"
            )
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
