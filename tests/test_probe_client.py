"""The client's end of a 5-tuple: requests, credentials, and what comes in between."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.probe.client import (
    MOST_CHALLENGES,
    TIME_LIMIT,
    Answered,
    Client,
    Credential,
    Data,
    Event,
    NoAnswer,
    Pair,
    Signature,
    Stray,
)
from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.integrity import long_term_key, verify
from relay.stun.message import Message, Received, decode
from relay.turn.framing import NotFramed
from tests.scenario import channel_data

ALICE = Credential("alice", "word")
KEY = long_term_key("alice", "realm", "word")
UDP = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)
PEER = ("198.51.100.7", 9000)


def numbered() -> Callable[[int], bytes]:
    numbers = itertools.count(1)
    return lambda size: next(numbers).to_bytes(size)


@pytest.fixture
def client() -> Client:
    return Client(ALICE, numbered())


def sent(client: Client) -> Received:
    """Return the one message that is to be sent."""
    [datagram] = client.outgoing
    client.outgoing.clear()
    return decode(datagram)


def answers(
    client: Client,
    request: Received,
    *attributes: Pair,
    code: int | None = None,
    key: bytes | None = None,
    now: float = 0.0,
) -> None:
    """Let the server answer."""
    asked = request.message
    values: list[Pair] = [*attributes]
    if code is not None:
        values.append((Attr.ERROR_CODE, (code, "")))
    kind = Kind.SUCCESS if code is None else Kind.ERROR
    answer = Message(kind, asked.method, asked.transaction_id, values)
    client.handle_datagram(answer.encode(key), now)


def challenges(client: Client, code: int, nonce: bytes) -> None:
    realm = (Attr.REALM, "realm")
    answers(client, sent(client), realm, (Attr.NONCE, nonce), code=code)


def happened(client: Client) -> list[Event]:
    events = list(client.events)
    client.events.clear()
    return events


# --- Credentials ----------------------------------------------------------------------------


def test_a_request_is_signed_once_realm_and_nonce_are_known(client: Client) -> None:
    client.request(0.0, Method.ALLOCATE, UDP)
    first = sent(client)
    assert first.integrity_offset is None
    answers(client, first, (Attr.REALM, "realm"), (Attr.NONCE, b"one"), code=401)

    second = sent(client)
    assert second.message.transaction_id != first.message.transaction_id
    assert second.message.get(Attr.USERNAME) == "alice"
    assert (second.message.get(Attr.REALM), second.message.get(Attr.NONCE)) == ("realm", b"one")
    assert second.message.get(Attr.REQUESTED_TRANSPORT) == UDP_PROTOCOL
    assert second.integrity_offset is not None
    assert verify(second.raw, second.integrity_offset, KEY)
    assert not client.events


def test_the_caller_hears_of_the_last_answer_only(client: Client) -> None:
    name = client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"one")
    challenges(client, 438, b"two")
    request = sent(client)
    assert request.message.get(Attr.NONCE) == b"two"
    answers(client, request, (Attr.LIFETIME, 600), key=KEY)

    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert (answer.request, answer.code, answer.challenges) == (name, None, 2)
    assert answer.signature is Signature.GOOD
    assert client.next_timeout() is None


def test_what_comes_later_is_signed_at_once(client: Client) -> None:
    client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"one")
    answers(client, sent(client), key=KEY)
    client.request(0.0, Method.REFRESH)
    assert sent(client).integrity_offset is not None


def test_a_wrong_password_is_an_answer(client: Client) -> None:
    """A second 401 is no challenge. RFC 8489 §9.2.5."""
    client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"one")
    challenges(client, 401, b"two")
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert answer.code == 401
    assert not client.outgoing


def test_a_server_whose_nonces_are_always_stale_is_given_up(client: Client) -> None:
    client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"0")
    for number in range(1, MOST_CHALLENGES):
        challenges(client, 438, b"%d" % number)
        assert not client.events
    challenges(client, 438, b"last")
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert (answer.code, answer.challenges) == (438, MOST_CHALLENGES)


@pytest.mark.parametrize(
    "attributes", [(), ((Attr.NONCE, b"one"),), ((Attr.REALM, "realm"),)], ids=str
)
def test_a_challenge_without_nonce_or_realm_is_an_answer(
    client: Client, attributes: tuple[Pair, ...]
) -> None:
    client.request(0.0, Method.ALLOCATE, UDP)
    answers(client, sent(client), *attributes, code=401)
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert answer.code == 401


def test_without_a_credential_a_challenge_is_an_answer() -> None:
    client = Client(None, numbered())
    client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"one")
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert answer.code == 401


@pytest.mark.parametrize(
    ("key", "signature"),
    [(KEY, Signature.GOOD), (b"another", Signature.WRONG), (None, Signature.NONE)],
    ids=["right", "wrong", "none"],
)
def test_how_an_answer_is_signed(client: Client, key: bytes | None, signature: Signature) -> None:
    client.request(0.0, Method.ALLOCATE, UDP)
    challenges(client, 401, b"one")
    answers(client, sent(client), key=key)
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert answer.signature is signature


def test_an_answer_by_sha256_is_checked(client: Client) -> None:
    request = Message(Kind.REQUEST, Method.ALLOCATE, bytes(12), [UDP])
    client.transact(0.0, request.encode(KEY, sha256=True), KEY)
    client.outgoing.clear()
    answer = Message(Kind.SUCCESS, Method.ALLOCATE, bytes(12)).encode(KEY, sha256=True)
    client.handle_datagram(answer, 0.0)
    [event] = happened(client)
    assert isinstance(event, Answered)
    assert event.signature is Signature.GOOD


# --- Time -----------------------------------------------------------------------------------


def test_a_request_is_sent_again_after_half_a_second_then_twice_that(client: Client) -> None:
    """RFC 8489 §6.2.1."""
    name = client.request(0.0, Method.BINDING)
    first = client.outgoing.popleft()
    when = []
    while (timeout := client.next_timeout()) is not None:
        client.handle_timeout(timeout)
        when.append(timeout)
        assert list(client.outgoing) in ([first], [])
        client.outgoing.clear()
    assert when == [0.5, 1.5, 3.5, TIME_LIMIT]
    assert happened(client) == [NoAnswer(name, 4)]


def test_over_a_stream_nothing_is_sent_again() -> None:
    client = Client(None, numbered(), is_stream=True)
    name = client.request(0.0, Method.BINDING)
    client.outgoing.clear()
    assert client.next_timeout() == TIME_LIMIT
    client.handle_timeout(TIME_LIMIT)
    assert not client.outgoing
    assert happened(client) == [NoAnswer(name, 1)]


def test_round_trip_and_transmissions_of_an_answer(client: Client) -> None:
    client.request(10.0, Method.BINDING)
    request = sent(client)
    client.handle_timeout(10.5)
    client.outgoing.clear()
    answers(client, request, now=10.75)
    [answer] = happened(client)
    assert isinstance(answer, Answered)
    assert (answer.transmissions, answer.round_trip) == (2, 0.75)


def test_a_request_that_is_forgotten_has_no_answer(client: Client) -> None:
    name = client.request(0.0, Method.BINDING)
    request = sent(client)
    client.forget(name)
    assert client.next_timeout() is None
    answers(client, request)
    [stray] = happened(client)
    assert isinstance(stray, Stray)


# --- Data -----------------------------------------------------------------------------------


def test_data_on_a_channel_and_in_an_indication(client: Client) -> None:
    client.handle_datagram(channel_data(0x4001, b"on a channel"), 0.0)
    values: list[Pair] = [(Attr.XOR_PEER_ADDRESS, PEER), (Attr.DATA, b"in an indication")]
    client.handle_datagram(Message(Kind.INDICATION, Method.DATA, bytes(12), values).encode(), 0.0)
    assert happened(client) == [
        Data(b"on a channel", None, 0x4001),
        Data(b"in an indication", PEER, None),
    ]


@pytest.mark.parametrize(
    "datagram",
    [
        pytest.param(b"\x40\x01\0\x09half", id="ChannelData that is cut off"),
        pytest.param(b"hello", id="no STUN"),
        pytest.param(b"", id="nothing"),
        pytest.param(
            Message(Kind.INDICATION, Method.DATA, bytes(12)).encode(), id="Data without data"
        ),
        pytest.param(Message(Kind.REQUEST, Method.BINDING, bytes(12)).encode(), id="a request"),
        pytest.param(Message(Kind.SUCCESS, Method.BINDING, bytes(12)).encode(), id="unasked"),
    ],
)
def test_what_nobody_waits_for(client: Client, datagram: bytes) -> None:
    client.handle_datagram(datagram, 0.0)
    [stray] = happened(client)
    assert isinstance(stray, Stray)
    assert stray.data == datagram


def test_an_icmp_error_is_no_data(client: Client) -> None:
    """RFC 8656 §11.6."""
    values: list[Pair] = [(Attr.XOR_PEER_ADDRESS, PEER), (Attr.ICMP, (3, 3, 0))]
    client.handle_datagram(Message(Kind.INDICATION, Method.DATA, bytes(12), values).encode(), 0.0)
    assert not client.events


def test_what_is_sent_is_padded_in_a_stream_alone() -> None:
    for is_stream, padding in ((False, b""), (True, b"\0\0\0")):
        client = Client(None, numbered(), is_stream=is_stream)
        client.send_on(0x4001, b"hello")
        assert list(client.outgoing) == [channel_data(0x4001, b"hello") + padding]


def test_a_send_indication(client: Client) -> None:
    client.indicate(PEER, b"hello")
    message = sent(client).message
    assert (message.kind, message.method) == (Kind.INDICATION, Method.SEND)
    assert (message.get(Attr.XOR_PEER_ADDRESS), message.get(Attr.DATA)) == (PEER, b"hello")


@given(st.lists(st.binary(max_size=20), max_size=6), st.lists(st.integers(1, 30), max_size=20))
def test_a_stream_may_come_in_any_pieces(payloads: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(
        channel_data(0x4001, payload) + bytes(-len(payload) % 4) for payload in payloads
    )
    client = Client(None, numbered(), is_stream=True)
    for size in itertools.chain(sizes, itertools.repeat(7)):
        if not stream:
            break
        client.handle_stream(stream[:size], 0.0)
        stream = stream[size:]
    assert happened(client) == [Data(payload, None, 0x4001) for payload in payloads]


def test_a_stream_that_is_no_turn() -> None:
    client = Client(None, numbered(), is_stream=True)
    with pytest.raises(NotFramed):
        client.handle_stream(b"220 mail.example.org ESMTP\r\n", 0.0)


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing(datagram: bytes) -> None:
    client = Client(ALICE, numbered())
    client.request(0.0, Method.ALLOCATE, UDP)
    client.handle_datagram(datagram, 0.0)
