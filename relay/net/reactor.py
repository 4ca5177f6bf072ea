"""The event loop: level-triggered epoll, timers, and nothing that can stall the rest.

Each turn waits for sockets or the next deadline, serves the timers that are due, then
each readable socket once. Handlers read a bounded number of datagrams
(:data:`relay.net.udp.READ_BUDGET`) and return; epoll reports what they left, behind
whatever else became readable meanwhile, so neither a hot socket nor a flood keeps
another socket or a timer waiting. With nothing to do the loop sleeps: it has no tick.

Everything here runs in one thread. Other threads reach it through a
:class:`relay.net.mailbox.Mailbox`, signals through :mod:`relay.net.signals`.
"""

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from relay.turn.timerwheel import TimerWheel

logger = logging.getLogger("relay.net.reactor")

MAX_EVENTS: Final = 128  # sockets served per turn
LONG_TURN: Final = 0.001  # seconds; what is shorter nobody asks for
SLOW_TURN: Final = 0.1  # seconds: a wait that a caller would hear
REMEMBERED_TURNS: Final = 120.0  # seconds

Handler = Callable[[], None]


class Closable(Protocol):
    """Something that owns a file descriptor."""

    def fileno(self) -> int:
        """Return the descriptor, or a negative number once it is closed."""

    def close(self) -> None:
        """Close the descriptor."""


def log_bug(error: Exception) -> None:
    """Log an exception that no handler should have let through."""
    logger.error("a handler failed; this is a bug", exc_info=error)


class Reactor:
    """Runs handlers when descriptors are readable, and callbacks when their time comes."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_bug: Callable[[Exception], None] = log_bug,
    ) -> None:
        """Take the *clock*, in seconds, and what to do with an exception from a handler.

        *on_bug* is called for it, and the loop goes on with the next handler.
        """
        self.clock = clock
        self._on_bug = on_bug
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: TimerWheel[Handler] = TimerWheel(clock())
        self._retired: list[Closable] = []
        self._stopped = False
        self.awake_since: float | None = None  # on the clock; None while it waits
        self.slow_turns = 0  # how many took longer than SLOW_TURN
        self._long_turns: deque[tuple[float, float]] = deque()  # (end, duration), ever shorter

    def register(self, source: Closable, on_readable: Handler) -> None:
        """Call *on_readable* whenever *source* has something to read."""
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = on_readable

    def reassign(self, source: Closable, on_readable: Handler) -> None:
        """Call *on_readable* for *source* instead of what it was registered with."""
        self._handlers[source.fileno()] = on_readable

    def retire(self, source: Closable) -> None:
        """Stop serving *source* at once, and close it after the present batch.

        Until then its descriptor cannot be given to a new socket, which would inherit
        the events of the old one.
        """
        fd = source.fileno()
        del self._handlers[fd]
        self._epoll.unregister(fd)
        self._retired.append(source)

    def close_retired(self) -> None:
        """Close the retired sockets. Done after each batch; sooner if their ports are wanted."""
        while self._retired:
            self._retired.pop().close()

    def call_at(self, deadline: float, callback: Handler) -> None:
        """Call *callback* at *deadline*, instead of when it was to be called before."""
        self._timers.schedule(callback, deadline)

    def call_later(self, delay: float, callback: Handler) -> None:
        """Call *callback* in *delay* seconds, instead of when it was to be called before."""
        self._timers.schedule(callback, self.clock() + delay)

    def cancel(self, callback: Handler) -> None:
        """Do not call *callback*, if it was to be called."""
        self._timers.cancel(callback)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Wait for something to do, and do it."""
        clock = self.clock
        deadline = self._timers.next_deadline
        timeout = None if deadline is None else deadline - clock()
        if timeout is not None and timeout < 0:
            timeout = 0
        events = self._epoll.poll(timeout, MAX_EVENTS)
        self.awake_since = woke = clock()
        if deadline is not None and deadline <= woke:
            for callback in self._timers.advance(woke):
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - one bug must not end everyone's calls
                    self._on_bug(error)
        handlers = self._handlers
        for fd, _ in events:
            # Looked up only now: a handler before it may have retired this one.
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler()
                except Exception as error:  # noqa: BLE001 - likewise
                    self._on_bug(error)
        if self._retired:
            self.close_retired()
        self.awake_since = None
        now = clock()
        if now - woke > LONG_TURN:
            self._remember_turn(now, now - woke)

    def longest_turn(self) -> float:
        """Return how long the longest turn of the last two minutes took, in seconds.

        Datagrams may have waited for so long. Safe in any thread.
        """
        since = self.clock() - REMEMBERED_TURNS
        return max((lasted for end, lasted in list(self._long_turns) if end >= since), default=0.0)

    def _remember_turn(self, end: float, lasted: float) -> None:
        """Keep what may become the longest turn of those remembered: a sliding maximum."""
        turns = self._long_turns
        while turns and turns[-1][1] <= lasted:
            turns.pop()
        turns.append((end, lasted))
        while turns[0][0] < end - REMEMBERED_TURNS:
            turns.popleft()
        if lasted > SLOW_TURN:
            self.slow_turns += 1

    def stop(self) -> None:
        """Return from :meth:`run` after the present turn."""
        self._stopped = True

    def close(self) -> None:
        """Release what the loop itself holds; registered sockets remain their owners'."""
        self.close_retired()
        with suppress(OSError):
            self._epoll.close()
