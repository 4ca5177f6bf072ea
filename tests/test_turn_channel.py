"""ChannelBind, the life of a channel, and the data on it. RFC 8656 §12."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import Family, Method
from relay.turn.channeldata import RFC5766_NUMBERS
from tests.scenario import (
    LISTEN_PORT,
    PUBLIC_IP4,
    PUBLIC_IP6,
    Client,
    Peer,
    Scenario,
    channel_data,
    relayed,
    to,
)


def test_data_flows_both_ways(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)

    alice.sends_data(0x4001, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping")]
    bob.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4001, b"pong"))]


def test_the_answer_is_signed_and_empty(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    answer = alice.tries_to_bind(0x4001, relay.peer("198.51.100.7:9000"))

    assert answer.code is None
    assert answer.signed
    assert answer.attributes == {Attr.MESSAGE_INTEGRITY}


@pytest.mark.parametrize("client", ["192.0.2.10:5000", "[2001:db8::10]:5000"])
@pytest.mark.parametrize("peer", ["198.51.100.7:9000", "[2001:db8::7]:9000"])
def test_every_mix_of_families(relay: Scenario, client: str, peer: str) -> None:
    alice = relay.client(client).allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    bob = relay.peer(peer)
    alice.binds(0x4001, bob)

    alice.sends_data(0x4001, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping")]
    own = alice.relayed_addresses[peer.startswith("[")]
    bob.sends(b"pong", to=own)
    assert relay.sent() == [to(alice, channel_data(0x4001, b"pong"))]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 1200, 65507])
def test_any_size_is_relayed_unchanged_and_unpadded(relay: Scenario, size: int) -> None:
    alice, bob = linked(relay)
    payload = bytes(index % 251 for index in range(size))

    alice.sends_data(0x4000, payload)
    assert relay.sent() == [relayed(alice, bob, payload)]
    bob.sends(payload, to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4000, payload))]


@pytest.mark.parametrize("padding", [b"\0", b"\0\0\0", b"any amount, and any bytes"])
def test_padding_is_ignored(relay: Scenario, padding: bytes) -> None:
    alice, bob = linked(relay)
    alice.sends_data(0x4000, b"hi", padding)

    assert relay.sent() == [relayed(alice, bob, b"hi")]


def test_leftovers_of_an_earlier_datagram_are_never_relayed(relay: Scenario) -> None:
    """The buffer is shared: what is shorter than it claims must not borrow from before."""
    alice, _ = linked(relay)
    bob = relay.peer("198.51.100.8:9000")
    bob.sends(b"a secret of someone else" * 10, to=alice.relayed_address)

    alice.sends(b"\x40\x00\x00\x20short")
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_peer": 1, "malformed_channel_data": 1}


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        pytest.param([(Attr.CHANNEL_NUMBER, 0x4000)], 400, id="no peer"),
        pytest.param([(Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 1))], 400, id="no number"),
        pytest.param([], 400, id="neither"),
    ],
)
def test_number_and_peer_are_required(
    relay: Scenario, attributes: list[tuple[object, object]], code: int
) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.asks(Method.CHANNEL_BIND, *attributes).code == code  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "rfc8656", "rfc5766"),
    [
        (0x0000, 400, 400),
        (0x3FFF, 400, 400),
        (0x4000, None, None),
        (0x4FFF, None, None),
        (0x5000, 400, None),
        (0x7FFF, 400, None),
        (0x8000, 400, 400),
        (0xFFFF, 400, 400),
    ],
)
def test_channel_range(number: int, rfc8656: int | None, rfc5766: int | None) -> None:
    peer = ("198.51.100.7", 9000)
    strict = Scenario().client("192.0.2.10:5000").allocates()
    assert strict.tries_to_bind(number, peer).code == rfc8656

    relay = Scenario(channel_numbers=RFC5766_NUMBERS)
    wide = relay.client("192.0.2.10:5000").allocates()
    assert wide.tries_to_bind(number, peer).code == rfc5766
    if rfc5766 is None:
        wide.sends_data(number, b"hi")
        assert relay.sent() == [relayed(wide, relay.peer("198.51.100.7:9000"), b"hi")]


def test_without_an_allocation_it_is_a_mismatch(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.tries_to_bind(0x4000, ("198.51.100.7", 9000)).code == 437


def test_a_peer_of_a_family_that_is_not_allocated(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.client("192.0.2.11:5000").allocates((Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6))

    assert alice.tries_to_bind(0x4000, ("2001:db8::7", 9000)).code == 443
    assert bob.tries_to_bind(0x4000, ("198.51.100.7", 9000)).code == 443
    assert alice.tries_to_bind(0x4000, ("::1", 9000)).code == 443  # before it is checked


@pytest.mark.parametrize(
    "peer",
    [
        ("10.0.0.1", 9000),
        ("127.0.0.1", 9000),
        ("169.254.169.254", 80),
        ("198.51.100.7", 0),
        ("::1", 9000),
        ("::ffff:198.51.100.7", 9000),
        ("64:ff9b::a00:1", 9000),
        (PUBLIC_IP4, LISTEN_PORT),
        (PUBLIC_IP6, LISTEN_PORT),
    ],
    ids=str,
)
def test_forbidden_peers(relay: Scenario, peer: tuple[str, int]) -> None:
    alice = relay.client("192.0.2.10:5000").allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    answer = alice.tries_to_bind(0x4000, peer)

    assert (answer.code, answer.signed) == (403, True)
    alice.sends_data(0x4000, b"hi")
    assert relay.sent() == []


def test_a_refused_peer_is_logged_with_the_rule_and_the_flag(
    relay: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.tries_to_bind(0x4000, ("10.0.0.1", 9000))

    assert "10.0.0.0/8 is private; --allow-peer 10.0.0.0/8 would allow it" in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_refused_peers_are_counted_and_logged_once_a_minute_for_each_rule(
    relay: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    """ICE offers private addresses in every session."""
    caplog.set_level("INFO")
    alice = relay.client("192.0.2.10:5000").allocates()
    for number in range(100):
        alice.tries_to_bind(0x4000, ("10.0.0.1", 9000 + number))
    alice.tries_to_bind(0x4000, ("192.168.0.1", 9000))
    assert len(caplog.records) == 1
    alice.tries_to_bind(0x4000, ("127.0.0.1", 9000))
    assert len(caplog.records) == 2

    relay.passes(seconds=60)
    alice.tries_to_bind(0x4000, ("10.0.0.1", 9000))
    assert len(caplog.records) == 3
    assert "(private, 102 so far)" in caplog.text
    assert relay.server.refused_peers == {"private": 102, "loopback": 1}


def test_where_refusals_are_to_be_ignored_a_forbidden_peer_is_a_success_without_effect() -> None:
    """Firezone's client answers 403 by binding again for every datagram that it has."""
    relay = Scenario(ignores_refused_peers=True)
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.binds(0x4000, ("10.0.0.1", 9000))

    assert relay.server.refused_peers == {"private": 1}
    assert relay.server.channels == 0
    alice.sends_data(0x4000, b"to nobody")
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_channel": 1}
    alice.binds(0x4000, relay.peer("198.51.100.7:9000"))
    assert alice.tries_to_bind(0x4000, ("10.0.0.1", 9000)).code == 400, "the number is taken"


def test_an_allocation_may_have_so_many_channels() -> None:
    relay = Scenario(max_channels_per_allocation=2)
    alice = relay.client("192.0.2.10:5000").allocates(lifetime=3600)
    alice.binds(0x4000, ("198.51.100.7", 9000)).binds(0x4001, ("198.51.100.7", 9001))

    assert alice.tries_to_bind(0x4002, ("198.51.100.7", 9002)).code == 508
    alice.binds(0x4001, ("198.51.100.7", 9001))
    relay.client("192.0.2.11:5000").allocates().binds(0x4000, ("198.51.100.7", 9000))
    relay.passes(seconds=900)
    alice.binds(0x4002, ("198.51.100.7", 9002))


def test_operators_may_open_and_close_what_they_like() -> None:
    relay = Scenario(allow_peers=["10.0.0.0/8"], deny_peers=["8.8.8.0/24"])
    alice = relay.client("192.0.2.10:5000").allocates()

    assert alice.tries_to_bind(0x4000, ("10.0.0.1", 9000)).code is None
    assert alice.tries_to_bind(0x4001, ("8.8.8.8", 53)).code == 403
    assert alice.tries_to_bind(0x4002, ("8.8.4.4", 53)).code is None


def test_number_and_peer_belong_to_each_other(relay: Scenario) -> None:
    alice, bob = linked(relay)
    carol = relay.peer("198.51.100.8:9000")

    assert alice.tries_to_bind(0x4001, bob).code == 400
    assert alice.tries_to_bind(0x4000, carol).code == 400
    alice.binds(0x4001, carol)  # both are free
    alice.sends_data(0x4000, b"one")
    alice.sends_data(0x4001, b"two")
    assert relay.sent() == [relayed(alice, bob, b"one"), relayed(alice, carol, b"two")]


def test_peers_differ_by_their_port(relay: Scenario) -> None:
    alice, bob = linked(relay)
    elsewhere = relay.peer("198.51.100.7:9001")
    alice.binds(0x4001, elsewhere)

    bob.sends(b"one", to=alice.relayed_address)
    elsewhere.sends(b"two", to=alice.relayed_address)
    assert relay.sent() == [
        to(alice, channel_data(0x4000, b"one")),
        to(alice, channel_data(0x4001, b"two")),
    ]


def test_what_is_not_bound_is_dropped_and_counted(relay: Scenario) -> None:
    alice, _ = linked(relay)
    other = relay.client("192.0.2.66:5000")

    alice.sends_data(0x4001, b"another number")
    other.sends_data(0x4000, b"another client")
    relay.peer("198.51.100.8:9000").sends(b"another host", to=alice.relayed_address)
    assert relay.sent() == []
    assert relay.dropped() == {"unbound_channel": 2, "unbound_peer": 1}


def test_a_channel_is_bound_for_ten_minutes(relay: Scenario) -> None:
    alice, bob = linked(relay)

    relay.passes(seconds=599.5)
    bob.sends(b"in time", to=alice.relayed_address)
    alice.sends_data(0x4000, b"in time")
    assert relay.sent() == [
        to(alice, channel_data(0x4000, b"in time")),
        relayed(alice, bob, b"in time"),
    ]

    relay.passes(seconds=0.5)
    bob.sends(b"late", to=alice.relayed_address)
    alice.sends_data(0x4000, b"late")
    assert relay.sent() == []


def test_binding_again_keeps_it_bound(relay: Scenario) -> None:
    alice, bob = linked(relay)
    relay.passes(seconds=599)
    alice.binds(0x4000, bob)

    relay.passes(seconds=599)
    bob.sends(b"hi", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4000, b"hi"))]


def test_a_cooling_channel_is_still_reserved(relay: Scenario) -> None:
    alice, bob = linked(relay)
    carol = relay.peer("198.51.100.8:9000")

    relay.passes(seconds=600 + 299.5)
    assert alice.tries_to_bind(0x4000, carol).code == 400
    assert alice.tries_to_bind(0x4001, bob).code == 400

    relay.passes(seconds=0.5)
    alice.binds(0x4000, carol)
    alice.binds(0x4001, bob)


def test_a_cooling_channel_is_revived_in_both_directions(relay: Scenario) -> None:
    alice, bob = linked(relay)
    relay.passes(seconds=750)
    alice.binds(0x4000, bob)

    relay.passes(seconds=599)
    alice.sends_data(0x4000, b"ping")
    bob.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [relayed(alice, bob, b"ping"), to(alice, channel_data(0x4000, b"pong"))]
    relay.passes(seconds=1)
    alice.sends_data(0x4000, b"ping")
    assert relay.sent() == []


def test_a_cooling_channel_goes_with_its_allocation(relay: Scenario) -> None:
    alice, bob = linked(relay)
    relay.passes(seconds=700)
    alice.refreshes(lifetime=0)
    alice.allocates()

    alice.binds(0x4001, bob)  # another number, at once


def test_data_does_not_keep_a_channel(relay: Scenario) -> None:
    alice, bob = linked(relay)
    for _ in range(6):
        relay.passes(seconds=100)
        bob.sends(b"hi", to=alice.relayed_address)

    assert len(relay.sent()) == 5


def test_no_more_channels_than_memory_allows() -> None:
    relay = Scenario(max_channels=2)
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.binds(0x4000, ("198.51.100.7", 1)).binds(0x4001, ("198.51.100.7", 2))
    bob = relay.client("192.0.2.11:5000").allocates()
    assert bob.tries_to_bind(0x4000, ("198.51.100.7", 1)).code == 508
    alice.binds(0x4000, ("198.51.100.7", 1))  # not a new one

    alice.refreshes(lifetime=0)
    bob.binds(0x4000, ("198.51.100.7", 1))


class TestTwoClients:
    """Channels are per client, in both directions."""

    def test_same_number_for_different_peers(self, relay: Scenario) -> None:
        alice, bob = linked(relay, "192.0.2.10:5000", "198.51.100.7:9000")
        carol, dave = linked(relay, "192.0.2.11:5000", "198.51.100.8:9000")

        alice.sends_data(0x4000, b"from alice")
        carol.sends_data(0x4000, b"from carol")
        bob.sends(b"from bob", to=alice.relayed_address)
        dave.sends(b"from dave", to=carol.relayed_address)
        assert relay.sent() == [
            relayed(alice, bob, b"from alice"),
            relayed(carol, dave, b"from carol"),
            to(alice, channel_data(0x4000, b"from bob")),
            to(carol, channel_data(0x4000, b"from dave")),
        ]

    @pytest.mark.parametrize("number", [0x4000, 0x4001])
    def test_same_peer_for_both(self, relay: Scenario, number: int) -> None:
        """The relay port tells which of the two the peer means."""
        alice, bob = linked(relay, "192.0.2.10:5000")
        carol = relay.client("192.0.2.11:5000").allocates().binds(number, bob)

        bob.sends(b"to alice", to=alice.relayed_address)
        bob.sends(b"to carol", to=carol.relayed_address)
        assert relay.sent() == [
            to(alice, channel_data(0x4000, b"to alice")),
            to(carol, channel_data(number, b"to carol")),
        ]

    @pytest.mark.parametrize("number", [0x4000, 0x4001])
    @pytest.mark.parametrize("peer", ["198.51.100.7:9000", "198.51.100.8:9000"])
    @pytest.mark.parametrize("end", ["refresh", "expiry", "cooling"])
    def test_one_leaves_and_the_other_keeps_both_directions(
        self, relay: Scenario, number: int, peer: str, end: str
    ) -> None:
        alice, _ = linked(relay, "192.0.2.10:5000", "198.51.100.7:9000")
        relay.passes(seconds=10)
        other = relay.peer(peer)
        carol = relay.client("192.0.2.11:5000").allocates(lifetime=3600).binds(number, other)
        if end == "refresh":
            alice.refreshes(lifetime=0)
        elif end == "expiry":
            alice.refreshes(lifetime=1)
            relay.passes(seconds=1)
        else:
            relay.passes(seconds=590)

        alice.sends_data(0x4000, b"gone")
        carol.sends_data(number, b"ping")
        other.sends(b"pong", to=carol.relayed_address)
        assert relay.sent() == [
            relayed(carol, other, b"ping"),
            to(carol, channel_data(number, b"pong")),
        ]


class TestRelayToItself:
    """A peer that is a relayed address of this relay is reached inside the process."""

    def test_between_two_clients_of_this_relay(self, relay: Scenario) -> None:
        alice = relay.client("192.0.2.10:5000").allocates()
        bob = relay.client("192.0.2.11:5000").allocates()
        alice.binds(0x4001, bob.relayed_address)
        bob.binds(0x4002, alice.relayed_address)

        alice.sends_data(0x4001, b"ping", padding=b"??")
        bob.sends_data(0x4002, b"pong")
        assert relay.sent() == [
            to(bob, channel_data(0x4002, b"ping")),
            to(alice, channel_data(0x4001, b"pong")),
        ]

    def test_between_families_of_clients(self, relay: Scenario) -> None:
        wanted = (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6)
        alice = relay.client("192.0.2.10:5000").allocates(wanted)
        bob = relay.client("[2001:db8::11]:5000").allocates(wanted)
        alice.binds(0x4001, bob.relayed_address)
        bob.binds(0x4002, alice.relayed_address)

        alice.sends_data(0x4001, b"")
        assert relay.sent() == [to(bob, channel_data(0x4002, b""))]

    def test_to_oneself(self, relay: Scenario) -> None:
        alice = relay.client("192.0.2.10:5000").allocates()
        alice.binds(0x4001, alice.relayed_address)

        alice.sends_data(0x4001, b"echo")
        assert relay.sent() == [to(alice, channel_data(0x4001, b"echo"))]

    def test_the_other_end_must_have_bound_a_channel(self, relay: Scenario) -> None:
        alice = relay.client("192.0.2.10:5000").allocates()
        bob = relay.client("192.0.2.11:5000").allocates()
        alice.binds(0x4001, bob.relayed_address)

        alice.sends_data(0x4001, b"unwanted")
        assert relay.sent() == []
        assert relay.dropped() == {"unbound_peer": 1}

    def test_it_is_allowed_though_the_public_address_is_not_public(self) -> None:
        relay = Scenario(allow_peers=())
        alice = relay.client("192.0.2.10:5000").allocates()
        bob = relay.client("192.0.2.11:5000").allocates()
        free_port = next(p for p in range(49152, 65536) if p not in relay.network.opened)

        assert alice.tries_to_bind(0x4001, bob.relayed_address).code is None
        assert alice.tries_to_bind(0x4002, (PUBLIC_IP4, free_port)).code == 403
        assert alice.tries_to_bind(0x4003, (PUBLIC_IP4, LISTEN_PORT)).code == 403

    def test_what_was_allowed_as_our_own_never_leaves_the_relay(self) -> None:
        """When the other allocation ends, its port may become anyone's."""
        relay = Scenario(allow_peers=())
        alice = relay.client("192.0.2.10:5000").allocates()
        bob = relay.client("192.0.2.11:5000").allocates()
        alice.binds(0x4001, bob.relayed_address)
        bob.refreshes(lifetime=0)

        alice.sends_data(0x4001, b"hello?")
        assert relay.sent() == []
        assert relay.dropped() == {"peer_is_gone": 1}

    @pytest.mark.parametrize("port", [40000, 49152])  # outside and inside the range for allocations
    def test_what_is_allowed_anyway_leaves_when_it_is_not_ours(
        self, relay: Scenario, port: int
    ) -> None:
        alice = relay.client("192.0.2.10:5000").allocates()
        neighbour = relay.peer(f"{PUBLIC_IP4}:{port}")
        alice.binds(0x4001, neighbour)

        alice.sends_data(0x4001, b"hello")
        assert relay.sent() == [relayed(alice, neighbour, b"hello")]

    def test_the_family_counts(self, relay: Scenario) -> None:
        """The same port number in the family that was not allocated is not ours."""
        alice = relay.client("192.0.2.10:5000").allocates(
            (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6)
        )
        bob = relay.client("192.0.2.11:5000").allocates()
        elsewhere = relay.peer(f"[{PUBLIC_IP6}]:{bob.relayed_address[1]}")
        alice.binds(0x4001, elsewhere)

        alice.sends_data(0x4001, b"hello")
        assert relay.sent() == [relayed(alice, elsewhere, b"hello")]


def linked(
    relay: Scenario, client: str = "192.0.2.10:5000", peer: str = "198.51.100.7:9000"
) -> tuple[Client, Peer]:
    """A client with channel 0x4000 to a peer, on an allocation that outlives the test."""
    alice, bob = relay.client(client).allocates(lifetime=3600), relay.peer(peer)
    alice.binds(0x4000, bob)
    return alice, bob
