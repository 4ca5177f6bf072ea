"""What clients ask for in vain is logged once, with the flag that helps."""

import logging

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Method
from relay.turn.hints import MOST
from tests.scenario import Scenario, request


@pytest.fixture
def hints(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "relay.turn")
    return caplog


def test_a_channel_number_of_rfc_5766(relay: Scenario, hints: pytest.LogCaptureFixture) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    for number in (0x5000, 0x7FFF):
        assert alice.tries_to_bind(number, ("198.51.100.7", 9000)).code == 400
    alice.tries_to_bind(0x3FFF, ("198.51.100.7", 9000))

    assert len(hints.messages) == 1
    assert "--channel-range rfc5766" in hints.messages[0]


def test_a_method_that_there_is_not(relay: Scenario, hints: pytest.LogCaptureFixture) -> None:
    alice = relay.client("192.0.2.10:5000")
    for method in (0x00A, 0x0FF, 0x00A):
        alice.hears(request(method).encode())

    assert len(hints.messages) == 2
    assert "0x00a (Connect, RFC 6062" in hints.messages[0]


def test_another_transport_than_udp(relay: Scenario, hints: pytest.LogCaptureFixture) -> None:
    alice = relay.client("192.0.2.10:5000")
    for _ in range(2):
        assert alice.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 6)).code == 442

    assert len(hints.messages) == 1


def test_nobody_fills_a_log_by_what_there_is_not(
    relay: Scenario, hints: pytest.LogCaptureFixture
) -> None:
    alice = relay.client("192.0.2.10:5000")
    for method in range(0x010, 0x100):
        alice.hears(request(method).encode())

    assert len(hints.messages) == MOST
