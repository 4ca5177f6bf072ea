"""Log levels, the two formats, and a reader of stderr that does not read."""

import errno
import fcntl
import json
import logging
import os
import re
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import pytest

from relay.config.parsing import log_levels
from relay.observe.logratelimit import BURST
from relay.observe.logs import LineHandler, configure, set_levels

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
EVERYTHING: Final = {"": DEBUG}


# --- Levels ----------------------------------------------------------------------------------


LEVELS = [
    pytest.param("debug", {"": DEBUG}, id="debug"),
    pytest.param("info", {"": INFO}, id="info"),
    pytest.param("warning", {"": WARNING}, id="warning"),
    pytest.param("error", {"": ERROR}, id="error"),
    pytest.param("Warning", {"": WARNING}, id="capitals"),
    pytest.param(" debug ", {"": DEBUG}, id="spaces"),
    pytest.param("info,relay.turn=debug", {"": INFO, "relay.turn": DEBUG}, id="one logger"),
    pytest.param("relay.turn=debug,error", {"": ERROR, "relay.turn": DEBUG}, id="any order"),
    pytest.param("relay.turn=debug", {"": INFO, "relay.turn": DEBUG}, id="info for the rest"),
    pytest.param(
        "error, relay.net.udp = info ,relay=DEBUG",
        {"": ERROR, "relay.net.udp": INFO, "relay": DEBUG},
        id="two loggers, spaces",
    ),
]


@pytest.mark.parametrize(("text", "levels"), LEVELS)
def test_levels_are_read(text: str, levels: dict[str, int]) -> None:
    assert log_levels(text) == levels


NO_LEVELS = [
    pytest.param("", "''", id="empty"),
    pytest.param("loud", "'loud'", id="unknown"),
    pytest.param("10", "'10'", id="number"),
    pytest.param("critical", "'critical'", id="not one of ours"),
    pytest.param("notset", "'notset'", id="not one of ours, and no level"),
    pytest.param("info,", "''", id="comma at the end"),
    pytest.param(",info", "''", id="comma at the beginning"),
    pytest.param("info relay=debug", "'info relay'", id="no comma"),
    pytest.param("relay.turn", "'relay.turn'", id="logger without level"),
    pytest.param("relay.turn=", "''", id="logger with empty level"),
    pytest.param("relay.turn=loud", "'loud'", id="logger with unknown level"),
    pytest.param("relay/turn=info", "'relay/turn'", id="no logger's name"),
    pytest.param("Relay=info", "'Relay'", id="logger in capitals"),
    pytest.param("a=b=info", "'a=b'", id="two equals signs"),
    pytest.param("info,relay\nturn=info", r"'relay\nturn'", id="logger of two lines"),
]


@pytest.mark.parametrize(("text", "named"), NO_LEVELS)
def test_what_is_no_level_is_refused_and_named(text: str, named: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the text is looked at below
        log_levels(text)

    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_each_logger_has_the_level_closest_to_it(logged: "Logged", log_format: str) -> None:
    configure(log_format, log_levels("warning,test.logs=info,test.logs.deep=error"))

    for name in ["test", "test.logs", "test.logs.deep", "test.logs.other"]:
        for level in [DEBUG, INFO, WARNING, ERROR]:
            logging.getLogger(name).log(level, "from %s", name)

    written = [re.search(r"from ([a-z.]+)", text) for text in logged.lines()]
    assert [match and match[1] for match in written] == [
        *["test"] * 2,
        *["test.logs"] * 3,
        *["test.logs.deep"] * 1,
        *["test.logs.other"] * 3,
    ]


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_other_levels_are_set_while_it_runs(logged: "Logged", log_format: str) -> None:
    """A logger that is not named any more is as its parent is."""
    configure(log_format, log_levels("info,test.logs=error,test.logs.deep=debug"))
    set_levels(log_levels("warning,test.logs.deep=info"))

    for name in ["test.logs", "test.logs.deep"]:
        for level in [DEBUG, INFO, WARNING, ERROR]:
            logging.getLogger(name).log(level, "from %s", name)

    written = [re.search(r"from ([a-z.]+)", text) for text in logged.lines()]
    assert [match and match[1] for match in written] == [
        *["test.logs"] * 2,
        *["test.logs.deep"] * 3,
    ]


# --- For people ------------------------------------------------------------------------------


def test_a_human_line_has_time_level_logger_and_message(logged: "Logged") -> None:
    configure("human", EVERYTHING)

    logging.getLogger("test.logs").warning("peer refused: %s", "private")

    (line,) = logged.lines()
    date, clock, rest = line.split(" ", 2)
    datetime.fromisoformat(f"{date} {clock}")  # raises if it is no time
    assert rest == "WARNING test.logs: peer refused: private"


CONTROLS = [
    pytest.param("\n", r"\n", id="line feed"),
    pytest.param("\r", r"\r", id="carriage return"),
    pytest.param("\t", r"\t", id="tab"),
    pytest.param("\v", r"\x0b", id="vertical tab"),
    pytest.param("\f", r"\x0c", id="form feed"),
    pytest.param("\0", r"\x00", id="null"),
    pytest.param("\b", r"\x08", id="backspace"),
    pytest.param("\x1b[2J", r"\x1b[2J", id="escape sequence"),
    pytest.param("\x7f", r"\x7f", id="delete"),
    pytest.param("\x85", r"\x85", id="next line"),
    pytest.param("\x9b2J", r"\x9b2J", id="escape sequence, 8 bits"),
]


@pytest.mark.parametrize("where", ["argument", "message", "logger"])
@pytest.mark.parametrize(("control", "written"), CONTROLS)
def test_control_characters_are_written_out(
    logged: "Logged", where: str, control: str, written: str
) -> None:
    configure("human", EVERYTHING)
    text = f"before{control}after"

    if where == "argument":
        logging.getLogger("test.logs").info("user %s", text)
    elif where == "message":
        logging.getLogger("test.logs").info(text)
    else:
        logging.getLogger(f"test.logs.{text}").info("hello")

    (line,) = logged.lines()
    assert f"before{written}after" in line


def test_text_from_outside_cannot_forge_a_line(logged: "Logged") -> None:
    configure("human", EVERYTHING)
    forged = "2026-01-01 00:00:00,000 ERROR   relay.turn: everything is lost"

    logging.getLogger("test.logs").info("user %s", f"alice\r\n{forged}")

    (line,) = logged.lines()
    assert not line.startswith(forged)


def test_an_exception_from_outside_cannot_forge_a_line(logged: "Logged") -> None:
    """A traceback takes several lines, but none that could be another record."""
    configure("human", EVERYTHING)
    forged = "2026-01-01 00:00:00,000 ERROR   relay.turn: everything is lost"

    logging.getLogger("test.logs").error("failed", exc_info=ValueError(f"alice\n{forged}\r\x1b"))

    first, *others = logged.lines()
    assert first.endswith("ERROR   test.logs: failed")
    assert any(forged in line for line in others)
    assert all(line.startswith(" ") and line.isprintable() for line in others)


def test_other_scripts_stay_readable(logged: "Logged") -> None:
    configure("human", EVERYTHING)

    logging.getLogger("test.logs").info("Zürich %s \\", "東京 🛰")

    (line,) = logged.lines()
    assert line.endswith("Zürich 東京 🛰 \\")


def test_a_traceback_is_logged(logged: "Logged") -> None:
    configure("human", EVERYTHING)

    try:
        [].pop()
    except IndexError:
        logging.getLogger("test.logs").exception("failed")

    lines = logged.lines()
    assert lines[0].endswith("ERROR   test.logs: failed")
    assert any("in test_a_traceback_is_logged" in line for line in lines)
    assert "IndexError: pop from empty list" in lines[-1]


COLOURS = [
    pytest.param({}, True, id="a terminal"),
    pytest.param({"TERM": "xterm"}, True, id="with a name"),
    pytest.param({"TERM": "dumb"}, False, id="that can do nothing"),
    pytest.param({"NO_COLOR": "1"}, False, id="no colours wanted"),
    pytest.param({"NO_COLOR": ""}, True, id="empty counts as unset"),
]


@pytest.mark.parametrize(("variables", "is_coloured"), COLOURS)
def test_the_level_is_coloured_on_a_terminal(
    stderr: "Stderr", terminal: "Terminal", variables: dict[str, str], is_coloured: bool
) -> None:
    stderr.becomes(terminal.slave, **variables)
    configure("human", EVERYTHING)

    logging.getLogger("test.logs").warning("hello \x1b[31m")

    line = terminal.reads_until(b"\n").decode()
    level = "\x1b[33mWARNING\x1b[0m" if is_coloured else "WARNING"
    assert re.fullmatch(rf"[-\d]+ [:,\d]+ {re.escape(level)} test.logs: hello \\x1b\[31m\r\n", line)


@pytest.mark.parametrize("level", [DEBUG, INFO, WARNING, ERROR])
def test_elsewhere_it_is_not_coloured(logged: "Logged", level: int) -> None:
    configure("human", EVERYTHING)

    logging.getLogger("test.logs").log(level, "hello")

    (line,) = logged.lines()
    assert line.isprintable()


# --- For the journal -------------------------------------------------------------------------


PRIORITIES = [
    pytest.param(DEBUG, "<7>DEBUG  ", id="debug"),
    pytest.param(INFO, "<6>INFO   ", id="info"),
    pytest.param(WARNING, "<4>WARNING", id="warning"),
    pytest.param(ERROR, "<3>ERROR  ", id="error"),
]


@pytest.mark.parametrize(("level", "prefix"), PRIORITIES)
def test_a_line_in_the_journal_has_a_priority_but_no_time(
    stderr: "Stderr", tmp_path: Path, level: int, prefix: str
) -> None:
    with stderr.becomes_journal(tmp_path / "log") as log:
        configure("human", EVERYTHING)
        logging.getLogger("test.logs").log(level, "hello")

    assert log.read_text() == f"{prefix} test.logs: hello\n"


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_every_line_in_the_journal_has_the_priority(
    stderr: "Stderr", tmp_path: Path, log_format: str
) -> None:
    with stderr.becomes_journal(tmp_path / "log") as log:
        configure(log_format, EVERYTHING)
        logging.getLogger("test.logs").error("failed", exc_info=ValueError("two\nlines"))

    lines = log.read_text().splitlines()
    assert len(lines) == (3 if log_format == "human" else 1)
    assert all(line.startswith("<3>") for line in lines)
    if log_format == "json":
        assert json.loads(lines[0].removeprefix("<3>"))["message"] == "failed"


def test_the_journal_of_somebody_else_is_not_ours(
    logged: "Logged", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is inherited, but stderr goes elsewhere."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    configure("human", EVERYTHING)

    logging.getLogger("test.logs").info("hello")

    (line,) = logged.lines()
    assert not line.startswith("<")


# --- For programs ----------------------------------------------------------------------------


def test_a_json_line_has_timestamp_level_logger_and_message(logged: "Logged") -> None:
    configure("json", EVERYTHING)

    logging.getLogger("test.logs").warning("peer refused: %s", "private")

    (record,) = logged.records()
    assert list(record) == ["timestamp", "level", "logger", "message"]
    time = datetime.fromisoformat(record["timestamp"])
    assert time.tzinfo is not None
    assert abs(datetime.now(UTC) - time) < timedelta(days=1)  # no other zone, no other epoch
    assert record["level"] == "WARNING"
    assert record["logger"] == "test.logs"
    assert record["message"] == "peer refused: private"


@pytest.mark.parametrize(("control", "_written"), CONTROLS)
def test_a_json_record_is_one_line_whatever_it_says(
    logged: "Logged", control: str, _written: str
) -> None:
    configure("json", EVERYTHING)
    text = f'before{control}after"}}'

    logging.getLogger("test.logs").info("user %s", text)

    (line,) = logged.lines()
    assert line.isprintable()
    assert json.loads(line)["message"] == f"user {text}"


def test_a_json_record_has_the_fields_that_it_was_given(logged: "Logged") -> None:
    configure("json", EVERYTHING)

    extra = {"client": "192.0.2.1", "reason": "wrong \n password"}
    logging.getLogger("test.logs").warning("failed", extra=extra)

    (record,) = logged.records()
    assert {name: record[name] for name in extra} == extra


def test_a_json_traceback_is_part_of_its_record(logged: "Logged") -> None:
    configure("json", EVERYTHING)

    logging.getLogger("test.logs").error("failed", exc_info=ValueError("two\nlines"))

    (record,) = logged.records()
    assert record["message"] == "failed"
    assert record["exc_info"].endswith("ValueError: two\nlines")


# --- Writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 5000, 100_000])
@pytest.mark.usefixtures("limited")
def test_nobody_reads_the_pipe(pipe: "Pipe", size: int) -> None:
    """What does not fit is dropped and counted; what began is ended."""
    log = logger_on(pipe.writes)
    lines = [f"{n:03}{'x' * size}" for n in range(100)]
    for line in lines * 50:
        log.info(line)

    seen = b""
    while b"again\n" not in seen:
        seen += pipe.reads()
        log.info("again")

    *kept, loss, _again = seen.decode().splitlines()
    assert kept
    assert kept == (lines * 50)[: len(kept)]
    match = re.fullmatch(r"(\d+) lines of the log are lost: they could not be written", loss)
    assert match
    assert int(match[1]) >= 50 * 100 - len(kept)


@pytest.mark.usefixtures("limited")
def test_somebody_else_writes_to_the_pipe_too() -> None:
    """And fills it whenever there is room, also just before we write."""
    with Pipe() as pipe:
        log = logger_on(pipe.writes)

        def fill() -> None:
            with suppress(BrokenPipeError):
                while True:
                    os.write(pipe.writes, b"x" * select.PIPE_BUF)

        other = threading.Thread(target=fill)
        other.start()
        for _ in range(20_000):
            pipe.reads()
            log.info("hello")
        pipe.nobody_reads()
        other.join()


@pytest.mark.usefixtures("limited")
def test_the_loss_is_said_once(pipe: "Pipe") -> None:
    log = logger_on(pipe.writes)
    os.write(pipe.writes, b"x" * select.PIPE_BUF)
    log.info("lost")
    log.info("lost")
    pipe.reads()

    log.info("hello")
    loss = "2 lines of the log are lost: they could not be written"
    assert pipe.reads().decode().splitlines() == [loss, "hello"]
    log.info("hello")
    assert pipe.reads().decode().splitlines() == ["hello"]


@pytest.mark.usefixtures("limited")
def test_a_reload_forgets_neither_the_rest_of_a_line_nor_the_loss(
    stderr: "Stderr", pipe: "Pipe"
) -> None:
    stderr.becomes(pipe.writes)
    configure("human", EVERYTHING)
    logging.getLogger("test.logs").info("x" * 5000)
    logging.getLogger("test.logs").info("lost")

    configure("json", EVERYTHING)
    seen = pipe.reads()
    for _ in range(3):
        logging.getLogger("test.logs").info("hello")
        seen += pipe.reads()

    cut, *others = seen.decode().splitlines()
    assert cut.endswith("x" * 5000)
    messages = [json.loads(text)["message"] for text in others]
    assert re.fullmatch("[12] lines of the log are lost: they could not be written", messages[0])
    assert set(messages[1:]) == {"hello"}


@pytest.mark.parametrize("size", [1, 2, 14, 64, 127, 128, 129, 256, 1000, 70_000])
@pytest.mark.usefixtures("limited")
def test_nobody_reads_the_terminal(terminal: "Terminal", size: int) -> None:
    """Neither if a line is just as long as what is left."""
    log = logger_on(terminal.slave)
    line = "x" * size
    count = 20_000 // size + 1000  # more than it takes
    for _ in range(count):
        log.info(line)

    seen = b""
    while b"again\r\n" not in seen:
        seen += terminal.reads()
        log.info("again")

    written = seen.decode().partition("again")[0].splitlines()
    lost = [int(text.split()[0]) for text in written if text.endswith(" could not be written")]
    kept = [text for text in written if not text.endswith(" could not be written")]
    assert set(kept) == {line}
    assert lost
    assert len(kept) + sum(lost) >= count


@pytest.mark.usefixtures("limited")
def test_the_terminal_is_stopped(terminal: "Terminal") -> None:
    log = logger_on(terminal.slave)
    with terminal.stopped():
        for _ in range(3):
            log.info("nobody sees this")
    log.info("again")

    assert terminal.reads_until(b"again\r\n").decode().splitlines() == [
        "3 lines of the log are lost: they could not be written",
        "again",
    ]


def test_the_terminal_is_gone(terminal: "Terminal", capfd: pytest.CaptureFixture[str]) -> None:
    log = logger_on(terminal.slave)
    terminal.hangs_up()

    log.info("hello")

    assert capfd.readouterr() == ("", "")


def test_the_pipe_is_closed(pipe: "Pipe", capfd: pytest.CaptureFixture[str]) -> None:
    log = logger_on(pipe.writes)
    pipe.nobody_reads()

    log.info("hello")
    log.info("hello")

    assert capfd.readouterr() == ("", "")


def test_the_disk_is_full(capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.write(full.fileno(), b"hello")
        log = logger_on(full.fileno())

        log.info("hello")
        log.info("hello")

    assert capfd.readouterr() == ("", "")


def test_stderr_is_closed_meanwhile(pipe: "Pipe", capfd: pytest.CaptureFixture[str]) -> None:
    log = logger_on(pipe.writes)
    os.close(pipe.takes_write_end())

    log.info("hello")

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("log_format", ["human", "json"])
@pytest.mark.parametrize("how", ["none", "closed"])
def test_stderr_was_never_open(
    logged: "Logged", monkeypatch: pytest.MonkeyPatch, log_format: str, how: str
) -> None:
    """Another descriptor may have its number by now: nothing is written to 2."""
    with closing(open(os.devnull, "w")) as stream:  # noqa: PTH123 - a device
        pass
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None if how == "none" else stream)
        configure(log_format, EVERYTHING)
        logging.getLogger("test.logs").error("hello")

    assert logged.lines() == []


def test_the_descriptor_stays_as_it_is_for_others(pipe: "Pipe") -> None:
    before = fcntl.fcntl(pipe.writes, fcntl.F_GETFL)
    logger_on(pipe.writes).info("hello")

    assert fcntl.fcntl(pipe.writes, fcntl.F_GETFL) == before
    assert not before & os.O_NONBLOCK


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_line_that_cannot_be_formatted_says_so(logged: "Logged", log_format: str) -> None:
    configure(log_format, EVERYTHING)

    logging.getLogger("test.logs").info("%d allocations", "three")

    (line,) = logged.lines()
    assert "%d allocations (cannot be formatted: TypeError(" in line


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_the_log_is_rate_limited(logged: "Logged", log_format: str) -> None:
    configure(log_format, EVERYTHING)

    for n in range(BURST * 3):
        logging.getLogger("test.logs").warning("peer refused: %s", n)

    assert len(logged.lines()) == BURST


# --- Helpers ---------------------------------------------------------------------------------


class Logged:
    """What went to stderr."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def lines(self) -> list[str]:
        """Return the lines, divided as a terminal does, not only at line feeds."""
        return self._capfd.readouterr().err.splitlines()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Iterator[Logged]:
    with logging_as_before():
        yield Logged(capfd)


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Leave logging as it was before, but for the loggers of these tests."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name in ["test.logs", "test.logs.deep"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


class Stderr:
    """Lets stderr be another descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def becomes(self, descriptor: int, **variables: str) -> None:
        stream = open(descriptor, "w", closefd=False)  # noqa: SIM115 - a descriptor
        self._monkeypatch.setattr(sys, "stderr", stream)
        for name in ["NO_COLOR", "TERM", "JOURNAL_STREAM"]:
            self._monkeypatch.delenv(name, raising=False)
        for name, text in variables.items():
            self._monkeypatch.setenv(name, text)

    @contextmanager
    def becomes_journal(self, path: Path) -> Iterator[Path]:
        """Let stderr be a file that is what JOURNAL_STREAM says the journal is."""
        with path.open("w") as stream:
            status = path.stat()
            self.becomes(stream.fileno(), JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
            yield path


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stderr]:
    with logging_as_before():
        yield Stderr(monkeypatch)


class Pipe:
    """A pipe as small as can be; with a name if there is a *path* for it."""

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._read_end, self.writes = os.pipe()
        else:
            os.mkfifo(path)
            self._read_end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self.writes = os.open(path, os.O_WRONLY)
            os.set_blocking(self._read_end, True)
        fcntl.fcntl(self.writes, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
        self._open = {self._read_end, self.writes}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def reads(self) -> bytes:
        return os.read(self._read_end, 1 << 20)

    def nobody_reads(self) -> None:
        self._open.remove(self._read_end)
        os.close(self._read_end)

    def takes_write_end(self) -> int:
        """Give the descriptor to who will close it."""
        self._open.remove(self.writes)
        return self.writes


@pytest.fixture(params=["anonymous", "named"])
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pipe]:
    with Pipe(tmp_path / "pipe" if request.param == "named" else None) as pipe:
        yield pipe


class Terminal:
    """A pseudoterminal: the relay has the slave, somebody looks at the master."""

    def __init__(self) -> None:
        self._master, self.slave = os.openpty()
        self._open = {self._master, self.slave}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)

    def reads(self) -> bytes:
        return os.read(self._master, 1 << 20)

    def reads_until(self, end: bytes) -> bytes:
        seen = b""
        while not seen.endswith(end):
            seen += self.reads()
        return seen

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the output, as Ctrl-S does."""
        termios.tcflow(self.slave, termios.TCOOFF)
        yield
        termios.tcflow(self.slave, termios.TCOON)

    def hangs_up(self) -> None:
        self._open.remove(self._master)
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


@pytest.fixture
def limited() -> Iterator[None]:
    """Fail what blocks, rather than wait for ever."""

    def fail(*_: object) -> None:
        raise AssertionError("it blocks")  # not TimeoutError, which is an OSError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def logger_on(descriptor: int) -> logging.Logger:
    """Return a logger that writes bare messages there, whatever their number."""
    logger = logging.Logger("test.logs")
    logger.addHandler(LineHandler(descriptor))
    return logger
