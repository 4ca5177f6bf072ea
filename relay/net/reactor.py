"""The event loop: level-triggered epoll, timers, and nothing that can stall the rest.

Each iteration waits for sockets or the next deadline, serves the timers that are due, then
the sources that are readable. A handler reads a bounded number of datagrams
(:data:`relay.net.udp.READ_BUDGET`) and returns; epoll reports what it left, behind
whatever else became readable meanwhile, so neither a hot socket nor a flood keeps
another socket or a timer waiting. With nothing to do the loop sleeps: it has no tick.

All clients share a few sockets, and each of their allocations has one of its own. With one
budget for each, the share of the clients' sockets would shrink with every busy port. So a source
can be registered to *come first*: in a crowd, such sources are served before the others, and
those that have more again in between, one after each of the others. So under overload they get
half of all reads, however many ports are busy.

A stream can also be waited for until it takes more (:meth:`Reactor.watch`). Its handler is the
same: it is told nothing but that it is its turn, and knows itself what it waits for.

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

logger = logging.getLogger("relay.net.reactor")

# Sources served per iteration. If more are readable, those that come first are served in each
# iteration all the same, and epoll rotates the others.
MAX_EVENTS: Final = 16
CROWD: Final = 4  # sources that are readable at once, from which on shares matter
LONG_ITERATION: Final = 0.001  # seconds; what is shorter nobody asks for
SLOW_ITERATION: Final = 0.1  # seconds: a wait that a caller would hear
REMEMBERED_ITERATIONS: Final = 120.0  # seconds

Handler = Callable[[], bool | None]
"""Reads some of what there is. Returns True if it stopped at its budget, so there may be more."""

Callback = Callable[[], None]


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
        self._first: set[int] = set()  # descriptors of the sources that come first
        self._poll_of_first = select.poll()  # looks at only these
        self._deadlines: dict[Callback, float] = {}  # a handful
        self._next_deadline: float | None = None  # the earliest of them
        self._retired: list[Closable] = []
        self._at_end: list[Callback] = []  # what is left for the end of this iteration
        self._stopped = False
        self.awake_since: float | None = None  # on the clock; None while it waits
        self.slow_iterations = 0  # how many took longer than SLOW_ITERATION
        self._long_iterations: deque[tuple[float, float]] = deque()  # (end, duration), ever shorter

    def register(
        self, source: Closable, on_readable: Handler, *, comes_first: bool = False
    ) -> None:
        """Call *on_readable* whenever *source* has something to read.

        *comes_first* is for what serves many: see the head of this module.
        """
        fd = source.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = on_readable
        if comes_first:
            self._poll_of_first.register(fd, select.POLLIN)
            self._first.add(fd)

    def watch(self, source: Closable, *, readable: bool, writable: bool) -> None:
        """Wait for *source* to have something to read, or for room to write, or both.

        With neither, its handler is called only once it is broken.
        """
        events = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
        self._epoll.modify(source.fileno(), events)

    def hand_to(self, source: Closable, on_readable: Handler) -> None:
        """Call *on_readable* from here on, instead of what is called whenever *source* is."""
        self._handlers[source.fileno()] = on_readable

    def retire(self, source: Closable) -> None:
        """Stop serving *source* at once, and close it after the present batch.

        Until then its descriptor cannot be given to a new socket, which would inherit
        the events of the old one.
        """
        self.leave(source)
        if not self._retired:
            self.call_at_end(self.close_retired)
        self._retired.append(source)

    def leave(self, source: Closable) -> None:
        """Stop serving *source* at once; it stays open."""
        fd = source.fileno()
        del self._handlers[fd]
        # Not left to its closing: epoll would keep it if another process has the socket, too.
        self._epoll.unregister(fd)
        if fd in self._first:
            self._poll_of_first.unregister(fd)
            self._first.remove(fd)

    def close_retired(self) -> None:
        """Close the retired sockets. Done after each batch; sooner if their ports are wanted."""
        while self._retired:
            self._retired.pop().close()

    def call_at_end(self, callback: Callback) -> None:
        """Call *callback* once, at the end of this iteration, when all events are served."""
        self._at_end.append(callback)

    def call_at(self, deadline: float, callback: Callback) -> None:
        """Call *callback* at *deadline*, instead of when it was to be called before."""
        if self._deadlines.get(callback) != deadline:
            self._deadlines[callback] = deadline
            self._next_deadline = min(self._deadlines.values())

    def call_later(self, delay: float, callback: Callback) -> None:
        """Call *callback* in *delay* seconds, instead of when it was to be called before."""
        self.call_at(self.clock() + delay, callback)

    def cancel(self, callback: Callback) -> None:
        """Do not call *callback*, if it was to be called."""
        if self._deadlines.pop(callback, None) is not None:
            self._next_deadline = min(self._deadlines.values(), default=None)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._stopped:
            self.iterate()

    def iterate(self) -> None:
        """Wait for something to do, and do it."""
        clock, deadline = self.clock, self._next_deadline
        timeout = None
        if deadline is not None:
            timeout = deadline - clock()
            if timeout < 0:
                timeout = 0
        events = self._epoll.poll(timeout, MAX_EVENTS)
        self.awake_since = woke = clock()
        if deadline is not None and deadline <= woke:
            self._call_due(woke)
        if len(events) == 1:  # without the call of a method, as that is what calls are like
            handler = self._handlers.get(events[0][0])
            if handler is not None:
                try:
                    handler()
                except Exception as error:  # noqa: BLE001 - one bug must not end everyone's calls
                    self._on_bug(error)
        elif len(events) < CROWD:
            for fd, _ in events:
                self._serve(fd)
        else:
            self._serve_crowd([fd for fd, _ in events])
        if self._at_end:
            self._end_iteration()
        self.awake_since = None
        now = clock()
        if now - woke > LONG_ITERATION:
            self._remember_iteration(now, now - woke)

    def longest_iteration(self) -> float:
        """Return how long the longest iteration of the last two minutes took, in seconds.

        Datagrams may have waited for so long. Safe in any thread.
        """
        since = self.clock() - REMEMBERED_ITERATIONS
        recent = (lasted for end, lasted in list(self._long_iterations) if end >= since)
        return max(recent, default=0.0)

    def stop(self) -> None:
        """Return from :meth:`run` after the present iteration."""
        self._stopped = True

    def close(self) -> None:
        """Release what the loop itself holds; registered sockets remain their owners'."""
        self.close_retired()
        with suppress(OSError):
            self._epoll.close()

    def _end_iteration(self) -> None:
        """Call what was left for the end, and what that leaves for it."""
        while self._at_end:
            callbacks, self._at_end = self._at_end, []
            self._call(callbacks)

    def _call_due(self, now: float) -> None:
        """Call what is due, earliest deadline first."""
        due = [callback for callback, deadline in self._deadlines.items() if deadline <= now]
        due.sort(key=self._deadlines.__getitem__)
        for callback in due:
            self.cancel(callback)
        self._call(due)

    def _call(self, callbacks: list[Callback]) -> None:
        for callback in callbacks:
            try:
                callback()
            except Exception as error:  # noqa: BLE001 - one bug must not end everyone's calls
                self._on_bug(error)

    def _serve(self, fd: int) -> bool | None:
        """Let the handler of a descriptor read; return whether there may be more."""
        # Looked up only now: a handler before it may have retired this one.
        handler = self._handlers.get(fd)
        if handler is None:
            return None
        try:
            return handler()
        except Exception as error:  # noqa: BLE001 - one bug must not end everyone's calls
            self._on_bug(error)
            return None

    def _serve_crowd(self, ready: list[int]) -> None:
        """Serve what comes first, then the others, and in between again what comes first."""
        others = [fd for fd in ready if fd not in self._first]
        if len(ready) == MAX_EVENTS:  # perhaps not all that is readable was reported
            first = [fd for fd, _ in self._poll_of_first.poll(0)]
        else:
            first = [fd for fd in ready if fd in self._first]
        have_more = deque(fd for fd in first if self._serve(fd))
        for served, other in enumerate(others, 1):
            self._serve(other)
            if have_more and served >= len(first):
                fd = have_more.popleft()
                if self._serve(fd):
                    have_more.append(fd)

    def _remember_iteration(self, end: float, lasted: float) -> None:
        """Keep what may become the longest of those remembered: a sliding maximum."""
        iterations = self._long_iterations
        while iterations and iterations[-1][1] <= lasted:
            iterations.pop()
        iterations.append((end, lasted))
        while iterations[0][0] < end - REMEMBERED_ITERATIONS:
            iterations.popleft()
        if lasted > SLOW_ITERATION:
            self.slow_iterations += 1
