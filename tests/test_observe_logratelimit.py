"""The rate limit on log lines that repeat."""

import logging

import pytest

from relay.observe.logratelimit import BURST, BURST_OF_ALL, INTERVAL, MAX_KINDS, LogRateLimit

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


def test_the_first_few_lines_of_a_kind_pass() -> None:
    limited = Limited()

    for n in range(BURST):
        limited.warns("peer refused: %s", n)
    assert limited.taken() == [f"peer refused: {n}" for n in range(BURST)]

    for n in range(100):
        limited.warns("peer refused: %s", n)
    assert limited.taken() == []


def test_after_the_interval_the_next_line_says_how_many_were_held_back() -> None:
    limited = Limited()
    for n in range(BURST + 3):
        limited.warns("peer refused: %s", n)
    limited.taken()

    limited.passes(INTERVAL)
    for n in range(BURST + 1):
        limited.warns("peer refused: %s", n)

    first, *others = limited.taken()
    assert first == "peer refused: 0 (3 more like this held back)"
    assert others == [f"peer refused: {n}" for n in range(1, BURST)]

    limited.passes(INTERVAL)
    limited.warns("peer refused: %s", "late")
    assert limited.taken() == ["peer refused: late (1 more like this held back)"]


def test_just_before_the_interval_is_over_lines_are_held_back() -> None:
    limited = Limited()
    for n in range(BURST):
        limited.warns("peer refused: %s", n)
    limited.taken()

    limited.passes(INTERVAL - 0.001)
    limited.warns("peer refused: %s", "early")
    assert limited.taken() == []


def test_nothing_is_reported_if_nothing_was_held_back() -> None:
    limited = Limited()
    for n in range(BURST):
        limited.warns("peer refused: %s", n)
    limited.taken()

    limited.passes(INTERVAL)
    limited.warns("peer refused: %s", "late")
    assert limited.taken() == ["peer refused: late"]


def test_a_slow_trickle_passes() -> None:
    limited = Limited()

    for n in range(20):
        limited.warns("peer refused: %s", n)
        limited.passes(INTERVAL / BURST)

    assert len(limited.taken()) == 20


@pytest.mark.parametrize(
    ("logger", "level", "template"),
    [
        pytest.param("other", WARNING, "peer refused: %s", id="logger"),
        pytest.param("test", ERROR, "peer refused: %s", id="level"),
        pytest.param("test", WARNING, "no port: %s", id="message"),
    ],
)
def test_each_kind_has_a_limit_of_its_own(logger: str, level: int, template: str) -> None:
    limited = Limited()
    for n in range(BURST + 7):
        limited.warns("peer refused: %s", n)
    limited.taken()

    limited.logs(logger, level, template, "first")
    assert limited.taken() == [template % "first"]

    limited.passes(INTERVAL)
    limited.logs(logger, level, template, "second")
    assert limited.taken() == [template % "second"]


@pytest.mark.parametrize("level", [INFO, WARNING, ERROR])
def test_every_level_but_debug_is_limited(level: int) -> None:
    limited = Limited()

    for n in range(BURST + 1):
        limited.logs("test", level, "line %s", n)

    assert len(limited.taken()) == BURST


def test_debug_is_never_limited() -> None:
    limited = Limited()

    for n in range(1000):
        limited.logs("test", DEBUG, "line %s", n)

    assert len(limited.taken()) == 1000


def test_the_daemon_is_never_limited() -> None:
    """It answers signals, and whoever sends one waits for the answer."""
    limited = Limited()

    for n in range(100):
        limited.logs("relay.daemon", INFO, "reloaded %s", n)

    assert len(limited.taken()) == 100


def test_the_report_takes_text_with_percent_signs_as_it_is() -> None:
    limited = Limited()
    for _ in range(BURST + 1):
        limited.warns("user %s", "100%s")
    limited.taken()

    limited.passes(INTERVAL)
    limited.warns("user %s", "100%s %d")
    assert limited.taken() == ["user 100%s %d (1 more like this held back)"]


# --- Clients ---------------------------------------------------------------------------------


def test_each_client_has_a_share_of_its_own() -> None:
    limited = Limited()
    for n in range(BURST + 1):
        limited.warns("failed: %s", n, client="192.0.2.1")
    limited.taken()

    limited.warns("failed: %s", "first", client="192.0.2.2")
    assert limited.taken() == ["failed: first"]


def test_all_clients_together_have_a_share() -> None:
    limited = Limited()

    for n in range(BURST_OF_ALL * 2):
        limited.warns("failed: %s", n, client=f"192.0.2.{n}")

    assert len(limited.taken()) == BURST_OF_ALL


def test_what_was_held_back_is_said_whoever_it_was_about() -> None:
    limited = Limited()
    for n in range(BURST_OF_ALL):
        limited.warns("failed: %s", n, client=f"192.0.2.{n}")
    for n in range(3):
        limited.warns("failed: %s", n, client=f"198.51.100.{n}")
    limited.taken()

    limited.passes(INTERVAL)
    limited.warns("failed: %s", "late", client="192.0.2.1")
    limited.warns("failed: %s", "too", client="192.0.2.2")
    assert limited.taken() == ["failed: late (3 more like this held back)", "failed: too"]


def test_after_the_interval_every_client_has_its_share_again() -> None:
    limited = Limited()
    for interval in range(3):
        for n in range(BURST + 1):
            limited.warns("failed: %s", n, client="192.0.2.1")
        assert len(limited.taken()) == BURST, interval
        limited.passes(INTERVAL)


def test_a_flood_from_ever_new_clients_takes_no_memory() -> None:
    limited = Limited()
    for n in range(20_000):
        limited.warns("failed: %s", n, client=f"2001:db8::{n:x}")
        limited.passes(0.001)

    (kind,) = limited.limit._kinds.values()
    assert len(kind.passed_of) <= BURST_OF_ALL


def test_a_flood_of_ever_new_messages_takes_no_memory_and_is_limited() -> None:
    """As from a library that puts its text together before it logs it."""
    limited = Limited()
    for n in range(MAX_KINDS * 3):
        limited.warns(f"message {n}: %s", "hello")

    assert len(limited.limit._kinds) <= MAX_KINDS + 1
    assert len(limited.taken()) == MAX_KINDS + BURST


# --- Helpers ---------------------------------------------------------------------------------


class Limited:
    """A rate limit with a clock that stands still, and what it let through."""

    def __init__(self) -> None:
        self._now = 1000.0
        self.limit = LogRateLimit(lambda: self._now)
        self._taken: list[str] = []

    def passes(self, seconds: float) -> None:
        self._now += seconds

    def warns(self, template: str, argument: object, client: str | None = None) -> None:
        self.logs("test", WARNING, template, argument, client)

    def logs(
        self,
        logger: str,
        level: int,
        template: str,
        argument: object,
        client: str | None = None,
    ) -> None:
        record = logging.LogRecord(logger, level, __file__, 1, template, (argument,), None)
        if client is not None:
            record.client = client  # as extra={"client": client} does
        if self.limit.filter(record):
            self._taken.append(record.getMessage())

    def taken(self) -> list[str]:
        """Return the lines that came through since the last time."""
        taken, self._taken = self._taken, []
        return taken
