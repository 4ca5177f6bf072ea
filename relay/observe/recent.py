"""The last lines of the log from level warning on, for the status page.

What names a client stays out of it: such a record has its address as ``client``, beside the text.
So does what stands in quotes: that is what somebody has typed, and it may be a secret that went
where the name of its file belongs.
"""

import logging
import re
from typing import Final, NamedTuple

LINES: Final = 12
LONGEST: Final = 500  # characters

# As repr() writes it. An apostrophe within a word is none of these.
_QUOTED: Final = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_NUMBER: Final = re.compile(r"\d+")


class Line(NamedTuple):
    """One line, and how often there was one like it."""

    t: float  # Unix time, of the last one
    level: str
    logger: str
    text: str  # likewise
    times: int


class RecentLines(logging.Handler):
    """Keeps the last ones. Reading :attr:`lines` is safe in any thread.

    Lines that differ in their numbers only are one, so that one which comes often does not drive
    out the others.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: dict[tuple[str, str, str], Line] = {}  # the latest last

    @property
    def lines(self) -> list[Line]:
        """The lines, the latest first."""
        return [*reversed([*self._lines.values()])]

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line. A traceback is for the log alone."""
        if hasattr(record, "client"):
            return
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001  # a bug in a line must not stop what it is about
            text = str(record.msg)
        text = _QUOTED.sub("'…'", text)[:LONGEST]
        kind = (record.name, record.levelname, _NUMBER.sub("0", text))
        before = self._lines.pop(kind, None)
        times = 1 if before is None else before.times + 1
        if len(self._lines) == LINES:
            del self._lines[next(iter(self._lines))]
        self._lines[kind] = Line(
            round(record.created, 3), record.levelname, record.name, text, times
        )


RECENT: Final = RecentLines()
"""Those of this process."""
