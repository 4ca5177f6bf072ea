"""Keeps systemd told, from the loop: a line on how it goes now and then, and that it runs."""

from collections.abc import Callable
from typing import Final, Protocol

from relay.host.systemd import Notifier

STATUS_INTERVAL: Final = 10.0  # seconds between two lines
SHORTEST_WATCHDOG_INTERVAL: Final = 0.05  # seconds between two messages for the watchdog
GRACE: Final = 30.0  # seconds that systemd is asked for beyond what something should take


class Scheduler(Protocol):
    """The part of the reactor that this needs."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        """Call *callback* in *delay* seconds."""


class Supervision:
    """Tells the service manager what becomes of the relay. Without one it does nothing."""

    def __init__(
        self,
        notifier: Notifier,
        watchdog: float | None,
        scheduler: Scheduler,
        status_line: Callable[[], str],
    ) -> None:
        """*watchdog* is how often systemd wants to hear from us, in seconds, or None."""
        self._notifier = notifier
        self._watchdog = watchdog
        self._scheduler = scheduler
        self._status_line = status_line
        self._is_ready = False
        self.on_alone: Callable[[], None] | None = None
        """What to do when nobody listens any more, if anything."""

    def start(self) -> None:
        """Begin to tell how it goes."""
        if self._notifier.is_active:
            self._tell_status()
        if self._watchdog is not None:
            self._feed_watchdog()

    def ready(self) -> None:
        """Say that the relay serves."""
        self._is_ready = True
        self._notifier.ready()
        self._notifier.status(self._status_line())

    def reloading(self) -> None:
        """Say that the configuration is read anew. Before ready(), that would say too much."""
        if self._is_ready:
            self._notifier.reloading()

    def reloaded(self) -> None:
        """Say that this is done."""
        if self._is_ready:
            self._notifier.ready()

    def stopping(self) -> None:
        """Say that the relay is about to end."""
        self._notifier.stopping()

    def replaced_by(self, pid: int) -> None:
        """Say that another process is the relay from here on."""
        self._notifier.replaced_by(pid)

    def will_take(self, seconds: float) -> None:
        """Ask for so many seconds, and some more."""
        self._notifier.extend_timeout(seconds + GRACE)

    def close(self) -> None:
        """Close the socket to systemd; later messages are dropped."""
        self._notifier.close()

    def _tell_status(self) -> None:
        if not self._is_ready:  # that the portal is away is no reason to start us anew
            self.will_take(STATUS_INTERVAL)
        self._notifier.status(self._status_line())
        if self._notifier.is_alone and self.on_alone is not None:
            self.on_alone()
            return
        self._scheduler.call_later(STATUS_INTERVAL, self._tell_status)

    def _feed_watchdog(self) -> None:
        """Tell systemd that the loop runs. Nobody else may: a stuck one is to be restarted."""
        assert self._watchdog is not None
        self._notifier.watchdog()
        interval = max(self._watchdog / 3, SHORTEST_WATCHDOG_INTERVAL)
        self._scheduler.call_later(interval, self._feed_watchdog)
