"""Signals as something to read: a handler may then do whatever it likes.

CPython writes the number of each signal to a descriptor, from the C handler, the moment
it arrives. That descriptor is one end of a socketpair: an eventfd takes eight-byte
writes only and would refuse them.
"""

import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Self


class Signals:
    """Catches signals between ``__enter__`` and ``__exit__``. Main thread only.

    They stay harmless after that: one that comes as the process ends must not turn a clean exit
    into a death by signal.
    """

    def __init__(self, caught: Iterable[signal.Signals], on_signal: Callable[[int], None]) -> None:
        """Take which signals to catch, and what to do with each one's number."""
        self._caught = tuple(caught)
        self._on_signal = on_signal
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> Self:
        # A full buffer means that signals are waiting already: nothing is lost.
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A Python handler must exist, or the default action would end the process.
        for number in self._caught:
            signal.signal(number, _ignore)
        # Whoever held them back until they can be handled need not do so any more.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._caught)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._old_fd)
        self.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal has come."""
        return self._reader.fileno()

    def deliver(self) -> None:
        """Handle the signals that have come. Register this with the reactor."""
        for number in self.take():
            self._on_signal(number)

    def take(self) -> list[int]:
        """Return the signals that have come, unhandled; a storm of one counts as one."""
        try:
            numbers = self._reader.recv(4096)
        except BlockingIOError:
            return []
        return [number for number in dict.fromkeys(numbers) if number in self._caught]

    def close(self) -> None:
        """Close the socketpair."""
        self._reader.close()
        self._writer.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number has been written to the socketpair already."""
