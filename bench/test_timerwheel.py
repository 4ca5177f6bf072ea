"""What :data:`ITEMS` deadlines cost: to set, to move, and to let pass.

One call does it to all of them, so divide. Moving a deadline later is what each Refresh
and each ChannelBind does; the hour in which everything falls due is advanced through
deadline by deadline, as the reactor does.
"""

import random
from dataclasses import dataclass
from typing import Final

from pytest_benchmark.fixture import BenchmarkFixture

from relay.turn.timerwheel import Timer, TimerWheel

ITEMS: Final = 10_000
HOUR: Final = 3600
NOW: Final = 1000.25
ROUNDS: Final = 20


def test_insert(benchmark: BenchmarkFixture) -> None:
    deadlines = some_deadlines()

    wheel = benchmark.pedantic(filled, args=(deadlines,), rounds=ROUNDS)  # type: ignore[no-untyped-call]

    assert len(wheel) == ITEMS


def test_refresh(benchmark: BenchmarkFixture) -> None:
    """Each to a later deadline, again and again."""
    items = [Item() for _ in range(ITEMS)]
    wheel = filled(some_deadlines(), items)
    later = random.Random(2).sample(items, ITEMS)
    offsets = iter(range(HOUR, 10**9, HOUR))

    def refresh(wheel: TimerWheel[Item], offset: int) -> None:
        for item in later:
            wheel.schedule(item, NOW + offset)

    benchmark.pedantic(refresh, setup=lambda: ((wheel, next(offsets)), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]

    assert len(wheel) == ITEMS


def test_shorten(benchmark: BenchmarkFixture) -> None:
    """Each to an earlier deadline, which takes it out of its slot and files it anew."""

    def shorten(wheel: TimerWheel[Item], items: list[Item]) -> None:
        for item in items:
            wheel.schedule(item, NOW + 1)

    def setup() -> tuple[tuple[TimerWheel[Item], list[Item]], dict[str, object]]:
        items = [Item() for _ in range(ITEMS)]
        return (filled(deadlines, items), items), {}

    deadlines = some_deadlines()
    benchmark.pedantic(shorten, setup=setup, rounds=ROUNDS)  # type: ignore[no-untyped-call]


def test_advance(benchmark: BenchmarkFixture) -> None:
    """Through the hour in which all of them fall due, one by one."""

    def advance(wheel: TimerWheel[Item]) -> None:
        while (deadline := wheel.next_deadline) is not None:
            wheel.advance(deadline)
        assert len(wheel) == 0

    deadlines = some_deadlines()
    benchmark.pedantic(advance, setup=lambda: ((filled(deadlines),), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]


def some_deadlines() -> list[float]:
    rng = random.Random(1)
    return [NOW + rng.uniform(1, HOUR) for _ in range(ITEMS)]


@dataclass(eq=False, slots=True)
class Item:
    """Something that is due at some time."""

    timer: Timer | None = None


def filled(deadlines: list[float], items: list[Item] | None = None) -> TimerWheel[Item]:
    wheel: TimerWheel[Item] = TimerWheel(NOW)
    for item, deadline in zip(items or [Item() for _ in deadlines], deadlines, strict=True):
        wheel.schedule(item, deadline)
    return wheel
