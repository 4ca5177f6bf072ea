"""The last lines of the log from level warning on, for the status page.

What names a client stays out of it: such a record has its address as ``client``, beside the text.
"""

import logging
from collections import deque
from typing import Final, NamedTuple

LINES: Final = 12
LONGEST: Final = 500  # characters


class Line(NamedTuple):
    """One line."""

    t: float  # Unix time
    level: str
    logger: str
    text: str


class RecentLines(logging.Handler):
    """Keeps the last ones. Reading :attr:`lines` is safe in any thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[Line] = deque(maxlen=LINES)

    @property
    def lines(self) -> list[Line]:
        """The lines, the latest first."""
        return [*reversed(self._lines.copy())]

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line. A traceback is for the log alone."""
        if hasattr(record, "client"):
            return
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001  # a bug in a line must not stop what it is about
            text = str(record.msg)
        line = Line(round(record.created, 3), record.levelname, record.name, text[:LONGEST])
        self._lines.append(line)


RECENT: Final = RecentLines()
"""Those of this process."""
