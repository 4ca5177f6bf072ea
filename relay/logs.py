"""Logging: two formats, a level per logger, and a brake on lines that repeat."""

import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from pythonjsonlogger.json import JsonFormatter

FORMATS: Final = ("human", "json")
LEVELS: Final = ("debug", "info", "warning", "error")

BURST: Final = 5  # lines of one kind, per interval
INTERVAL: Final = 10.0  # seconds

_HUMAN: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_JSON: Final = "%(levelname)s %(name)s %(message)s"


def parse_levels(text: str) -> dict[str, int]:
    """Read ``info,relay.turn=debug`` into levels by logger name; "" is the root.

    Raises ValueError for what is not a level, or not a logger name.
    """
    levels: dict[str, int] = {}
    for item in text.split(","):
        name, equals, level = (part.strip() for part in item.rpartition("="))
        if level.lower() not in LEVELS:
            raise ValueError(f"{level!r} is not one of {', '.join(LEVELS)}")
        if equals and not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name):
            raise ValueError(f"{name!r} is not the name of a logger")
        if name in levels:
            raise ValueError(f"{item.strip()!r}: given twice")
        levels[name] = logging.getLevelName(level.upper())
    return {"": logging.INFO, **levels}


def configure(log_format: str, levels: dict[str, int]) -> None:
    """Send the logs to stderr in that format, with those levels."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        renamed = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(_JSON, rename_fields=renamed, timestamp=True))
    else:
        handler.setFormatter(_HumanFormatter(_HUMAN))
    handler.addFilter(Brake())
    logging.root.handlers[:] = [handler]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class _HumanFormatter(logging.Formatter):
    """One line a record, so that nothing from the wire can forge another one.

    A traceback takes more; its lines are indented.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return _escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Brake(logging.Filter):
    """Lets few lines of one kind through per interval, so that no flood fills a disk.

    Lines are of one kind if logger, level and message template are the same. The first line
    after a pause says how many were held back. Nothing below WARNING and above DEBUG repeats
    with the traffic, but it is braked all the same; DEBUG is not: who asks for it wants it all.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether *record* may pass, after adding to it what was held back."""
        if record.levelno <= logging.DEBUG:
            return True
        now = self._clock()
        key = (record.name, record.levelno, str(record.msg))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(now)
        if now - kind.since >= INTERVAL:
            if kind.held_back:
                record.msg = f"{record.getMessage()} ({kind.held_back} more like this held back)"
                record.args = ()
            kind.since, kind.passed, kind.held_back = now, 0, 0
        if kind.passed < BURST:
            kind.passed += 1
            return True
        kind.held_back += 1
        return False


class _Kind:
    """How many lines of one kind came since the interval began."""

    __slots__ = ("held_back", "passed", "since")

    def __init__(self, now: float) -> None:
        self.since = now
        self.passed = 0
        self.held_back = 0
