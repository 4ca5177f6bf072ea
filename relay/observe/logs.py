"""Logging to stderr: two formats, a level per logger, and nobody ever waits for the reader."""

import logging
import os
import select
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from pythonjsonlogger.json import JsonFormatter

from relay.observe.logratelimit import LogRateLimit
from relay.observe.recent import RECENT


def configure(log_format: str, levels: dict[str, int]) -> None:
    """Send the logs to stderr in that format, with those levels. A reload may call it again."""
    handler: logging.Handler
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed; None if it was so from the start
        # Not to 2 then, which may be any socket of ours by now.
        handler = logging.NullHandler()
    else:
        handler = _handler(descriptor)
        handler.setFormatter(_formatter(log_format, descriptor))
    logging.root.handlers[:] = [handler, RECENT]
    set_levels(levels)


def write(stream: TextIO | None, text: str) -> bool:
    """Write lines to *stream* if that takes no waiting; return whether it was done."""
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # closed
        descriptor = -1
    return descriptor >= 0 and LineHandler(descriptor).write_whole(text)


def set_levels(levels: dict[str, int]) -> None:
    """Give each logger its level; one without is as its parent is, whatever it was before."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name not in levels:
            logger.setLevel(logging.NOTSET)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _handler(descriptor: int) -> "LineHandler":
    """Return the handler that is there from before, which may have more to say, or a new one."""
    for handler in logging.root.handlers:
        if isinstance(handler, LineHandler) and handler.descriptor == descriptor:
            return handler
    new = LineHandler(descriptor)
    new.addFilter(LogRateLimit())
    return new


# --- Writing ---------------------------------------------------------------------------------

_TERMINAL_PIECE: Final = 128  # bytes
_CURRENT_POSITION: Final = -1
_RWF_NOWAIT: Final = 8  # <linux/fs.h>; Python has its name for reading only


class LineHandler(logging.Handler):
    """Writes lines to a descriptor, and drops them rather than wait for whoever reads it.

    What was dropped is counted, and said before the next line that can be written. A line is
    written to its end before another begins: the rest of one that was cut goes first. Errors
    (nobody has the pipe open, the disk is full) are a reason to drop as well; none is raised.

    The descriptor is left as it is: O_NONBLOCK would hold for every process that shares it. Of
    pipes and sockets, such as the journal's, each single write can be told not to wait
    (RWF_NOWAIT). Terminals, named pipes and most file systems know no such thing. For these each
    write is small enough not to wait once poll calls the descriptor writable, unless somebody
    else has written there in between. A pipe then has room for a page. A terminal may have as
    little as 256 bytes, or a line feed, which takes two: the kernel's n_tty.c, tty_buffer.c. A
    file is always writable, and takes as long as its disk.
    """

    def __init__(self, descriptor: int) -> None:
        """Write to *descriptor*, which somebody else closes."""
        super().__init__()
        self.descriptor = descriptor
        self._is_terminal = os.isatty(descriptor)
        self._knows_nowait = True
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._unwritten = b""
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, or count it as dropped. Called with the lock of the handler held."""
        self._write()
        if self._unwritten:
            self._dropped += 1
            return
        text = self._text(record)
        if self._dropped:
            text = self._text(_loss(self._dropped)) + text
        self._unwritten = text
        self._write()
        if self._unwritten == text:
            self._unwritten = b""
            self._dropped += 1
        else:
            self._dropped = 0

    def write_whole(self, text: str) -> bool:
        """Write *text* and a line feed at once; return whether all of it was taken."""
        self._unwritten = f"{text}\n".encode()
        self._write()
        return not self._unwritten

    def _text(self, record: logging.LogRecord) -> bytes:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - a bug in a line must not stop what it is about
            record.msg, record.args = f"{record.msg} (cannot be formatted: {error!r})", None
            line = self.format(record)
        return f"{line}\n".encode()

    def _write(self) -> None:
        """Write as much of what is unwritten as can be without waiting."""
        try:
            while self._unwritten and (written := self._write_piece()):
                self._unwritten = self._unwritten[written:]
        except OSError:
            pass  # what is left may be written later, or never

    def _write_piece(self) -> int:
        """Write as much as can be at once, and return how many bytes. Raises OSError."""
        piece = self._piece()
        if self._knows_nowait:
            try:
                return os.pwritev(self.descriptor, (piece,), _CURRENT_POSITION, _RWF_NOWAIT)
            except BlockingIOError:
                return 0
            except (OSError, NotImplementedError):  # whatever else is wrong, write() will say it
                self._knows_nowait = False
        return os.write(self.descriptor, piece) if self._is_writable() else 0

    def _piece(self) -> bytes:
        if not self._is_terminal:
            return self._unwritten[: select.PIPE_BUF]
        text, line_feed, _ = self._unwritten[:_TERMINAL_PIECE].partition(b"\n")
        return text or line_feed

    def _is_writable(self) -> bool:
        return any(events & select.POLLOUT for _, events in self._poll.poll(0))


def _loss(lines: int) -> logging.LogRecord:
    message = "%d lines of the log are lost: they could not be written"
    return logging.LogRecord(
        "relay.observe.logs", logging.WARNING, __file__, 0, message, (lines,), None
    )


# --- Formats ---------------------------------------------------------------------------------

_COLOURS: Final = {
    logging.DEBUG: "\x1b[2m",  # faint
    logging.INFO: "\x1b[32m",  # green
    logging.WARNING: "\x1b[33m",  # yellow
    logging.ERROR: "\x1b[31m",  # red
}


def _formatter(log_format: str, descriptor: int) -> logging.Formatter:
    is_journal = _is_journal(descriptor)
    formatter: logging.Formatter
    if log_format == "json":
        formatter = _JsonFormatter()
    else:
        formatter = _HumanFormatter(
            has_time=not is_journal,
            colours=_COLOURS if _wants_colours(descriptor) else {},
        )
    return _JournalFormatter(formatter) if is_journal else formatter


def _is_journal(descriptor: int) -> bool:
    """Tell if the descriptor is the journal's. systemd.exec(5), $JOURNAL_STREAM."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _wants_colours(descriptor: int) -> bool:
    """Tell if the descriptor is a terminal with colours. https://no-color.org."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return os.isatty(descriptor)


class _HumanFormatter(logging.Formatter):
    """One line a record, so that nothing from the wire can forge another one.

    A traceback takes more; its lines are indented.
    """

    def __init__(self, *, has_time: bool, colours: dict[int, str]) -> None:
        super().__init__()
        self._has_time = has_time
        self._colours = colours

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        time = f"{self.formatTime(record)} " if self._has_time else ""
        level = f"{record.levelname:<7}"
        if record.levelno in self._colours:
            level = f"{self._colours[record.levelno]}{level}\x1b[0m"
        return f"{time}{level} {_escaped(f'{record.name}: {record.message}')}"

    def formatException(self, ei: Any) -> str:  # noqa: N802, ANN401
        return self.formatStack(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return "\n".join(f"    {_escaped(line)}" for line in stack_info.split("\n"))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _JsonFormatter(JsonFormatter):
    """One object a record, in ASCII: timestamp, level, logger, message, then what is extra."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data["timestamp"] = datetime.fromtimestamp(record.created, UTC).isoformat(
            timespec="milliseconds"
        )
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        super().add_fields(log_data, record, message_dict)


_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _JournalFormatter(logging.Formatter):
    """Begins each line with its priority, which the journal takes off again. sd-daemon(3).

    JSON too: what a reader of the journal sees is JSON, and ``journalctl -p`` works.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 5)
        lines = self._formatter.format(record).split("\n")
        return "\n".join(f"<{priority}>{line}" for line in lines)
