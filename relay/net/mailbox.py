"""The way into the reactor for other threads: a deque, and an eventfd that wakes it."""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items posted from any thread, handed over in the reactor's.

    Register :meth:`deliver` for it. Items should be immutable: from the post on,
    another thread looks at them.
    """

    def __init__(self, on_item: Callable[[T], None]) -> None:
        """Take what to do with each item, in the reactor's thread."""
        self._on_item = on_item
        self._items: deque[T] = deque()
        self._is_closed = False
        self._lock = threading.Lock()  # held while the descriptor is written to, or closed
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return the eventfd: readable while items may be waiting."""
        return self._fd

    def post(self, item: T) -> None:
        """Hand over *item*. Safe in any thread; never blocks."""
        self._items.append(item)
        with self._lock:
            if not self._is_closed:  # else its number may be another descriptor's by now
                os.eventfd_write(self._fd, 1)

    def deliver(self) -> None:
        """Hand over what was posted so far.

        The eventfd is reset before the items are taken: one posted in between makes it
        readable again, so no wake-up is lost; the spurious one finds nothing.
        """
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return
        try:
            for _ in range(len(self._items)):
                self._on_item(self._items.popleft())
        finally:
            if self._items:  # an item failed, or more came: those left need a wake-up
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Close the eventfd. What is posted later stays where it is."""
        with self._lock:
            self._is_closed = True
            os.close(self._fd)
