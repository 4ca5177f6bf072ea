"""The state leaves as bytes and comes from them, and nobody outside notices. The format lasts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.turn.commands import Drop
from relay.turn.ratelimit import CLIENT_BURST
from relay.turn.records import (
    FORMAT,
    READABLE,
    Record,
    UnreadableState,
    require_readable,
)
from tests.scenario import Client, Peer, Scenario, channel_data, indicated, relayed, to
from tests.twin import TwinServer
from tests.written import decode, encode

NUMBER = 0x4001
HOUR = 3600


class Moving(Scenario):
    """A relay whose twin moves to another process."""

    def __init__(self, *, send_indications: bool = True) -> None:
        super().__init__(server=TwinServer, send_indications=send_indications)
        self.alice = self.client("192.0.2.10:5000", user="alice").allocates(lifetime=HOUR)
        self.bob = self.peer("198.51.100.7:9000")
        self.alice.binds(NUMBER, self.bob)

    @property
    def twin(self) -> TwinServer:
        assert isinstance(self.server, TwinServer)
        return self.server

    def begins_to_move(self) -> None:
        self.twin.begins_to_move(self.time.now)

    def moves(self) -> None:
        self.twin.moves(self.time.now)


# What happens while the state is copied. The twins are compared all the time.
MEANWHILE: dict[str, Callable[[Moving], object]] = {
    "nothing": lambda _: None,
    "refresh": lambda relay: relay.alice.refreshes(60),
    "end": lambda relay: relay.alice.refreshes(0),
    "end of the allocation's time": lambda relay: relay.passes(HOUR),
    "new channel": lambda relay: relay.alice.binds(NUMBER + 1, relay.peer("198.51.100.8:9000")),
    "channel refreshed": lambda relay: relay.alice.binds(NUMBER, relay.bob),
    "channel cooling": lambda relay: relay.passes(600),
    "channel gone": lambda relay: relay.passes(900),
    "channel forbidden": lambda relay: relay.changes_peers(deny=["198.51.100.0/24"]),
    "permission": lambda relay: relay.alice.permits(("198.51.100.9", 1)),
    "permission over": lambda relay: relay.passes(300),
    "new allocation": lambda relay: relay.client("192.0.2.11:5000").allocates(),
    "new one in its place": lambda relay: (
        relay.alice.refreshes(0),
        relay.alice.allocates(),
        relay.alice.binds(NUMBER, relay.peer("198.51.100.9:9000")),
    ),
    "one family less": lambda relay: (
        relay.client("192.0.2.12:5000")
        .allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
        .asks(Method.REFRESH, (Attr.LIFETIME, 0), (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV4)),
    ),
    "reservation": lambda relay: relay.client("192.0.2.13:5000").allocates((Attr.EVEN_PORT, 0x80)),
    "many requests": lambda relay: [relay.alice.refreshes(HOUR) for _ in range(100)],
}


@pytest.mark.parametrize("meanwhile", MEANWHILE.values(), ids=MEANWHILE)
def test_nobody_notices_what_happens_while_the_state_is_copied(
    meanwhile: Callable[[Moving], object],
) -> None:
    relay = Moving()
    relay.begins_to_move()
    meanwhile(relay)
    relay.moves()

    for _ in range(6):  # the twins say if they differ
        relay.alice.asks(Method.REFRESH, (Attr.LIFETIME, HOUR))
        relay.alice.tries_to_bind(NUMBER, relay.bob)
        relay.passes(150)
    relay.alice.asks(Method.REFRESH, (Attr.LIFETIME, 0))
    for seconds in (300, 300, 300, 60):
        relay.alice.tries_to_bind(NUMBER, relay.bob)
        relay.passes(seconds)


@pytest.mark.parametrize("send_indications", [True, False])
@pytest.mark.parametrize("meanwhile", MEANWHILE.values(), ids=MEANWHILE)
def test_nobody_notices_in_silence(
    meanwhile: Callable[[Moving], object], send_indications: bool
) -> None:
    relay = Moving(send_indications=send_indications)
    relay.begins_to_move()
    meanwhile(relay)
    relay.moves()

    for _ in range(16):
        relay.passes(300)
    assert relay.server.allocations == 0


def test_a_client_cannot_ask_for_more_after_a_move() -> None:
    relay = Moving()
    asks = relay.alice.signed(Method.REFRESH, (Attr.LIFETIME, HOUR))
    for _ in range(int(CLIENT_BURST)):
        relay.alice.sends(asks)
    relay.moves()
    relay.dropped()

    for _ in range(10):
        relay.alice.sends(asks)
    assert relay.dropped()[Drop.CLIENT_RATE.value] > 0


def test_all_together_cannot_ask_for_more_after_a_move() -> None:
    relay = Scenario(unauthenticated_rate=100)
    strangers = [relay.client(f"203.0.{number}.1:5000") for number in range(100)]
    binding = bytes.fromhex("000100002112a442") + bytes(12)
    for stranger in strangers:
        stranger.sends(binding)
    assert relay.dropped()[Drop.TOTAL_RATE.value] > 0
    relay.is_replaced()
    relay.sent()

    relay.client("203.1.0.1:5000").sends(binding)
    assert relay.sent() == []


def test_what_was_deleted_stays_so_for_a_duplicate() -> None:
    relay = Moving()
    carol = relay.client("192.0.2.20:5000")
    allocate = carol.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
    carol.sends(allocate)
    carol.refreshes(0)
    relay.moves()

    assert carol.hears(allocate).code == 437


def test_a_reserved_port_is_kept() -> None:
    relay = Moving()
    carol = relay.client("192.0.2.20:5000", user="carol")
    answer = carol.asks(
        Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), (Attr.EVEN_PORT, 0x80)
    )
    token = answer.get(Attr.RESERVATION_TOKEN)
    port = answer.get_all(Attr.XOR_RELAYED_ADDRESS)[0][1]
    relay.moves()

    other = relay.client("192.0.2.20:5001", user="carol")
    other.allocates((Attr.RESERVATION_TOKEN, token))
    assert other.relayed_address[1] == port + 1


def test_a_port_in_use_elsewhere_is_still_left_alone() -> None:
    relay = Scenario(ports=range(50000, 50003))
    relay.network.occupied |= {(Family.IPV4, 50000), (Family.IPV4, 50001)}
    alice, bob = relay.client("192.0.2.10:5000").allocates(), relay.client("192.0.2.11:5000")
    refused = bob.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
    assert refused.code == 508
    alice.refreshes(0)
    relay.network.tried.clear()
    relay.is_replaced()

    bob.allocates()
    assert relay.network.tried == [50002]


# --- Relaying goes on ------------------------------------------------------------------------


def test_channels_and_permissions_relay_on_both_ways() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    bob, carol = relay.peer("198.51.100.7:9000"), relay.peer("198.51.100.8:9000")
    alice.binds(NUMBER, bob).permits(carol)
    relay.is_replaced()

    alice.sends_data(NUMBER, b"ping")
    alice.indicates(carol, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping"), relayed(alice, carol, b"ping")]
    bob.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(NUMBER, b"pong"))]
    carol.sends(b"pong", to=alice.relayed_address)
    assert [one.payload for one in indicated(relay.sent())] == [b"pong"]


def test_what_is_permitted_relays_no_more_where_indications_are_off() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    carol = relay.peer("198.51.100.8:9000")
    alice.permits(carol)
    relay.changes_settings(send_indications=False)
    relay.is_replaced()

    alice.indicates(carol, b"ping")
    assert relay.sent() == []


def test_counters_go_on() -> None:
    relay = Moving()
    relay.client("192.0.2.30:5000").asks(Method.REFRESH)
    before = relay.server.responses
    relay.moves()
    relay.server.check()  # compares them

    assert before["refresh", "437"] == 1


def test_a_client_with_tls_is_not_written() -> None:
    relay = Scenario()
    tcp = relay.stream_client("192.0.2.10:5000")
    tls = relay.stream_client("192.0.2.10:5001", transport="tls")
    tcp.allocates()
    tls.allocates()

    assert relay.server.transfer.begin() == [tcp.address]
    tcp.refreshes()
    tls.refreshes()
    assert relay.server.transfer.take_changed() == [tcp.address]


def test_nothing_is_noted_before_and_after() -> None:
    relay = Scenario()
    transfer = relay.server.transfer
    alice = relay.client("192.0.2.10:5000").allocates()
    assert transfer.changed == 0
    transfer.begin()
    alice.refreshes()
    assert transfer.changed == 1
    transfer.end()
    alice.refreshes()
    assert transfer.changed == 0


# --- The format ------------------------------------------------------------------------------

RECORDED = Path(__file__).parent / "vectors" / "state-format-1.json"


def test_the_first_format_is_read() -> None:
    allocation, rest = decode(RECORDED.read_bytes())
    relay = Scenario()
    relay.datapath.ports.open(50000, (Family.IPV4,))
    relay.is_replaced_by(allocation, rest)
    alice = relay.client("192.0.2.10:5000", user="alice")
    alice.relayed_addresses = [("192.0.2.1", 50000)]

    alice.sends_data(0x4001, b"ping")
    assert relay.sent() == [relayed(alice, relay.peer("198.51.100.7:9000"), b"ping")]
    assert alice.refreshes(60).code is None
    relay.passes(60)
    assert relay.server.allocations == 0


def test_what_is_written_is_what_is_documented() -> None:
    recorded, rest = decode(RECORDED.read_bytes())
    relay = _with_alice()
    (client,) = relay.server.transfer.begin()
    written = relay.server.transfer.dump(client)

    assert written is not None
    assert written.keys() == recorded.keys()
    assert relay.server.transfer.dump_rest().keys() == rest.keys()
    assert _kinds(decode(encode([written]))) == _kinds([recorded])


def test_an_unknown_key_is_passed_over() -> None:
    relay = _with_alice()
    record = _record(relay)
    record["of a later version"] = {"what": "ever"}
    _into_another(record)


@pytest.mark.parametrize("number", [FORMAT + 1, 0, None, "1", [1]])
def test_another_format_is_refused_in_words(number: object) -> None:
    with pytest.raises(UnreadableState, match=r"format .*reads only"):
        require_readable(number)


def test_what_is_written_can_be_read() -> None:
    assert FORMAT in READABLE
    require_readable(FORMAT)


DAMAGES: dict[str, Callable[[Record], object]] = {
    "no client": lambda record: record.pop("client"),
    "client of another kind": lambda record: record.update(client=5),
    "port of another kind": lambda record: record.update(port="x"),
    "no family": lambda record: record.update(expires_at=[]),
    "unknown family": lambda record: record.update(expires_at=[[7, 5000.0]]),
    "unknown state": lambda record: record["channels"][0].__setitem__(4, "odd"),
    "channel cut short": lambda record: record["channels"][0].pop(),
    "odd bytes": lambda record: record.update(transaction_id="xyz"),
    "permissions of another kind": lambda record: record.update(permissions=[]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_refused_and_leaves_nothing(damage: Callable[[Record], object]) -> None:
    record = _record(_with_alice())
    damage(record)
    with pytest.raises(UnreadableState, match="an allocation: "):
        _into_another(record)


def test_a_damaged_rest_is_refused() -> None:
    with pytest.raises(UnreadableState, match="the state: KeyError"):
        Scenario().server.transfer.load_rest({})


def test_an_allocation_outside_the_ports_is_refused() -> None:
    with pytest.raises(UnreadableState, match=r"port \d+, which is none of the ports 60000-60009"):
        _into_another(_record(_with_alice()), ports=range(60000, 60010))


def test_an_allocation_of_a_family_that_is_gone_is_refused() -> None:
    relay = Scenario()
    relay.client("192.0.2.10:5000").allocates((Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    with pytest.raises(UnreadableState, match="IPV6, and no public address"):
        _into_another(_record(relay), families=[Family.IPV4])


def test_an_allocation_is_entered_once() -> None:
    relay = _with_alice()
    with pytest.raises(UnreadableState, match=r"is lent already"):
        relay.server.transfer.load(_record(relay))


def _with_alice() -> Scenario:
    relay = Scenario(ports=range(50000, 50001))
    alice: Client = relay.client("192.0.2.10:5000", user="alice").allocates()
    bob: Peer = relay.peer("198.51.100.7:9000")
    alice.binds(NUMBER, bob).permits(bob)
    return relay


def _record(relay: Scenario) -> Record:
    (client,) = relay.server.transfer.begin()
    record = relay.server.transfer.dump(client)
    assert record is not None
    return decode(encode([record]))[0]


def _into_another(record: Record, **settings: object) -> None:
    relay = Scenario(**settings)  # type: ignore[arg-type]
    try:
        relay.server.transfer.load(record)
    finally:
        if relay.server.allocations:
            (client,) = relay.server.transfer.begin()
            relay.server.transfer.evict(client)
        relay.server.check()


def _kinds(value: object) -> object:
    """Return what kinds of values there are, whatever they are."""
    match value:
        case dict():
            return {key: _kinds(each) for key, each in value.items()}
        case list():
            return [_kinds(each) for each in value]
        case int() | float():
            return "number" if not isinstance(value, bool) else "bool"
        case _:
            return type(value).__name__
