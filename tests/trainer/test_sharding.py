"""Shared blocks: what lies where, what is asked for when, and that nothing but one gather a block is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from trainer.loading import local_part
from trainer.parallel import World
from trainer.sharding import ALIGNMENT, SharedBlocks, SharedParameter, share

CPU = torch.device("cpu")
WIDTH = 24


class Block(nn.Module):
    """Weights of two dtypes and odd sizes, one of them used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, width, bias=False)
        self.down = nn.Linear(width, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.rand(3).double())
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.again(x))) * self.scale.sum().float()


class Model(nn.Module):
    def __init__(self, blocks: int, *, again: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(5 + 24 * number) for number in range(blocks))
        self.requires_grad_(False)
        self._again = again

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self._again else block(x)
        return x


class Messages:
    """In place of the process group's: the parts of all three processes by their size, and who asked."""

    def __init__(self) -> None:
        self.parts: list[dict[int, Tensor]] = [{}, {}, {}]
        self.asked: list[int] = []
        """The shared blocks' numbers, in order."""

    def gather(self, whole: Tensor, part: Tensor, group: object) -> None:
        self.asked.append(list(self.parts[0]).index(part.numel()))
        whole.copy_(torch.cat([parts[part.numel()] for parts in self.parts]))


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Messages]:
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    messages = Messages()
    monkeypatch.setattr("trainer.sharding.dist.all_gather_into_tensor", messages.gather)
    yield messages
    dist.destroy_process_group()


def shared_like(model: Model, messages: Messages, whole: tuple[int, ...] = ()) -> tuple[Model, SharedBlocks]:
    """The same model with shared blocks, as the first of three processes has it."""
    for rank in (2, 1, 0):
        twin = Model(len(model.blocks), again=model._again).to("meta")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainer.sharding.dist.get_rank", lambda _, rank=rank: rank)
            memory = share(list(twin.blocks), World(rank, 3, CPU), whole=whole)
        fill(twin, model)
        messages.parts[rank] = {part.numel(): part for part in memory._parts}
        assert len(messages.parts[rank]) == len(memory._parts)
    return twin, memory


def fill(twin: Model, model: Model) -> None:
    twin._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for parameter, given in zip(twin.parameters(), model.parameters(), strict=True):
        own, first = local_part(parameter)
        own.copy_(given.view(-1)[first : first + own.numel()])


def loss_and_gradient(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    loss = model(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_shared_blocks_compute_what_whole_ones_do(messages: Messages, blocks: int, again: bool) -> None:
    torch.manual_seed(1)
    whole = Model(blocks, again=again)
    shared, memory = shared_like(whole, messages)
    x = torch.randn(4, WIDTH)
    expected = loss_and_gradient(whole, x)
    for _ in range(2):
        memory.settle()
        found = loss_and_gradient(shared, x)
        assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(shared(x), whole(x))
    assert all(map(torch.equal, loss_and_gradient(shared, x), expected))


@pytest.mark.parametrize("again", [False, True])
def test_each_block_is_gathered_once_on_the_way_and_once_on_the_way_back(
    messages: Messages, again: bool
) -> None:
    torch.manual_seed(1)
    model, memory = shared_like(Model(5, again=again), messages)
    x = torch.randn(4, WIDTH)
    loss_and_gradient(model, x)
    # The last two lie there when the way back begins, and the first two when it ends.
    assert messages.asked == [0, 1, 2, 3, 4, 2, 1, 0]
    messages.asked.clear()
    memory.settle()
    loss_and_gradient(model, x)
    assert messages.asked == [2, 3, 4, 2, 1, 0]
    messages.asked.clear()
    with torch.no_grad():
        model(x)
    assert messages.asked == [2, 3, 4]
    memory.settle()
    assert messages.asked == [2, 3, 4, 0, 1]
    # A recording that failed asked for blocks that never came.
    memory._lying = [4, 3]
    memory.nothing_moved()
    messages.asked.clear()
    memory.settle()
    assert messages.asked == []


@pytest.mark.parametrize("again", [False, True])
def test_blocks_without_a_way_back_are_there_for_the_next_pass(messages: Messages, again: bool) -> None:
    torch.manual_seed(1)
    whole = Model(5, again=again)
    model, memory = shared_like(whole, messages)
    x = torch.randn(4, WIDTH)
    last = nn.Parameter(torch.rand(WIDTH))

    def gradient(of: Model) -> Tensor:
        def trained(_: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (inputs[0] * last,)

        handle = of.blocks[3].register_forward_pre_hook(trained)
        last.grad = None
        of(x).square().sum().backward()
        handle.remove()
        assert last.grad is not None
        return last.grad

    expected = gradient(whole)
    for _ in range(3):
        memory.settle()
        messages.asked.clear()
        assert torch.equal(gradient(model), expected)
        assert messages.asked == [2, 3, 4, 2]
        assert memory._lying == [2, 3]
        memory.settle()
        assert messages.asked == [2, 3, 4, 2, 0, 1]


def test_a_process_keeps_its_part_and_two_places(messages: Messages) -> None:
    model = Model(4, again=False)
    twin, memory = shared_like(model, messages, whole=(1,))
    kept = [parameter for parameter in twin.parameters() if isinstance(parameter, SharedParameter)]
    assert len(kept) == 3 * 3  # the weight that is used twice counts once
    assert not any(isinstance(parameter, SharedParameter) for parameter in twin.blocks[1].parameters())
    assert [place.numel() for place in memory._places] == [3 * max(p.numel() for p in memory._parts)] * 2
    assert all(part.numel() % ALIGNMENT == 0 for part in memory._parts)
    assert all(parameter.data_ptr() % 16 == 0 for parameter in kept)
    assert twin.blocks[0].again.weight is twin.blocks[0].up.weight
    assert {name: p.shape for name, p in twin.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_weights_that_come_and_go_are_no_change_to_autograd(messages: Messages) -> None:
    model: Any = shared_like(Model(4, again=False), messages)[0]
    before = [parameter._version for parameter in model.parameters()]
    loss_and_gradient(model, torch.randn(4, WIDTH))
    assert [parameter._version for parameter in model.parameters()] == before
