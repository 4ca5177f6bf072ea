"""Where messages end in a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.stun.const import Kind, Method
from relay.stun.message import Message
from relay.turn.channeldata import HEADER
from relay.turn.framing import PADDING, NotFramed, message_size

BINDING = Message(Kind.REQUEST, Method.BINDING, bytes(12)).encode()


def channel_data(size: int) -> bytes:
    return HEADER.pack(0x4001, size) + bytes(size) + PADDING[size % 4]


@pytest.mark.parametrize(
    ("stream", "size"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"\x40\x01\x00", 0, id="not even a length"),
        pytest.param(b"\x40\x01\x00\x00", 4, id="no payload"),
        pytest.param(b"\x40\x01\x00\x01", 8, id="three bytes of padding"),
        pytest.param(b"\x40\x01\x00\x04", 8, id="no padding"),
        pytest.param(b"\x40\x01\x00\x05", 12, id="padding up to the next multiple of four"),
        pytest.param(b"\x7f\xff\xff\xff", 4 + 65536, id="the longest ChannelData"),
        pytest.param(BINDING, len(BINDING), id="STUN"),
        pytest.param(BINDING[:4], len(BINDING), id="STUN of which only the length has come"),
        pytest.param(BINDING[:19], len(BINDING), id="STUN without the end of its header"),
        pytest.param(BINDING + b"more", len(BINDING), id="STUN and what follows"),
    ],
)
def test_a_message_says_how_long_it_is(stream: bytes, size: int) -> None:
    assert message_size(stream, 0, len(stream)) == size


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"\x80\x00\x00\x00", id="first bits 10"),
        pytest.param(b"\xff\x00\x00\x00", id="first bits 11"),
        pytest.param(b"\x16\x03\x01\x02", id="a hello of TLS, of 258 bytes if it were STUN"),
        pytest.param(b"\x00\x01\x00\x02", id="STUN of an odd length"),
        pytest.param(b"\x00\x01\x00\x00" + bytes(16), id="STUN without the cookie"),
    ],
)
def test_what_is_neither_has_no_end(stream: bytes) -> None:
    with pytest.raises(NotFramed):
        message_size(stream, 0, len(stream))


@given(st.lists(st.one_of(st.just(BINDING), st.integers(0, 70).map(channel_data))))
def test_messages_follow_each_other(messages: list[bytes]) -> None:
    stream, at, found = b"".join(messages), 0, []
    while size := message_size(stream, at, len(stream)):
        found.append(stream[at : at + size])
        at += size
    assert found == messages


@given(st.binary(max_size=40), st.integers(0, 8))
def test_any_bytes_are_a_message_or_none(stream: bytes, at: int) -> None:
    try:
        size = message_size(stream, at, len(stream))
    except NotFramed:
        return
    assert size % 4 == 0
    assert size == 0 or size >= 4
