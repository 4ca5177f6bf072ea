"""The relay ports that nobody holds: taken at random, given back, in constant time."""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Final

SET_ASIDE_FOR: Final = 10.0  # seconds
# Every other port is even, so that so many drawn ones are all odd has a chance of one in a million.
_EVEN_TRIES: Final = 20


class FreePorts:
    """A set of ports from which each is drawn with the same probability. RFC 8656 §7.2.

    A port that cannot be bound at present, mostly because another process holds it, is set aside
    for a while, so that no other Allocate has to find that out again. It is drawn before its time
    only where no other port is free.
    """

    def __init__(self, ports: range, excluded: int, randbelow: Callable[[int], int]) -> None:
        """Begin with all *ports* but one that is never lent.

        ``randbelow(n)`` draws from 0 to n - 1, unpredictably.
        """
        self._ports = [port for port in ports if port != excluded]
        self._places = {port: place for place, port in enumerate(self._ports)}
        self._count = len(self._ports)
        self._randbelow = randbelow
        self._set_aside: deque[tuple[float, int]] = deque()  # until when, in monotonic seconds

    def take(self, now: float, tried: Collection[int] = ()) -> int | None:
        """Draw a port, which is the caller's then, or return None if there is none.

        *tried* are those that the caller has set aside itself.
        """
        self._return_set_aside(now)
        if self._ports:
            port = self._ports[self._randbelow(len(self._ports))]
            self._remove(port)
            return port
        # The first in line was set aside first: if the caller has tried it, it has tried all.
        if not self._set_aside or self._set_aside[0][1] in tried:
            return None
        return self._set_aside.popleft()[1]

    def take_even(self, now: float, *, with_next: bool) -> int | None:
        """Draw an even port, or return None if there is none. RFC 8656 §7.2, EVEN-PORT.

        *with_next*: the one above it is free, too, and is the caller's as well. None that is set
        aside is drawn.
        """
        self._return_set_aside(now)
        ports = self._ports
        draws = (ports[self._randbelow(len(ports))] for _ in range(_EVEN_TRIES if ports else 0))
        suits = (port for port in draws if self._suits(port, with_next=with_next))
        port = next(suits, None)
        if port is None:  # there are few that do: they are looked for
            found = [port for port in ports if self._suits(port, with_next=with_next)]
            if not found:
                return None
            port = found[self._randbelow(len(found))]
        self._remove(port)
        if with_next:
            self._remove(port + 1)
        return port

    def claim(self, port: int) -> bool:
        """Take a certain port; return False if it is not free, or none that is lent."""
        if port not in self._places:
            for entry in self._set_aside:
                if entry[1] == port:
                    self._set_aside.remove(entry)
                    return True
            return False
        self._remove(port)
        return True

    def give_back(self, port: int) -> None:
        """Have a port that was taken drawn again."""
        self._places[port] = len(self._ports)
        self._ports.append(port)

    def set_aside(self, port: int, now: float) -> None:
        """Give back a port that cannot be bound at present: in use, or reserved."""
        self._set_aside.append((now + SET_ASIDE_FOR, port))

    @property
    def aside(self) -> list[tuple[float, int]]:
        """The ports that are set aside, and until when, in monotonic seconds."""
        return list(self._set_aside)

    def put_aside(self, ports: Iterable[tuple[float, int]]) -> None:
        """Set aside those of *ports* that are free, each until some time, the first one first."""
        for until, port in ports:
            if port in self._places:
                self._remove(port)
                self._set_aside.append((until, port))

    def _suits(self, port: int, *, with_next: bool) -> bool:
        return port % 2 == 0 and (not with_next or port + 1 in self._places)

    def _return_set_aside(self, now: float) -> None:
        while self._set_aside and self._set_aside[0][0] <= now:
            self.give_back(self._set_aside.popleft()[1])

    def _remove(self, port: int) -> None:
        """Take a port out; the last one fills the gap, so nothing has to move up."""
        place, last = self._places.pop(port), self._ports.pop()
        if last != port:
            self._ports[place] = last
            self._places[last] = place

    def check(self, taken: Iterable[int]) -> None:
        """Assert that each port is either one of the *taken* or in here, once. For tests."""
        here = [*self._ports, *(port for _, port in self._set_aside)]
        assert len({*here, *taken}) == self._count == len(here) + len(set(taken))
        assert self._places == {port: place for place, port in enumerate(self._ports)}
