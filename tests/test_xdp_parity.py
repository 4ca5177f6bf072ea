"""The program in the kernel relays what the sockets would relay in channels, and nothing else.

Clients, peers and time do anything; each datagram is given to both. The routes of the program come
from the server's own commands.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from relay.stun.address import Address
from relay.stun.attributes import Attr
from relay.stun.const import Family
from relay.turn.commands import PeerAddress
from tests import xdpbed
from tests.frames import Datagram
from tests.scenario import (
    LISTEN_PORT,
    PUBLIC_IP4,
    PUBLIC_IP6,
    Scenario,
    ToClient,
    ToPeer,
    channel_data,
)
from tests.xdpbed import CLIENTS, PEERS, VERDICTS, Bed, family

HOSTS = {Family.IPV4: PUBLIC_IP4, Family.IPV6: PUBLIC_IP6}
NUMBERS = (0x4000, 0x4001, 0x4FFF)
LARGEST = 1380  # of a payload that fits into any frame
MOST_PADDING = 3  # with more of it, the sockets have to look


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    xdpbed.needs_bpf()
    with xdpbed.network(), Bed(listening=HOSTS, relayed=HOSTS) as bed:
        yield bed


families = st.sampled_from(Family)
numbers = st.sampled_from(NUMBERS)
whichever = st.sampled_from((*Family, "other", "itself"))
octets = st.integers(0, 255)
payloads = st.one_of(
    st.binary(max_size=40),
    st.integers(0, LARGEST).map(lambda size: b"\x40" * size),
    st.builds(lambda number, rest: number.to_bytes(2) + rest, numbers, st.binary(max_size=8)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocates"), families),
        st.tuples(st.just("binds"), families, numbers, whichever),
        st.tuples(st.just("binds"), families, numbers, whichever),
        st.tuples(st.just("ends"), families),
        st.tuples(st.just("passes"), st.sampled_from((1, 299, 300, 600))),
        st.tuples(st.just("sends_data"), families, numbers, payloads, st.integers(0, 5), octets),
        st.tuples(st.just("sends_data"), families, numbers, payloads, st.integers(0, 5), octets),
        st.tuples(st.just("sends"), families, payloads, octets),
        st.tuples(st.just("hears_from_peer"), families, families, payloads, octets),
    ),
    max_size=30,
)


@settings(max_examples=200)
@given(steps=steps)
def test_the_kernel_relays_what_the_sockets_relay(bed: Bed, steps: list[tuple[Any, ...]]) -> None:
    both = Both(bed)
    try:
        for of in Family:
            both.allocates(of)
            both.binds(of, NUMBERS[0], of)
        for name, *arguments in steps:
            getattr(both, name)(*arguments)
    finally:
        both.passes(4000)
    assert len(bed.routes) == 0


class Both:
    """The server with two clients, whose routes are in the kernel, too."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._relay = Scenario()
        self._relay.datapath.routes.watchers.append(bed.routes)
        self._clients = {
            of: self._relay.client(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            for of, (host, port) in CLIENTS.items()
        }

    def allocates(self, of: Family) -> None:
        """In both families, unless it has an allocation."""
        client = self._clients[of]
        if not client.relayed_addresses:
            client.allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6), lifetime=3600)

    def binds(self, of: Family, number: int, which: Family | str) -> None:
        """Bind a peer outside, or an allocation of this relay. It may be refused."""
        peer = self._peer(of, which)
        if peer is not None:
            self._clients[of].tries_to_bind(number, peer)

    def ends(self, of: Family) -> None:
        self._clients[of].refreshes(lifetime=0)
        self._clients[of].relayed_addresses = []

    def passes(self, seconds: float) -> None:
        self._relay.passes(seconds)
        for client in self._clients.values():
            if self._relay.server.allocations == 0:
                client.relayed_addresses = []

    def sends_data(self, of: Family, number: int, payload: bytes, padding: int, tos: int) -> None:
        datagram = channel_data(number, payload) + b"\xa5" * padding
        self._from_client(of, datagram, tos, is_plain=padding <= MOST_PADDING)

    def sends(self, of: Family, datagram: bytes, tos: int) -> None:
        """Anything, such as ChannelData with a wrong length."""
        length = int.from_bytes(datagram[2:4])
        is_plain = 0 <= len(datagram) - 4 - length <= MOST_PADDING
        self._from_client(of, datagram, tos, is_plain=is_plain)

    def hears_from_peer(self, of: Family, which: Family, payload: bytes, tos: int) -> None:
        relayed = [
            address
            for address in self._clients[of].relayed_addresses
            if family(address[0]) is which
        ]
        if relayed:
            peer = PeerAddress(PEERS[which])
            self._compare(
                Datagram(source=peer, to=relayed[0], payload=payload, tos=tos),
                lambda: self._relay.receives_from_peer(payload, peer, relayed[0], tos),
                is_plain=True,
            )

    def _peer(self, of: Family, which: Family | str) -> Address | None:
        if isinstance(which, Family):
            return PEERS[which]
        others = [
            client for one, client in self._clients.items() if (one is of) == (which == "itself")
        ]
        return others[0].relayed_addresses[0] if others[0].relayed_addresses else None

    def _from_client(self, of: Family, datagram: bytes, tos: int, *, is_plain: bool) -> None:
        client = self._clients[of]
        self._compare(
            Datagram(
                source=client.host_and_port, to=(HOSTS[of], LISTEN_PORT), payload=datagram, tos=tos
            ),
            lambda: self._relay.receives_from_client(datagram, client.address, tos),
            is_plain=is_plain,
        )

    def _compare(
        self, datagram: Datagram, give_to_sockets: Callable[[], None], *, is_plain: bool
    ) -> None:
        """Give a datagram to both. What is plain, the kernel relays if the sockets do.

        But whether an allocation of this relay is gone, and what then, they alone know.
        """
        network = self._relay.network
        network.sent, network.tos = [], []
        give_to_sockets()
        in_channels = [sent for sent in network.sent if is_in_channel(sent)]
        frame = datagram.frame()
        verdict, left, _ = self._bed.program.run(frame)
        if VERDICTS[verdict] == "pass":
            event("handed up")
            assert left == frame
            assert not is_plain or all(is_to_this_relay(sent) for sent in in_channels)
            return
        (expected,) = in_channels
        event(type(expected).__name__)
        relayed = Datagram.of(left)
        assert relayed.ttl == datagram.ttl - 1
        assert [relayed.tos] == network.tos
        if isinstance(expected, ToPeer):
            assert relayed.source == (HOSTS[family(expected.peer[0])], expected.port)
            assert (relayed.to, relayed.payload) == (expected.peer, expected.payload)
        else:
            host, port = expected.client[0][:2]
            assert relayed.source == (HOSTS[family(host)], LISTEN_PORT)
            assert (relayed.to, relayed.payload) == ((host, port), expected.datagram)


def is_in_channel(sent: ToClient | ToPeer) -> bool:
    """Tell if it was relayed in a channel, and is no answer and no Data indication."""
    return isinstance(sent, ToPeer) or 0x40 <= sent.datagram[0] <= 0x7F


def is_to_this_relay(sent: ToClient | ToPeer) -> bool:
    return isinstance(sent, ToPeer) and sent.peer[0] in HOSTS.values()
