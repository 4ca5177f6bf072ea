"""The relay ports that nobody holds: taken at random, given back, in constant time."""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Final

SET_ASIDE_FOR: Final = 10.0  # seconds


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
        self._count = len(self._ports)
        self._randbelow = randbelow
        self._set_aside: deque[tuple[float, int]] = deque()  # until when, in monotonic seconds

    def take(self, now: float, tried: Collection[int] = ()) -> int | None:
        """Draw a port, which is the caller's then, or return None if there is none.

        *tried* are those that the caller has set aside itself.
        """
        set_aside, ports = self._set_aside, self._ports
        while set_aside and set_aside[0][0] <= now:
            ports.append(set_aside.popleft()[1])
        if not ports:
            # The first in line was set aside first: if the caller has tried it, it has tried all.
            if not set_aside or set_aside[0][1] in tried:
                return None
            return set_aside.popleft()[1]
        # The last one fills the gap, so nothing has to move up.
        drawn, last = self._randbelow(len(ports)), ports.pop()
        if drawn == len(ports):
            return last
        port, ports[drawn] = ports[drawn], last
        return port

    def give_back(self, port: int) -> None:
        """Have a port that was taken drawn again."""
        self._ports.append(port)

    def set_aside(self, port: int, now: float) -> None:
        """Give back a port that cannot be bound at present: in use, or reserved."""
        self._set_aside.append((now + SET_ASIDE_FOR, port))

    def check(self, taken: Iterable[int]) -> None:
        """Assert that each port is either one of the *taken* or in here, once. For tests."""
        here = [*self._ports, *(port for _, port in self._set_aside)]
        assert len({*here, *taken}) == self._count == len(here) + len(set(taken))
