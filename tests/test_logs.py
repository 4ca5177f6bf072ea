"""Log levels, the two formats, and the brake on lines that repeat."""

import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import pytest

from relay.logs import BURST, INTERVAL, Brake, configure, parse_levels

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
    assert parse_levels(text) == levels


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
        parse_levels(text)

    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_each_logger_has_the_level_closest_to_it(logged: "Logged", log_format: str) -> None:
    configure(log_format, parse_levels("warning,test.logs=info,test.logs.deep=error"))

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


# --- For programs ----------------------------------------------------------------------------


def test_a_json_line_has_timestamp_level_logger_and_message(logged: "Logged") -> None:
    configure("json", EVERYTHING)

    logging.getLogger("test.logs").warning("peer refused: %s", "private")

    (record,) = logged.records()
    assert set(record) == {"timestamp", "level", "logger", "message"}
    datetime.fromisoformat(record["timestamp"])  # raises if it is no time
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

    (record,) = logged.records()
    assert record["message"] == f"user {text}"


def test_a_json_traceback_is_part_of_its_record(logged: "Logged") -> None:
    configure("json", EVERYTHING)

    logging.getLogger("test.logs").error("failed", exc_info=ValueError("two\nlines"))

    (record,) = logged.records()
    assert record["message"] == "failed"
    assert record["exc_info"].endswith("ValueError: two\nlines")


# --- The brake -------------------------------------------------------------------------------


def test_the_first_few_lines_of_a_kind_pass() -> None:
    braked = Braked()

    for n in range(BURST):
        braked.warns("peer refused: %s", n)
    assert braked.taken() == [f"peer refused: {n}" for n in range(BURST)]

    for n in range(100):
        braked.warns("peer refused: %s", n)
    assert braked.taken() == []


def test_after_the_interval_the_next_line_says_how_many_were_held_back() -> None:
    braked = Braked()
    for n in range(BURST + 3):
        braked.warns("peer refused: %s", n)
    braked.taken()

    braked.passes(INTERVAL)
    for n in range(BURST + 1):
        braked.warns("peer refused: %s", n)

    first, *others = braked.taken()
    assert first == "peer refused: 0 (3 more like this held back)"
    assert others == [f"peer refused: {n}" for n in range(1, BURST)]

    braked.passes(INTERVAL)
    braked.warns("peer refused: %s", "late")
    assert braked.taken() == ["peer refused: late (1 more like this held back)"]


def test_just_before_the_interval_is_over_lines_are_held_back() -> None:
    braked = Braked()
    for n in range(BURST):
        braked.warns("peer refused: %s", n)
    braked.taken()

    braked.passes(INTERVAL - 0.001)
    braked.warns("peer refused: %s", "early")
    assert braked.taken() == []


def test_nothing_is_reported_if_nothing_was_held_back() -> None:
    braked = Braked()
    for n in range(BURST):
        braked.warns("peer refused: %s", n)
    braked.taken()

    braked.passes(INTERVAL)
    braked.warns("peer refused: %s", "late")
    assert braked.taken() == ["peer refused: late"]


def test_a_slow_trickle_passes() -> None:
    braked = Braked()

    for n in range(20):
        braked.warns("peer refused: %s", n)
        braked.passes(INTERVAL / BURST)

    assert len(braked.taken()) == 20


@pytest.mark.parametrize(
    ("logger", "level", "template"),
    [
        pytest.param("other", WARNING, "peer refused: %s", id="logger"),
        pytest.param("test", ERROR, "peer refused: %s", id="level"),
        pytest.param("test", WARNING, "no port: %s", id="message"),
    ],
)
def test_each_kind_has_a_brake_of_its_own(logger: str, level: int, template: str) -> None:
    braked = Braked()
    for n in range(BURST + 7):
        braked.warns("peer refused: %s", n)
    braked.taken()

    braked.logs(logger, level, template, "first")
    assert braked.taken() == [template % "first"]

    braked.passes(INTERVAL)
    braked.logs(logger, level, template, "second")
    assert braked.taken() == [template % "second"]


@pytest.mark.parametrize("level", [INFO, WARNING, ERROR])
def test_every_level_but_debug_is_braked(level: int) -> None:
    braked = Braked()

    for n in range(BURST + 1):
        braked.logs("test", level, "line %s", n)

    assert len(braked.taken()) == BURST


def test_debug_is_never_braked() -> None:
    braked = Braked()

    for n in range(1000):
        braked.logs("test", DEBUG, "line %s", n)

    assert len(braked.taken()) == 1000


def test_the_report_takes_text_with_percent_signs_as_it_is() -> None:
    braked = Braked()
    for _ in range(BURST + 1):
        braked.warns("user %s", "100%s")
    braked.taken()

    braked.passes(INTERVAL)
    braked.warns("user %s", "100%s %d")
    assert braked.taken() == ["user 100%s %d (1 more like this held back)"]


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_the_log_is_braked(logged: "Logged", log_format: str) -> None:
    configure(log_format, EVERYTHING)

    for n in range(BURST * 3):
        logging.getLogger("test.logs").warning("peer refused: %s", n)

    assert len(logged.lines()) == BURST


# --- Helpers ---------------------------------------------------------------------------------


class Logged:
    """What went to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def lines(self) -> list[str]:
        """Return the lines, divided as a terminal does, not only at line feeds."""
        return self._capsys.readouterr().err.splitlines()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Logged]:
    """Leave logging as it was before, but for the loggers of these tests."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield Logged(capsys)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    for name in ["test.logs", "test.logs.deep"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


class Braked:
    """A brake with a clock that stands still, and what it let through."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._brake = Brake(lambda: self._now)
        self._taken: list[str] = []

    def passes(self, seconds: float) -> None:
        self._now += seconds

    def warns(self, template: str, argument: object) -> None:
        self.logs("test", WARNING, template, argument)

    def logs(self, logger: str, level: int, template: str, argument: object) -> None:
        record = logging.LogRecord(logger, level, __file__, 1, template, (argument,), None)
        if self._brake.filter(record):
            self._taken.append(record.getMessage())

    def taken(self) -> list[str]:
        """Return the lines that came through since the last time."""
        taken, self._taken = self._taken, []
        return taken
