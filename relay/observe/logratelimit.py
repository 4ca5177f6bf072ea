"""A rate limit on log lines that repeat, so that no flood fills a disk."""

import logging
import time
from collections.abc import Callable
from threading import Lock
from typing import Final

INTERVAL: Final = 10.0  # seconds
BURST: Final = 5  # lines of one kind about one client, per interval
BURST_OF_ALL: Final = 100  # lines of one kind about all clients together, per interval
MAX_KINDS: Final = 500
UNLIMITED: Final = "relay.daemon"


class LogRateLimit(logging.Filter):
    """Lets few lines of one kind through per interval. Safe in several threads.

    Lines are of one kind if logger, level and message template are the same. Where they carry
    the host of a client (``extra={"client": host}``), each client has a share of its own. The
    first line of a kind after a pause says how many were held back, whoever they were about.

    DEBUG is not limited: who asks for it wants all of it. Nor are the lines of the daemon, which
    say what came of signals: only the operator could flood the log with them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = Lock()
        self._kinds: dict[tuple[str, int, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether *record* may pass, after adding to it what was held back."""
        if record.levelno <= logging.DEBUG or record.name == UNLIMITED:
            return True
        with self._lock:
            now, kind = self._clock(), self._kind(record)
            if now - kind.since >= INTERVAL:
                if kind.held_back:
                    record.msg = f"{record.msg} ({kind.held_back} more like this held back)"
                kind.begin(now)
            return kind.takes(getattr(record, "client", None))

    def _kind(self, record: logging.LogRecord) -> "_Kind":
        key = (record.name, record.levelno, str(record.msg))
        if key not in self._kinds and len(self._kinds) >= MAX_KINDS:
            # More than there are in the code: somebody logs text that was put together before.
            key = (record.name, record.levelno, "")
        return self._kinds.setdefault(key, _Kind())


class _Kind:
    """How many lines of one kind came since the interval began.

    A client is remembered only if a line about it passed, so at most BURST_OF_ALL are.
    """

    __slots__ = ("held_back", "passed", "passed_of", "since")

    def __init__(self) -> None:
        self.begin(float("-inf"))

    def begin(self, now: float) -> None:
        self.since = now
        self.passed = self.held_back = 0
        self.passed_of: dict[str | None, int] = {}  # by client

    def takes(self, client: str | None) -> bool:
        passed = self.passed_of.get(client, 0)
        if passed >= BURST or self.passed >= BURST_OF_ALL:
            self.held_back += 1
            return False
        self.passed_of[client] = passed + 1
        self.passed += 1
        return True
