from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from envbuilder.compile.units.broker import (
    Broker,
    DoneUnit,
    Outcome,
    RunningUnit,
    Slot,
    Stopped,
    Verdict,
    time_left,
)
from envbuilder.compile.units.lookahead import SPLIT_CPUS
from envbuilder.compile.units.records import Estimate, UnitId

GB = 1_000_000_000
PATIENCE = 120.0
"""Seconds after which a test that waits has failed."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Builds:
    """Threads that each have, or wait for, a slot of `broker`."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.slots: dict[str, Slot] = {}
        self.stopped: dict[str, Stopped] = {}
        self._ends: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def ask(
        self, name: str, seconds: float = 10, memory: int = GB, *, split: bool = False, package: str = "fused"
    ) -> None:
        """Has a thread ask for a slot, and returns when it has asked."""
        end = self._ends[name] = threading.Event()
        count = self._count()

        def build() -> None:
            try:
                with self.broker.slot(
                    UnitId(package, name), Estimate(seconds, memory, known=True), splittable=split
                ) as slot:
                    self.slots[name] = slot
                    assert end.wait(PATIENCE)
                    slot.finish(Outcome(seconds, memory, 0))
            except Stopped as error:
                self.stopped[name] = error

        thread = threading.Thread(target=build, name=name)
        self._threads.append(thread)
        thread.start()
        until(lambda: self._count() > count or name in self.stopped)

    def end(self, name: str) -> None:
        """Has the thread give its slot back, and returns when it has."""
        done = len(self.broker.snapshot().done)
        self._ends[name].set()
        until(lambda: len(self.broker.snapshot().done) > done)

    def end_all(self) -> None:
        for end in self._ends.values():
            end.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    @property
    def running(self) -> list[str]:
        return sorted(unit.unit.source for unit in self.broker.snapshot().running)

    @property
    def waiting(self) -> list[str]:
        return [unit.unit.source for unit in self.broker.snapshot().waiting]

    def slot(self, name: str) -> Slot:
        until(lambda: name in self.slots)
        return self.slots[name]

    def _count(self) -> int:
        now = self.broker.snapshot()
        return len(now.running) + len(now.waiting) + len(now.done)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@contextmanager
def builds(cpus: int, memory: int = 100 * GB, clock: Callable[[], float] | None = None) -> Iterator[Builds]:
    broker = Broker(cpus=cpus, memory=memory, clock=clock or Clock(), gather_s=0)
    these = Builds(broker)
    try:
        yield these
    finally:
        broker.stop("the test ends")
        these.end_all()


def test_no_more_run_at_once_than_there_are_cpus() -> None:
    with builds(cpus=2) as these:
        for name in "abc":
            these.ask(name)
        assert these.running == ["a", "b"]
        these.end("a")
        assert these.running == ["b", "c"]
        assert these.slot("c").threads == 1


def test_the_longest_that_waits_goes_first() -> None:
    with builds(cpus=1) as these:
        for name, seconds in (("first", 1), ("short", 5), ("long", 50), ("middle", 20), ("later", 20)):
            these.ask(name, seconds)
        assert these.waiting == ["long", "middle", "later", "short"]
        for name in ("first", "long", "middle", "later"):
            these.end(name)
        assert these.running == ["short"]


def test_memory_limits_what_runs_at_once() -> None:
    with builds(cpus=4, memory=10 * GB) as these:
        these.ask("a", memory=6 * GB)
        these.ask("b", memory=4 * GB)
        these.ask("c", memory=1 * GB)
        assert (these.running, these.waiting) == (["a", "b"], ["c"])
        these.end("b")
        assert these.running == ["a", "c"]


def test_a_unit_that_is_larger_than_the_machine_runs_alone() -> None:
    with builds(cpus=4, memory=10 * GB) as these:
        these.ask("huge", memory=99 * GB)
        these.ask("small", memory=1)
        assert (these.running, these.waiting) == (["huge"], ["small"])
        these.end("huge")
        assert these.running == ["small"]


def test_smaller_units_pass_a_large_one_but_not_without_end() -> None:
    with builds(cpus=4, memory=10 * GB) as these:
        these.ask("base", memory=5 * GB)
        these.ask("large", 100, memory=8 * GB)
        passed = 0
        for number in range(50):
            name = f"small {number:02}"
            these.ask(name, 1, memory=GB)
            if name not in these.running:
                break
            passed += 1
            these.end(name)
        assert passed == 8
        assert these.waiting == ["large", name]
        these.end("base")
        assert these.running == ["large", name]


def test_the_first_requests_are_gathered_so_that_the_longest_of_a_batch_goes_first() -> None:
    broker = Broker(cpus=1, memory=GB, gather_s=0.1)
    these = Builds(broker)
    these.ask("short", 1)
    these.ask("long", 100)
    until(lambda: bool(these.running))
    assert these.running == ["long"]
    these.end("long")
    assert these.running == ["short"]  # what waits already is not made to wait again
    these.end_all()


def test_a_single_request_is_granted_when_the_gathering_is_over() -> None:
    with Broker(cpus=1, memory=GB, gather_s=0.01).slot(UnitId("fused", "a"), Estimate(1, GB, True)) as slot:
        assert slot.threads == 1


def test_a_slot_is_given_back_when_its_block_fails() -> None:
    broker = Broker(cpus=1, memory=GB, gather_s=0)

    def fail() -> None:
        with broker.slot(UnitId("fused", "a"), Estimate(1, GB, True)):
            raise OSError("broke off")

    with pytest.raises(OSError, match="broke off"):
        fail()
    now = broker.snapshot()
    assert not now.running
    assert [unit.outcome for unit in now.done] == [None]


def test_stop_ends_the_waiting_and_lets_what_runs_end() -> None:
    with builds(cpus=1) as these:
        these.ask("runs")
        these.ask("waits")
        these.broker.stop("a package failed")
        these.ask("late")
        until(lambda: len(these.stopped) == 2)
        error = these.stopped["waits"]
        assert error.message == "a package failed"
        assert error.exit_code == 75
        assert "again" in error.remedy
        assert (these.running, these.waiting) == (["runs"], [])
        these.end("runs")
        assert len(these.broker.snapshot().done) == 1
        these.broker.stop("another reason")
        these.ask("later still")
        assert these.stopped["later still"].message == "a package failed"


def test_one_package_can_be_stopped_alone() -> None:
    with builds(cpus=1) as these:
        these.ask("runs", package="good")
        these.ask("bad", 100, package="bad")
        these.ask("good", package="good")
        these.broker.stop("bad has failed", package="bad")
        until(lambda: "bad" in these.stopped)
        assert these.broker.snapshot().seconds_left == 20
        these.end("runs")
        assert these.running == ["good"]


def test_an_interrupted_wait_leaves_no_request_behind() -> None:
    clock = Clock()
    broker = Broker(cpus=1, memory=GB, clock=clock, gather_s=0)

    class Interrupted(BaseException):
        pass

    def interrupt(_: float | None = None) -> bool:
        raise Interrupted

    with broker.slot(UnitId("fused", "a"), Estimate(1, GB, True)):
        broker._changed.wait = interrupt  # type: ignore[method-assign]
        with pytest.raises(Interrupted), broker.slot(UnitId("fused", "b"), Estimate(1, GB, True)):
            pass
        assert not broker.snapshot().waiting
        assert len(broker.snapshot().running) == 1


@pytest.mark.parametrize(
    ("seconds", "split", "expected"),
    [
        pytest.param(360, True, 4, id="alone: as many as are of use"),
        pytest.param(360, False, 1, id="not splittable"),
        pytest.param(50, True, 1, id="too short to gain"),
    ],
)
def test_a_lone_long_unit_gets_several_cpus(seconds: float, split: bool, expected: int) -> None:
    with builds(cpus=16) as these:
        these.ask("a", seconds, split=split)
        assert these.slot("a").threads == expected
        assert these.slot("a").memory == (1.8 * GB if expected > 1 else GB)


def test_a_unit_that_sets_the_end_is_split_and_the_others_are_not() -> None:
    with builds(cpus=8) as these:
        these.broker.expect("other")
        for name in "abcdefgh":
            these.ask(name, 40)
        these.ask("usual", 100, split=True)
        assert these.running == []
        these.ask("long", 360, split=True, package="other")
        assert these.slot("long").threads == 4
        assert these.slot("usual").threads == 1


def test_a_package_that_ends_without_a_unit_is_not_waited_for() -> None:
    with builds(cpus=4) as these:
        these.broker.expect("other")
        these.ask("a", 10)
        assert these.running == []
        these.broker.stop("ended", package="other")
        assert these.slot("a").threads == 1


def test_a_unit_is_not_split_where_memory_does_not_suffice() -> None:
    with builds(cpus=4, memory=10 * GB) as these:
        these.ask("other", 1, memory=4 * GB)
        these.ask("a", 360, memory=5 * GB, split=True)
        assert these.slot("a").threads == 1


def test_cpus_that_nobody_waits_for_go_to_the_last_units() -> None:
    with builds(cpus=8) as these:
        for name in "abcd":
            these.ask(name, 100)
        these.ask("e", 150, split=True)
        assert these.slot("e").threads == 3  # with 4 the last would not come sooner


def test_a_unit_killed_for_memory_runs_again_with_less_beside_it() -> None:
    with builds(cpus=4, memory=12 * GB) as these:
        for name in "abc":
            these.ask(name, memory=4 * GB)
        assert these.broker.out_of_memory(these.slot("a")) is Verdict.AGAIN
        these.end("a")
        assert these.broker.snapshot().memory == 8 * GB
        these.ask("a", memory=4 * GB)  # now taken for 8 GB
        assert (these.running, these.waiting) == (["b", "c"], ["a"])
        these.end("b")
        assert these.waiting == ["a"]
        these.end("c")
        assert these.running == ["a"]


def test_several_killed_by_one_shortage_count_once() -> None:
    clock = Clock()
    with builds(cpus=4, memory=16 * GB, clock=clock) as these:
        for name in "abcd":
            these.ask(name, memory=4 * GB)
        clock.now += 60
        for name in "abcd":  # each gone before the next is asked about
            assert these.broker.out_of_memory(these.slot(name)) is Verdict.AGAIN
            these.end(name)
        assert these.broker.snapshot().memory == 12 * GB


def test_the_second_time_it_runs_alone_and_the_third_is_a_failure() -> None:
    clock = Clock()
    with builds(cpus=4, memory=100 * GB, clock=clock) as these:
        these.ask("small", memory=2 * GB)
        these.ask("large", memory=30 * GB)
        for left in (32, 2):
            these.ask("a", memory=GB // 10)
            assert "a" in these.running
            clock.now += 60
            assert these.broker.out_of_memory(these.slot("a")) is Verdict.AGAIN
            assert these.broker.snapshot().memory == left * GB
            these.end("a")
            if left == 32:
                these.end("large")
            del these.slots["a"]
        these.ask("a", memory=GB // 10)
        assert (these.running, these.waiting) == (["small"], ["a"])
        clock.now += 60
        these.end("small")
        assert these.broker.out_of_memory(these.slot("a")) is Verdict.FAILED


def test_a_split_unit_killed_alone_is_tried_on_one_cpu() -> None:
    with builds(cpus=4, memory=10 * GB) as these:
        these.ask("a", 360, memory=4 * GB, split=True)
        slot = these.slot("a")
        assert slot.threads == 4
        assert these.broker.out_of_memory(slot) is Verdict.AGAIN
        these.end("a")
        assert these.broker.snapshot().memory == 10 * GB
        these.slots.clear()
        these.ask("a", 360, memory=4 * GB, split=True)
        assert these.slot("a").threads == 1
        assert these.broker.out_of_memory(these.slot("a")) is Verdict.FAILED


def test_the_snapshot_says_what_was_done_and_what_is_left() -> None:
    clock = Clock()
    with builds(cpus=2, clock=clock) as these:
        these.ask("a", 30)
        clock.now += 10
        these.ask("b", 40)
        these.ask("c", 5)
        assert [unit.seconds_left for unit in these.broker.snapshot().running] == [20, 40]
        assert these.broker.snapshot().waiting[0].asked == 10
        assert these.broker.snapshot().seconds_left == 40  # c runs after a
        clock.now += 90
        assert these.broker.snapshot().seconds_left == pytest.approx(9 + 5)  # both are overdue
        these.end("a")
        unit = UnitId("fused", "a")
        assert these.broker.snapshot().done == (DoneUnit(unit, 1, 0, 100, Outcome(30, GB, 0)),)


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [
        pytest.param([], [], 0, id="nothing"),
        pytest.param([7], [], 7, id="what runs"),
        pytest.param([], [10, 10, 10], 20, id="two at once"),
        pytest.param([10], [1, 1, 20, 1], 20, id="longest first"),
    ],
)
def test_time_left_plays_the_policy_through(
    running: list[float], waiting: list[float], expected: float
) -> None:
    runs = [RunningUnit(UnitId("fused", "a"), 1, GB, 0, seconds) for seconds in running]
    left = time_left(runs, [Estimate(seconds, GB, True) for seconds in waiting], cpus=2, memory=9 * GB)
    assert left == expected


def test_time_left_knows_of_memory() -> None:
    waiting = [Estimate(10, 6 * GB, True), Estimate(8, 6 * GB, True), Estimate(4, GB, True)]
    assert time_left([], waiting, cpus=3, memory=9 * GB) == 18
    assert time_left([], [Estimate(5, 99 * GB, True)] * 2, cpus=3, memory=GB) == 10


def test_split_units_leave_the_cpus_that_they_keep_idle_to_others() -> None:
    broker = Broker(cpus=5, memory=100 * GB, gather_s=0)
    long = Estimate(400, GB, True)
    with ExitStack() as stack:
        slots = [
            stack.enter_context(broker.slot(UnitId("p", name), long, splittable=True)) for name in ("a", "b")
        ]
        assert [slot.threads for slot in slots] == [4, 4]
        assert [slot.cpus for slot in slots] == [2.5, 2.5]


def test_many_threads_never_exceed_cpus_or_memory() -> None:
    broker = Broker(cpus=3, memory=10 * GB, gather_s=0)
    faults: list[str] = []

    def build(number: int) -> None:
        for turn in range(10):
            estimate = Estimate(60 + number * turn % 7, (1 + (number + turn) % 5) * GB, True)
            with broker.slot(UnitId("fused", f"{number}.{turn}"), estimate, splittable=True):
                now = broker.snapshot()
                if sum(SPLIT_CPUS[unit.threads] for unit in now.running) > 3:
                    faults.append("CPUs")
                if sum(unit.memory for unit in now.running) > 10 * GB:
                    faults.append("memory")

    threads = [threading.Thread(target=build, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not faults
    assert len(broker.snapshot().done) == 80
    assert not broker.snapshot().waiting
