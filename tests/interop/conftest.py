"""The relay that other people's clients are pointed at."""

import signal
from collections.abc import Iterator

import pytest

from bench.loadlib.netns import Network
from tests.interop.loopback import running_relay
from tests.interop.network import relay_in, small_network
from tests.process import RelayProcess


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    """A relay with both families, as a process of its own."""
    with running_relay() as relay:
        yield relay


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Namespaces for clients and a relay."""
    with small_network() as network:
        yield network


@pytest.fixture(scope="module")
def relay_at_a_distance(network: Network) -> Iterator[RelayProcess]:
    """A relay in a namespace of its own, at RELAY_HOST. In the end it must have met no bug."""
    with relay_in(network) as relay:
        yield relay
        relay.process.send_signal(signal.SIGTERM)
        assert relay.wait() == 0
        assert "ERROR" not in relay.errors()
