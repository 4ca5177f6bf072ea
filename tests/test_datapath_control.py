"""Whatever goes wrong when a port is opened, the next Allocate is served."""

import errno

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from tests.scenario import Scenario

BOTH = (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)


@pytest.mark.parametrize("families", [1, 2])
def test_a_bug_while_a_port_is_opened_costs_one_allocate(relay: Scenario, families: int) -> None:
    """The reactor reports it; no socket is left open, and no port is lost."""
    real = relay.network.open_socket
    calls = 0

    def open_socket(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == families:
            raise RuntimeError("a bug of ours")
        return real(*arguments)  # type: ignore[arg-type]

    relay.datapath.ports._open_socket = open_socket  # type: ignore[assignment]
    alice = relay.client("192.0.2.10:5000")
    request = alice.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), BOTH)
    with pytest.raises(RuntimeError):
        alice.sends(request)

    assert relay.network.sockets == {}
    relay.server.check()
    relay.datapath.control.on_timeout()
    alice.allocates(BOTH)


@pytest.mark.parametrize("error", [errno.EADDRINUSE, errno.EACCES])
def test_another_port_is_tried_for_what_only_concerns_this_one(relay: Scenario, error: int) -> None:
    real = relay.network.open_socket

    def open_socket(*arguments: object) -> object:
        if not relay.network.tried:
            relay.network.tried.append(0)
            raise OSError(error, "as the test wants it")
        return real(*arguments)  # type: ignore[arg-type]

    relay.datapath.ports._open_socket = open_socket  # type: ignore[assignment]
    relay.client("192.0.2.10:5000").allocates()

    assert len(relay.network.tried) == 2
