"""Deadlines in one-second slots: exact, whatever happens to them before they come."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.turn.timerwheel import EVERYTHING, SLOTS, Timer, TimerWheel

DAY = 86_400
T = TypeVar("T", bound=Hashable)


@dataclass(eq=False)
class Item(Generic[T]):
    """Something with a name that is put on a wheel."""

    name: T
    timer: Timer | None = None


class Wheel(Generic[T]):
    """A wheel whose items are known by their names."""

    def __init__(self, now: float) -> None:
        self._wheel = TimerWheel[Item[T]](now)
        self._items: dict[T, Item[T]] = {}

    def __len__(self) -> int:
        return len(self._wheel)

    @property
    def next_deadline(self) -> float | None:
        return self._wheel.next_deadline

    def schedule(self, name: T, deadline: float) -> None:
        self._wheel.schedule(self._items.setdefault(name, Item(name)), deadline)

    def cancel(self, name: T) -> None:
        self._wheel.cancel(self._items.setdefault(name, Item(name)))

    def advance(self, now: float, at_most: int = EVERYTHING) -> list[T]:
        return [item.name for item in self._wheel.advance(now, at_most)]


@pytest.mark.parametrize(
    ("deadline", "just_before"),
    [
        pytest.param(110.0, 109.999, id="a whole second"),
        pytest.param(110.25, 110.249, id="within a second"),
        pytest.param(110.999, 110.998, id="end of a second"),
        pytest.param(100.001, 100.0, id="within the very second of the start"),
        pytest.param(100.0 + SLOTS - 1, 100.0 + SLOTS - 1.001, id="last slot"),
        pytest.param(100.0 + SLOTS, 100.0 + SLOTS - 0.001, id="first beyond the wheel"),
        pytest.param(100.0 + SLOTS + 0.5, 100.0 + SLOTS + 0.499, id="half a second beyond"),
        pytest.param(100.0 + 10 * SLOTS + 0.5, 100.0 + 10 * SLOTS, id="far beyond"),
        pytest.param(100.0 + 30 * DAY, 99.0 + 30 * DAY, id="a month"),
    ],
)
def test_an_item_is_due_at_its_deadline_and_not_before(deadline: float, just_before: float) -> None:
    wheel = Wheel[str](100.0)
    wheel.schedule("a", deadline)

    assert wheel.advance(just_before) == []
    assert len(wheel) == 1
    assert wheel.advance(deadline) == ["a"]
    assert len(wheel) == 0
    assert wheel.advance(deadline + DAY) == []


def test_a_loop_that_sleeps_until_the_next_deadline_meets_each_of_them() -> None:
    """Two lifetimes, nothing else going on: both come, each at its own time."""
    wheel = Wheel[str](0.5)
    wheel.schedule("hour", 3600.5)
    wheel.schedule("ten minutes", 600.5)

    assert sleeping_through(wheel) == [(600.5, ["ten minutes"]), (3600.5, ["hour"])]


def test_a_far_deadline_costs_one_waking_per_revolution_of_the_wheel() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", float(DAY))

    *before, last = sleeping_through(wheel)

    assert last == (float(DAY), ["a"])
    assert len(before) <= DAY // (SLOTS - 1)


@pytest.mark.parametrize(
    "deadline",
    [
        pytest.param(100.2, id="now"),
        pytest.param(100.0, id="in this second"),
        pytest.param(99.0, id="in the last second"),
        pytest.param(0.0, id="long ago"),
        pytest.param(-5.0, id="before the clock began"),
    ],
)
def test_a_deadline_in_the_past_is_due_at_once(deadline: float) -> None:
    wheel = Wheel[str](100.2)
    wheel.schedule("a", deadline)

    assert wheel.next_deadline is not None
    assert wheel.next_deadline <= 100.2
    assert wheel.advance(100.2) == ["a"]


def test_a_deadline_in_the_past_is_due_at_once_later_too() -> None:
    wheel = Wheel[str](100.0)
    wheel.advance(5000.7)
    wheel.schedule("a", 200.0)

    assert wheel.advance(5000.7) == ["a"]


def test_a_refreshed_item_is_not_due_early() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 600.0)
    wheel.schedule("a", 900.5)

    assert wheel.advance(600.0) == []
    assert wheel.advance(900.499) == []
    assert wheel.advance(900.5) == ["a"]


def test_a_refreshed_item_is_due_once() -> None:
    """Though the slot in which it lay comes round as well."""
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 600.0)
    wheel.schedule("a", 900.0)

    assert wheel.advance(2000.0) == ["a"]
    assert wheel.advance(10_000.0) == []


def test_a_shortened_deadline_counts() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 3600.0)
    wheel.schedule("a", 10.5)

    assert wheel.next_deadline == 10.5
    assert wheel.advance(10.499) == []
    assert wheel.advance(10.5) == ["a"]
    assert wheel.advance(3600.0) == []


def test_a_deadline_can_be_shortened_within_its_second() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 10.75)
    wheel.schedule("a", 10.25)

    assert wheel.next_deadline == 10.25
    assert wheel.advance(10.25) == ["a"]


def test_a_cancelled_item_never_comes() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 10.0)
    wheel.schedule("b", 10.0)
    wheel.cancel("a")

    assert len(wheel) == 1
    assert wheel.advance(20.0) == ["b"]


def test_a_cancelled_item_can_be_scheduled_again() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 10.0)
    wheel.cancel("a")
    wheel.schedule("a", 5.0)

    assert wheel.advance(5.0) == ["a"]
    assert wheel.advance(10.0) == []


def test_cancelling_what_is_not_there_does_nothing() -> None:
    wheel = Wheel[str](0.0)
    wheel.cancel("a")
    wheel.schedule("b", 10.0)
    wheel.cancel("a")

    assert wheel.advance(10.0) == ["b"]
    wheel.cancel("b")
    assert len(wheel) == 0


def test_a_suspended_host_wakes_to_everything_that_came_meanwhile() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("a", 600.0)
    wheel.schedule("b", 3600.0)
    wheel.schedule("c", DAY + 600.5)

    assert sorted(wheel.advance(float(DAY))) == ["a", "b"]
    assert wheel.advance(DAY + 600.0) == []
    assert wheel.advance(DAY + 600.5) == ["c"]


def test_the_second_decides_the_order() -> None:
    wheel = Wheel[str](0.0)
    for item, deadline in (("c", 30.0), ("a", 10.0), ("b", 20.0)):
        wheel.schedule(item, deadline)

    assert wheel.advance(100.0) == ["a", "b", "c"]


def test_the_second_decides_the_order_of_refreshed_items_too() -> None:
    wheel = Wheel[str](0.0)
    wheel.schedule("b", 10.0)
    wheel.schedule("b", 20.0)
    wheel.schedule("a", 15.0)

    assert wheel.advance(100.0) == ["a", "b"]


def test_an_empty_wheel_waits_for_nothing() -> None:
    wheel = Wheel[str](100.0)

    assert wheel.next_deadline is None
    assert wheel.advance(200.0) == []
    assert len(wheel) == 0


def test_a_wheel_that_ran_empty_waits_for_nothing() -> None:
    wheel = Wheel[str](100.0)
    wheel.schedule("a", 300.0)
    wheel.schedule("b", 300.5)
    wheel.advance(300.5)

    assert wheel.next_deadline is None


def test_when_everything_is_cancelled_there_is_nothing_to_wait_for() -> None:
    wheel = Wheel[int](0.0)
    for item in range(100):
        wheel.schedule(item, item * 60.5)
        wheel.schedule(item, item * 90.5)
    for item in range(100):
        wheel.cancel(item)

    assert wheel.next_deadline is None
    assert len(wheel) == 0


def test_the_wheel_starts_anywhere_on_the_clock() -> None:
    """The slot of the start is not slot 0, so the ring closes somewhere in the middle."""
    for start in (0.0, 1.5, SLOTS - 1.0, SLOTS - 0.5, float(SLOTS), 10.25 * SLOTS, 1e9):
        wheel = Wheel[str](start)
        wheel.schedule("late", start + 3600.0)
        wheel.schedule("soon", start + 1.0)
        assert sleeping_through(wheel) == [
            (start + 1.0, ["soon"]),
            (start + 3600.0, ["late"]),
        ]


def test_the_wheel_reaches_an_hour_ahead_of_any_time() -> None:
    """Though nothing was due for long: who sleeps for an hour is not woken in between."""
    wheel = Wheel[str](0.0)
    for now in (3000.25, 6000.5, float(DAY)):
        assert wheel.advance(now) == []
        wheel.schedule("a", now + 3600.0)
        assert wheel.next_deadline == now + 3600.0
        wheel.cancel("a")


def test_many_that_are_due_together_come_in_portions() -> None:
    wheel = Wheel[int](0.0)
    for item in range(100):
        wheel.schedule(item, 10.5)

    portions = [wheel.advance(10.5, at_most=30) for _ in range(4)]

    assert [len(portion) for portion in portions] == [30, 30, 30, 10]
    assert {item for portion in portions for item in portion} == set(range(100))


def test_who_has_not_looked_at_all_is_not_to_sleep() -> None:
    wheel = Wheel[int](0.0)
    for item in range(3):
        wheel.schedule(item, 10.5)
    wheel.advance(10.5, at_most=1)

    assert wheel.next_deadline is not None
    assert wheel.next_deadline <= 10.5


def test_items_that_only_pass_by_count_as_looked_at() -> None:
    """They lie where their deadline was before it was moved: to move them again is work, too."""
    wheel = Wheel[int](0.0)
    for item in range(100):
        wheel.schedule(item, 10.5)
        wheel.schedule(item, 20.5)

    assert wheel.advance(10.5, at_most=99) == []
    assert wheel.next_deadline == 10.0
    assert wheel.advance(10.5, at_most=1) == []
    assert wheel.next_deadline == 20.5


@pytest.mark.parametrize("later", [5.0, 10.25, 10.75, 30.0])
def test_what_waits_for_its_portion_can_be_moved_and_cancelled(later: float) -> None:
    wheel = Wheel[int](0.0)
    for item in range(4):
        wheel.schedule(item, 10.5)
    (first,) = wheel.advance(10.5, at_most=1)
    moved, cancelled, left = sorted({0, 1, 2, 3} - {first})

    wheel.schedule(moved, later)
    wheel.cancel(cancelled)

    assert set(wheel.advance(10.5)) == ({left, moved} if later <= 10.5 else {left})
    assert wheel.advance(30.0) == ([] if later <= 10.5 else [moved])


class Model(RuleBasedStateMachine):
    """The wheel against a plain dictionary that is searched from end to end."""

    items = st.integers(0, 9)
    # Quarters of a second, so that deadlines and times meet exactly and share seconds.
    quarters = st.integers(0, 80).map(lambda count: count / 4)
    delays = (
        quarters
        | st.sampled_from([600.0, 900.0, 3600.0, SLOTS - 1.0, float(SLOTS), SLOTS + 0.25])
        | st.floats(0.0, 3.0 * SLOTS)
    )
    steps = quarters | st.floats(0.0, 2.0 * SLOTS) | st.sampled_from([1.0, 4095.75, 4096.0, DAY])

    @initialize(start=st.floats(0.0, 1e6) | st.integers(0, 2 * SLOTS).map(float))
    def starts(self, start: float) -> None:
        self.now = start
        self.wheel = Wheel[int](start)
        self.deadlines: dict[int, float] = {}

    @rule(item=items, delay=delays)
    def schedules(self, item: int, delay: float) -> None:
        self.wheel.schedule(item, self.now + delay)
        self.deadlines[item] = self.now + delay

    @rule(item=items, overdue=delays)
    def schedules_too_late(self, item: int, overdue: float) -> None:
        self.wheel.schedule(item, self.now - overdue)
        self.deadlines[item] = self.now - overdue

    @rule(item=items)
    def cancels(self, item: int) -> None:
        self.wheel.cancel(item)
        self.deadlines.pop(item, None)

    @rule(step=steps)
    def time_passes(self, step: float) -> None:
        self.advances_to(self.now + step)

    @rule(at_most=st.integers(1, 5), step=steps)
    def serves_a_portion(self, at_most: int, step: float) -> None:
        self.now += step
        due = self.wheel.advance(self.now, at_most)
        assert len(due) <= at_most
        assert all(self.deadlines.pop(item) <= self.now for item in due)

    @precondition(lambda self: self.wheel.next_deadline is not None)
    @rule()
    def sleeps_until_the_next_deadline(self) -> None:
        next_deadline = self.wheel.next_deadline
        assert next_deadline is not None
        self.advances_to(max(self.now, next_deadline))

    def advances_to(self, now: float) -> None:
        self.now = now
        due = self.wheel.advance(now)

        expected = {item for item, deadline in self.deadlines.items() if deadline <= now}
        assert sorted(due) == sorted(expected)
        for item in due:
            del self.deadlines[item]
        # Whoever sleeps until then must not wake at once, over and over.
        assert self.wheel.next_deadline is None or self.wheel.next_deadline > now

    @invariant()
    def knows_how_many_there_are(self) -> None:
        assert len(self.wheel) == len(self.deadlines)

    @invariant()
    def wakes_no_later_than_the_earliest(self) -> None:
        next_deadline = self.wheel.next_deadline
        if self.deadlines:
            assert next_deadline is not None
            assert next_deadline <= max(self.now, min(self.deadlines.values()))
        else:
            assert next_deadline is None

    def teardown(self) -> None:
        """In the end time passes, and all that was left comes at its time."""
        while self.deadlines:
            self.sleeps_until_the_next_deadline()


TestAgainstModel = Model.TestCase
TestAgainstModel.settings = settings(deadline=None, max_examples=50)


def sleeping_through(wheel: Wheel[str]) -> list[tuple[float, list[str]]]:
    """Advance to each next deadline until there is none; return what was due when."""
    wakings = []
    while wheel.next_deadline is not None:
        now = wheel.next_deadline
        wakings.append((now, wheel.advance(now)))
    return wakings
