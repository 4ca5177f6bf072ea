"""What :data:`ITEMS` deadlines cost: to set, to move, and to let pass.

One call does it to all of them, so divide. Moving a deadline later is what each Refresh
and each ChannelBind does; the hour in which everything falls due is advanced through
deadline by deadline, as the reactor does.
"""

import random
from typing import Final

from pytest_benchmark.fixture import BenchmarkFixture

from relay.turn.timerwheel import TimerWheel

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
    wheel = filled(some_deadlines())
    later = random.Random(2).sample(range(ITEMS), ITEMS)
    offsets = iter(range(HOUR, 10**9, HOUR))

    def refresh(wheel: TimerWheel[int], offset: int) -> None:
        for item in later:
            wheel.schedule(item, NOW + offset)

    benchmark.pedantic(refresh, setup=lambda: ((wheel, next(offsets)), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]

    assert len(wheel) == ITEMS


def test_shorten(benchmark: BenchmarkFixture) -> None:
    """Each to an earlier deadline, which takes it out of its slot and files it anew."""

    def shorten(wheel: TimerWheel[int]) -> None:
        for item in range(ITEMS):
            wheel.schedule(item, NOW + 1)

    deadlines = some_deadlines()
    benchmark.pedantic(shorten, setup=lambda: ((filled(deadlines),), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]


def test_advance(benchmark: BenchmarkFixture) -> None:
    """Through the hour in which all of them fall due, one by one."""

    def advance(wheel: TimerWheel[int]) -> None:
        while (deadline := wheel.next_deadline) is not None:
            wheel.advance(deadline)
        assert len(wheel) == 0

    deadlines = some_deadlines()
    benchmark.pedantic(advance, setup=lambda: ((filled(deadlines),), {}), rounds=ROUNDS)  # type: ignore[no-untyped-call]


def some_deadlines() -> list[float]:
    rng = random.Random(1)
    return [NOW + rng.uniform(1, HOUR) for _ in range(ITEMS)]


def filled(deadlines: list[float]) -> TimerWheel[int]:
    wheel: TimerWheel[int] = TimerWheel(NOW)
    for item, deadline in enumerate(deadlines):
        wheel.schedule(item, deadline)
    return wheel
