"""Which passes are recorded, and that gradients are the same as without; no GPU is here to record on.

A stand-in takes CUDA's part: what runs while it records leaves nothing, and a replay runs the model again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.chat import IGNORED
from trainer.data import (
    RECORDED_LENGTHS,
    Batch,
    Example,
    Row,
    collate,
    largest_shape,
    recorded_shape,
)
from trainer.passes import Passes

CPU = torch.device("cpu")
LONGEST = 64
WIDTH = 8


class Model(nn.Module):
    """Trains an embedding; counts the passes that really ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Parameter(torch.randn(16, WIDTH))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, labels: Tensor, predicting: Tensor | None = None) -> Tensor:
        assert predicting is not None
        self.shapes.append((*input_ids.shape, len(predicting)))
        trained = (labels != IGNORED).float()
        return (self.table[input_ids].square().sum(-1) * trained).sum()


class Recorder:
    """In place of CUDA's graphs."""

    def __init__(self, passes: Any, *, room: int = 100) -> None:
        self.passes, self.room = passes, room
        self.pools: list[object] = []
        self.streams: list[object] = []
        """That was gone back to after a recording that was broken off."""

    @contextmanager
    def record(self, graph: Any, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert all(parameter.grad is not None for parameter in self.passes._adapters)
        before = [parameter.grad.clone() for parameter in self.passes._adapters]
        self.pools.append(pool)
        try:
            if len(self.pools) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")
            yield
        finally:
            for parameter, gradient in zip(self.passes._adapters, before, strict=True):
                parameter.grad.copy_(gradient)

    def graph(self) -> Any:
        recorder = self

        class Graph:
            def pool(self) -> str:
                return "the pool"

            def replay(self) -> None:
                own = next(each for each in recorder.passes._recorded.values() if each.graph is self)
                own.loss.copy_(recorder.passes._run(own.batch))

        return Graph()


class Shared:
    """Counts what a pass asks of shared blocks."""

    def __init__(self) -> None:
        self.settled, self.undone = 0, 0

    def settle(self) -> None:
        self.settled += 1

    def nothing_moved(self) -> None:
        self.undone += 1


def row(length: int, trained: int = 1000) -> Row:
    ids = [number % 16 for number in range(length)]
    return (Example(ids, [token if place < trained else IGNORED for place, token in enumerate(ids)], 1),)


def batch(length: int, trained: int = 1000) -> Batch:
    rows = [row(length, trained)]
    return collate(rows, pad=0, shape=recorded_shape([rows], longest=LONGEST))


class World:
    """Of two processes; the other one can record as long as it has room."""

    device = CPU

    def __init__(self, room: int = 100) -> None:
        self.room, self.asked = room, 0

    def any(self, flag: bool) -> bool:
        self.asked += 1
        return flag or self.asked > self.room


def passes_of(
    model: Model, monkeypatch: pytest.MonkeyPatch, *, room: int = 100, others_room: int = 100
) -> tuple[Any, Any, list[str]]:
    notes: list[str] = []
    shared: Any = Shared()
    world: Any = World(others_room)
    largest = collate([row(LONGEST)], pad=0, shape=largest_shape(1, longest=LONGEST))
    passes = Passes(model, [model.table], world, largest=largest, shared=shared, warn=notes.append)
    recorder = Recorder(passes, room=room)
    monkeypatch.setattr("trainer.passes.torch.cuda.CUDAGraph", recorder.graph)
    monkeypatch.setattr("trainer.passes.torch.cuda.graph", recorder.record)
    monkeypatch.setattr("trainer.passes.torch.cuda.current_stream", lambda _: "the stream")
    monkeypatch.setattr("trainer.passes.torch.cuda.set_stream", recorder.streams.append)
    passes.weigh(10)
    return passes, recorder, notes


LENGTHS = (30, 9, 64, 30, 31, 9, 17, 33)


def gradient_without(lengths: tuple[int, ...]) -> Tensor:
    model = Model()
    world: Any = World()
    passes = Passes(model, [model.table], world, largest=None, shared=None, warn=print)
    passes.weigh(10)
    for length in lengths:
        passes(batch(length))
    assert passes.recorded == 0
    assert model.table.grad is not None
    return model.table.grad


def after_all(monkeypatch: pytest.MonkeyPatch, **rooms: int) -> tuple[Model, Any, Any, list[str]]:
    """A pass of each length, which have added what they do without recording."""
    model = Model()
    passes, recorder, notes = passes_of(model, monkeypatch, **rooms)
    for length in LENGTHS:
        passes(batch(length))
    torch.testing.assert_close(model.table.grad, gradient_without(LENGTHS))
    return model, passes, recorder, notes


def test_recorded_passes_add_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    passes, recorder, notes = passes_of(model, monkeypatch)
    losses = [float(passes(batch(length))) for length in LENGTHS]
    ran = list(model.shapes)
    with torch.no_grad():
        assert losses == [float(model(b.input_ids, b.labels, b.predicting)) for b in map(batch, LENGTHS)]
    torch.testing.assert_close(model.table.grad, gradient_without(LENGTHS))
    # The first pass runs as it is; then the largest shape is recorded before the one that came, and others
    # when they come: 64 and 16 first, then 32, 24 and 40.
    assert [length for _, length, _ in ran[:3]] == [32, 64, 16]
    assert recorder.pools == [None, *["the pool"] * 4]
    assert passes.recorded == 5
    assert passes._shared.settled >= 2 * len(LENGTHS)  # before each pass and after it
    assert notes == []
    address = model.table.grad.data_ptr()
    passes.clear_gradients()
    assert model.table.grad.data_ptr() == address  # a recording adds there
    assert not model.table.grad.any()


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_recording_that_fails_is_told_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    model, passes, recorder, notes = after_all(monkeypatch, room=room)
    assert passes.recorded == 0  # their memory is given back
    assert len(recorder.pools) == room + 1  # and it isn't tried again
    assert notes == ["passes are not recorded as CUDA graphs: CUDA out of memory. Tried to allocate"]
    assert passes._shared.undone >= 1
    assert recorder.streams == ["the stream"]
    passes.clear_gradients()
    assert model.table.grad is None


def test_a_pass_that_fails_while_it_is_recorded_ends_the_recording_in_good_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model()
    passes, recorder, notes = passes_of(model, monkeypatch)
    passes(batch(30))
    run = passes._run

    def fail(_: Batch) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    passes._run = fail
    shapes = recorder.pools
    monkeypatch.setattr(passes, "_give_up", lambda why: (notes.append(why), setattr(passes, "_run", run)))
    passes(batch(9))
    assert notes == ["operation not permitted when stream is capturing"]
    assert len(shapes) == 1
    assert recorder.streams == []  # it was left as a recording is
    assert passes._shared.undone == 1


@pytest.mark.parametrize("others_room", [0, 2])
def test_processes_that_share_the_base_give_up_together(
    monkeypatch: pytest.MonkeyPatch, others_room: int
) -> None:
    _, passes, _, notes = after_all(monkeypatch, others_room=others_room)
    assert passes.recorded == 0
    assert notes == ["passes are not recorded as CUDA graphs: another process can't"]
    assert passes._world.asked == others_room + 1


def test_so_many_shapes_are_recorded_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.passes.MOST_GRAPHS", 2)
    _, passes, _, notes = after_all(monkeypatch)
    assert (passes.recorded, notes) == (2, [])


def test_rows_of_any_length_have_few_shapes(tmp_path: Path) -> None:
    shapes = {
        (tuple(made.input_ids.shape), made.predicting.numel())
        for length in range(2, LONGEST + 1)
        for trained in range(1, length + 1)
        if (made := batch(length, trained)).predicting is not None
    }
    assert len({shape for shape, _ in shapes}) <= RECORDED_LENGTHS
    assert len(shapes) <= 4 * RECORDED_LENGTHS
    assert all(shape[1] % 8 == 0 and shape[1] <= LONGEST for shape, _ in shapes)
    largest = largest_shape(1, longest=LONGEST)
    assert ((1, largest.length), largest.predicting) in shapes


def test_processes_that_share_the_base_take_one_shape() -> None:
    turn = [[row(20, 3)], [row(50, 50)], [row(3)]]
    shape = recorded_shape(turn, longest=LONGEST)
    made = [collate(rows, pad=0, shape=shape) for rows in turn]
    assert {tuple(each.input_ids.shape) for each in made} == {(1, 56)}
    assert {len(each.predicting) for each in made if each.predicting is not None} == {56}
    assert [each.trained_tokens for each in made] == [2, 49, 2]
