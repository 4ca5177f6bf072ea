"""Whatever arrives: nothing breaks, and the next client is served.

Under hostile bytes the state must stay sound (the scenario checks it after each datagram)
and a normal Allocate right after must succeed.
"""

from hypothesis import given
from hypothesis import strategies as st

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.stun.integrity import integrity
from relay.turn.channeldata import RFC5766_NUMBERS
from tests.scenario import Client, Scenario, channel_data, request, send_indication


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes(datagrams: list[bytes]) -> None:
    relay, mallory = attacked()
    for datagram in datagrams:
        mallory.sends(datagram)

    is_unharmed(relay)


@given(st.integers(0, 3), st.binary(min_size=3, max_size=3), st.binary(max_size=300))
def test_any_body_behind_a_stun_header(first: int, rest: bytes, body: bytes) -> None:
    relay, mallory = attacked()
    mallory.sends(bytes((first,)) + rest + b"\x21\x12\xa4\x42" + b"twelve bytes" + body)
    sound_length = len(body).to_bytes(2, "big")
    mallory.sends(bytes((first, *rest[:1])) + sound_length + b"\x21\x12\xa4\x42" + rest * 4 + body)

    is_unharmed(relay)


@given(st.data())
def test_truncated_anywhere(data: st.DataObject) -> None:
    relay, mallory = attacked()
    whole = data.draw(st.sampled_from(valid_datagrams(mallory)))
    mallory.sends(whole[: data.draw(st.integers(0, len(whole)))])

    is_unharmed(relay)


@given(st.data())
def test_any_bits_flipped(data: st.DataObject) -> None:
    relay, mallory = attacked()
    damaged = bytearray(data.draw(st.sampled_from(valid_datagrams(mallory))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    mallory.sends(bytes(damaged))

    is_unharmed(relay)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=24)), max_size=12))
def test_any_attributes_signed_by_a_user(attributes: list[tuple[int, bytes]]) -> None:
    """An authenticated client that asks for nonsense."""
    relay, mallory = attacked()
    for method in (*Method, 0x0AA):
        body = b"".join(
            kind.to_bytes(2, "big") + len(v).to_bytes(2, "big") + v + bytes(-len(v) % 4)
            for kind, v in attributes
        )
        signed = mallory.signed(method)
        end = len(signed) - 24  # before MESSAGE-INTEGRITY
        unsigned = signed[:20] + body + signed[20:end]
        mallory.sends(resigned(unsigned, mallory.key))

    is_unharmed(relay)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40)), max_size=12))
def test_any_attributes_in_a_send_indication(attributes: list[tuple[int, bytes]]) -> None:
    relay, mallory = attacked()
    body = b"".join(
        kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)
        for kind, value in [(0x0013, b"data"), *attributes]
    )
    mallory.sends(
        b"\x00\x16" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + bytes(12) + body
    )

    is_unharmed(relay)


@given(st.binary(max_size=100), st.integers(0, 65535))
def test_any_peer(payload: bytes, port: int) -> None:
    relay, mallory = attacked()
    relay.peer(f"198.51.100.7:{port}").sends(payload, to=mallory.relayed_address)

    is_unharmed(relay)


def attacked() -> tuple[Scenario, Client]:
    """A relay, and a hostile client with an allocation, a channel and permissions."""
    relay = Scenario(channel_numbers=RFC5766_NUMBERS)
    mallory = relay.client("192.0.2.66:6000")
    mallory.allocates((Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))
    mallory.permits(("2001:db8::66", 1))
    mallory.binds(0x4000, ("198.51.100.66", 6000))
    return relay, mallory


def is_unharmed(relay: Scenario) -> None:
    """Serve a client from Allocate to data, and check every table."""
    relay.sent()
    alice, bob = relay.client("192.0.2.10:5000"), relay.peer("198.51.100.7:9000")
    alice.allocates().binds(0x4000, bob)
    alice.sends_data(0x4000, b"ping")
    bob.sends(b"pong", to=alice.relayed_address)
    assert len(relay.sent()) == 2
    relay.server.check()


def valid_datagrams(client: Client) -> list[bytes]:
    return [
        request(Method.BINDING).encode(),
        request(Method.BINDING).encode(fingerprinted=True),
        request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).encode(),
        client.signed(Method.ALLOCATE, (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)),
        client.signed(Method.REFRESH, (Attr.LIFETIME, 600)),
        client.signed(
            Method.CHANNEL_BIND,
            (Attr.CHANNEL_NUMBER, 0x4001),
            (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000)),
        ),
        channel_data(0x4000, b"some payload"),
        client.signed(Method.CREATE_PERMISSION, (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 0))),
        client.signed(
            Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), (Attr.EVEN_PORT, 0x80)
        ),
        send_indication(("198.51.100.66", 6001), b"some payload"),
        send_indication(("2001:db8::66", 6001), b"some payload", (Attr.DONT_FRAGMENT, b"")),
    ]


def resigned(unsigned: bytes, key: bytes) -> bytes:
    length = (len(unsigned) + 4).to_bytes(2, "big")
    signature = b"\x00\x08\x00\x14" + integrity(unsigned, key)
    return unsigned[:2] + length + unsigned[4:] + signature
