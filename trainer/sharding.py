"""A frozen base that several processes share: each keeps a part of a block, and gathers it to compute with.

A frozen weight has no gradient to send back and never changes, so all that a block needs is one all-gather,
into memory in which its weights lie ready to be computed with: nothing is copied, and as their addresses stay
the same, a pass can be recorded as a CUDA graph. FSDP2 (`gathering: fsdp2`) copies a part into the message
and all that was gathered out of it, which takes a tenth of a step.

    part     a block's parameters end to end, cut into one equal part for each process that shares them
    places   two, each as large as the largest block; blocks take turns. While the block in one computes, the
             next is gathered into the other; on the way back, the one before it
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from trainer.parallel import World

PLACES = 2
ALIGNMENT = 256
"""Bytes; where a parameter and a part begin. Matrix products want 16."""


class SharedParameter(nn.Parameter):
    """A weight of a shared block; its elements are there while the block lies whole in its place."""

    block: int
    """The block's number among the shared ones."""
    own: Tensor
    """What of it this process keeps, flat: perhaps nothing."""
    first: int
    """Where in the whole, in elements and row-major, that begins."""


class SharedBlocks:
    """The shared blocks' memory and messages.

    All processes gather the same blocks in the same order: what lies where at the beginning of a pass only
    depends on the passes before it. NCCL wants a pass that is recorded to be so by all at once: they take
    batches of one shape (`step.py`).
    """

    def __init__(self, blocks: Sequence[nn.Module], world: World, group: dist.ProcessGroup | None) -> None:
        """`blocks` may be on the meta device; their parameters are on the world's device afterwards."""
        self._group, self._device = group, world.device
        sharers = dist.get_world_size(group)
        laid_out = [_LaidOut.of(block, sharers) for block in blocks]
        largest = max((each.part_bytes * sharers for each in laid_out), default=0)
        self._places = [self._bytes(largest) for _ in range(min(PLACES, len(blocks)))]
        self._parts = [self._bytes(each.part_bytes) for each in laid_out]
        self._lying: list[int | None] = [None] * len(self._places)
        """The block in each place."""
        self._coming: list[torch.cuda.Event | None] = [None] * len(self._places)
        """Where it is still being gathered: when that is done."""
        self._stream = (
            torch.cuda.Stream(world.device)  # type: ignore[no-untyped-call]
            if world.device.type == "cuda"
            else None
        )
        self._forwards = True
        rank = dist.get_rank(group)
        for number, (block, each) in enumerate(zip(blocks, laid_out, strict=True)):
            place = self._places[number % PLACES]
            each.put(number, place, self._parts[number], rank)
            block.register_forward_pre_hook(lambda *_, number=number: self._before_forward(number))
            block.register_forward_hook(
                lambda _, __, output, number=number: self._after_forward(number, output)
            )

    def _bytes(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.uint8, device=self._device)

    def settle(self) -> None:
        """Gathers what a pass begins with, as a recorded pass finds it and leaves it."""
        for number in range(len(self._places)):
            self.hold(number)

    def nothing_moved(self) -> None:
        """What was asked for since `settle` was for a recording, and never came."""
        coming, self._coming = self._coming, [None] * len(self._places)
        self._lying = list(range(len(self._places)))
        for event in coming:
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)

    def hold(self, number: int) -> None:
        """Block `number` lies whole for what is started from here on, until another one takes its place."""
        self._ask_for(number)
        place = number % PLACES
        if (event := self._coming[place]) is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            self._coming[place] = None

    def _ask_for(self, number: int) -> None:
        if not 0 <= number < len(self._parts) or self._lying[number % PLACES] == number:
            return
        place, part = number % PLACES, self._parts[number]
        whole = self._places[place][: part.numel() * dist.get_world_size(self._group)]
        if self._stream is None:
            dist.all_gather_into_tensor(whole, part, group=self._group)
        else:
            # All that was started so far may still compute with the block that lay there.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                dist.all_gather_into_tensor(whole, part, group=self._group)
                self._coming[place] = self._stream.record_event()
        self._lying[place] = number

    def _before_forward(self, number: int) -> None:
        """Also of a block that is computed again on the way back: only the first one turns round."""
        self._forwards = self._forwards or number == 0
        self._compute(number)

    def _after_forward(self, number: int, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self._before_backward(number))  # type: ignore[no-untyped-call]

    def _before_backward(self, number: int) -> None:
        self._forwards = False
        self._compute(number)

    def _compute(self, number: int) -> None:
        self.hold(number)
        self._ask_for(number + 1 if self._forwards else number - 1)


@dataclass(frozen=True)
class _Weight:
    names: list[tuple[nn.Module, str]]
    """More than one if it is tied."""
    shape: torch.Size
    dtype: torch.dtype
    begin: int
    end: int
    """Bytes from the block's beginning."""


@dataclass(frozen=True)
class _LaidOut:
    """Where a block's parameters lie, end to end."""

    weights: list[_Weight]
    part_bytes: int

    @classmethod
    def of(cls, block: nn.Module, sharers: int) -> _LaidOut:
        found: dict[int, _Weight] = {}
        position = 0
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in found:
                    found[id(parameter)].names.append((module, name))
                    continue
                end = position + parameter.nbytes
                named = [(module, name)]
                found[id(parameter)] = _Weight(named, parameter.shape, parameter.dtype, position, end)
                position = _aligned(end)
        return cls(list(found.values()), _aligned(-(-position // sharers)))

    def put(self, number: int, place: Tensor, part: Tensor, rank: int) -> None:
        """The block's parameters are now in `place`, and their `own` parts in `part`."""
        begins = rank * self.part_bytes
        for weight in self.weights:
            first = min(max(weight.begin, begins), weight.end)
            last = max(first, min(weight.end, begins + self.part_bytes))
            # .data: what is gathered is no change that autograd should notice.
            data = place[weight.begin : weight.end].data.view(weight.dtype).view(weight.shape)
            parameter = SharedParameter(data, requires_grad=False)
            parameter.block = number
            parameter.own = part[first - begins : last - begins].view(weight.dtype)
            parameter.first = (first - weight.begin) // weight.dtype.itemsize
            for module, name in weight.names:
                setattr(module, name, parameter)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def share(
    blocks: Sequence[nn.Module], world: World, *, sharers: int | None = None, whole: Collection[int] = ()
) -> SharedBlocks:
    """Shares the blocks among every `sharers` processes on end, by default all.

    The blocks with the numbers `whole` stay whole on each, as does what is in no block. The blocks may be on
    the meta device still; those that are shared have their memory afterwards, for `loading.py` to fill.
    """
    apart = [block for number, block in enumerate(blocks) if number not in whole]
    return SharedBlocks(apart, world, _group(world, sharers or world.size))


def shard_with_fsdp2(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    world: World,
    *,
    sharers: int | None = None,
    whole: Collection[int] = (),
) -> None:
    """The same by FSDP2, one unit a block. The tensors may be on the meta device still.

    The unit is the block because the mamba mixer reads its children's weights directly. What is added
    afterwards, the adapters, is no part of it.
    """
    group = _group(world, sharers or world.size) or dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, world.device.type)
    apart = [block for number, block in enumerate(blocks) if number not in whole]
    units: list[Any] = [fully_shard(block, mesh=mesh) for block in apart]
    kept = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    root: Any = fully_shard(model, mesh=mesh, ignored_params=kept)
    # The next block's weights are asked for before this one computes: a host that starts the kernels of one
    # block for longer than they run would ask too late. The root asks for the first while what comes before
    # it computes.
    for unit, following in pairwise([root, *units]):
        unit.set_modules_to_forward_prefetch([following])
    for unit, following in pairwise([root, *reversed(units)]):
        unit.set_modules_to_backward_prefetch([following])


def _group(world: World, sharers: int) -> dist.ProcessGroup | None:
    """The processes that share a copy of the base with this one; None: all."""
    if sharers == world.size:
        return None
    # Every process takes part in making every group.
    ranks = [list(range(first, first + sharers)) for first in range(0, world.size, sharers)]
    groups = [dist.new_group(group, timeout=world.timeout) for group in ranks]
    own: dist.ProcessGroup = groups[world.rank // sharers]
    return own
