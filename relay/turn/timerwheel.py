"""Deadlines in one-second slots. Pure: time is handed in.

A timer wheel suits a relay because nearly every deadline is moved before it comes
(each Refresh, each rebind) and no deadline is far away. Moving one later costs a
single store: the item stays in the slot where it lies and is filed again when that slot
comes round. Nothing ever looks at all items.
"""

from dataclasses import dataclass
from math import inf
from typing import Final, Generic, Protocol, TypeVar

SLOTS: Final = 4096  # seconds; more than the hour that an allocation may last
EVERYTHING: Final = 1 << 62


@dataclass(slots=True)
class Timer:
    """When an item is due, and where the wheel has it."""

    deadline: float  # seconds, on the clock of the caller
    slot: int  # where it is filed, which may come round before *deadline*


class Timed(Protocol):
    """What can be put on a wheel, on one at a time.

    It holds its own timer: one table of all of them would hold up everything whenever it grows.
    """

    timer: Timer | None


T = TypeVar("T", bound=Timed)


class TimerWheel(Generic[T]):
    """Items, each with one deadline in seconds of a monotonic clock.

    Deadlines are exact: an item is due at its deadline, neither a slot earlier nor
    later. One that lies further away than the wheel reaches is filed as far as it goes
    and filed again from there.
    """

    def __init__(self, now: float) -> None:
        self._count = 0
        # A dict serves as a set that is emptied one by one at no cost.
        self._slots: list[dict[T, None] | None] = [None] * SLOTS
        self._wake = [inf] * SLOTS  # the earliest deadline ever filed in each slot
        self._occupied = 0  # bit n is set while slot n holds an item
        self._cursor = int(now)  # every earlier second has been served
        self._next: float = inf
        self._passing: dict[T, None] = {}  # what lay in the slot at the cursor, not looked at yet

    def __len__(self) -> int:
        return self._count

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`advance` should be called next, or None while there is nothing to wait for.

        It can be earlier than any deadline, when items were moved or cancelled: then
        advancing files them anew. It is in the past while :meth:`advance` has not looked at all.
        """
        if self._passing:
            return float(self._cursor)
        return None if self._next == inf else self._next

    def has_passed(self, now: float) -> bool:
        """Tell if there is anything to look at by *now*."""
        return bool(self._passing) or self._next <= now

    def schedule(self, item: T, deadline: float) -> None:
        """Make *item* due at *deadline*, instead of when it was due before."""
        timer = item.timer
        if timer is None:
            timer = item.timer = Timer(deadline, -1)
            self._count += 1
        elif deadline >= timer.deadline:
            timer.deadline = deadline
            return
        else:
            self._take_out(item, timer.slot)
            timer.deadline = deadline
        self._file(item, timer)

    def cancel(self, item: T) -> None:
        """Forget *item*; nothing happens if it is not there."""
        timer = item.timer
        if timer is not None:
            self._take_out(item, timer.slot)
            self._forget(item)

    def advance(self, now: float, at_most: int = EVERYTHING) -> list[T]:
        """Return what is due at *now*, earliest deadline first, and forget it.

        At most so many items are looked at, due or not, whatever lies in one second; the rest is
        for the next call.
        """
        due: dict[T, float] = {}
        for _ in range(at_most):
            if not self._passing:
                if self._next > now:
                    break
                self._cursor = int(self._next)
                self._passing = self._empty(self._cursor % SLOTS)
                self._find_next()
            item, _ = self._passing.popitem()
            timer = item.timer
            assert timer is not None
            if timer.deadline <= now:
                self._forget(item)
                due[item] = timer.deadline
            else:
                self._file(item, timer)
        if not self._passing and self._next > now:
            self._cursor = max(self._cursor, int(now))
        return sorted(due, key=due.__getitem__)

    def _forget(self, item: T) -> None:
        item.timer = None
        self._count -= 1

    def _file(self, item: T, timer: Timer) -> None:
        wake = min(max(timer.deadline, self._cursor), self._cursor + SLOTS - 1)
        slot = timer.slot = int(wake) % SLOTS
        items = self._slots[slot]
        if items is None:
            self._slots[slot] = {item: None}
            self._occupied |= 1 << slot
        else:
            items[item] = None
        self._wake[slot] = min(self._wake[slot], wake)
        self._next = min(self._next, wake)

    def _take_out(self, item: T, slot: int) -> None:
        if item in self._passing:
            del self._passing[item]
            return
        items = self._slots[slot]
        assert items is not None
        del items[item]
        if not items:
            self._empty(slot)
            self._find_next()

    def _empty(self, slot: int) -> dict[T, None]:
        items = self._slots[slot]
        assert items is not None
        self._slots[slot] = None
        self._wake[slot] = inf
        self._occupied ^= 1 << slot
        return items

    def _find_next(self) -> None:
        """Look up the slot that comes round first: the lowest bit set, from the cursor on."""
        if not self._occupied:
            self._next = inf
            return
        start = self._cursor % SLOTS
        ahead = self._occupied >> start
        bits, first = (ahead, start) if ahead else (self._occupied, 0)
        self._next = self._wake[first + (bits & -bits).bit_length() - 1]
