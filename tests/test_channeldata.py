"""The four-byte frame around relayed data. RFC 8656 §12.4, §12.5."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.turn.channeldata import HEADER, HEADER_SIZE, RFC5766_NUMBERS, RFC8656_NUMBERS, parse

FRAMES = [
    pytest.param(b"", None, id="empty"),
    pytest.param(b"\x40", None, id="one byte"),
    pytest.param(b"\x40\x01\x00", None, id="three bytes"),
    pytest.param(b"\x40\x01\x00\x00", (0x4001, 0), id="no payload"),
    pytest.param(b"\x40\x01\x00\x01", None, id="payload missing"),
    pytest.param(b"\x40\x01\x00\x03hi", None, id="payload truncated"),
    pytest.param(b"\x40\x01\x01\x00hi", None, id="length in the wrong order"),
    pytest.param(b"\x40\x01\x00\x02hi", (0x4001, 2), id="not padded"),
    pytest.param(b"\x40\x01\x00\x02hi\x00", (0x4001, 2), id="padded by 1"),
    pytest.param(b"\x40\x01\x00\x02hi\x00\x00", (0x4001, 2), id="padded to a multiple of 4"),
    pytest.param(b"\x40\x01\x00\x02hi" + bytes(1000), (0x4001, 2), id="padded by 1000"),
    pytest.param(b"\x40\x01\x00\x02hi\xff\xff", (0x4001, 2), id="padding is not zero"),
    pytest.param(b"\x40\x01\x00\x00\x00\x00\x00\x00", (0x4001, 0), id="nothing but padding"),
    pytest.param(b"\x40\x00\x00\x00", (0x4000, 0), id="first number"),
    pytest.param(b"\x4f\xff\x00\x00", (0x4FFF, 0), id="last number"),
    pytest.param(b"\x7f\xff\x00\x00", (0x7FFF, 0), id="last number of RFC 5766"),
    pytest.param(b"\x40\x01\xff\xdf" + bytes(65503), (0x4001, 65503), id="largest UDP datagram"),
    pytest.param(b"\x40\x01\xff\xff" + bytes(65535), (0x4001, 65535), id="greatest length"),
    pytest.param(b"\x40\x01\xff\xff" + bytes(65534), None, id="greatest length but one"),
]


@pytest.mark.parametrize(("datagram", "frame"), FRAMES)
def test_frames_are_read(datagram: bytes, frame: tuple[int, int] | None) -> None:
    assert parse(datagram, len(datagram)) == frame


@pytest.mark.parametrize(("datagram", "frame"), FRAMES)
def test_what_the_buffer_holds_behind_the_datagram_does_not_count(
    datagram: bytes, frame: tuple[int, int] | None
) -> None:
    """One buffer serves all datagrams, so it ends with what is left of longer ones."""
    buffer = bytearray(datagram + b"\x40\x01" * 40_000)

    assert parse(buffer, len(datagram)) == frame
    assert parse(memoryview(buffer), len(datagram)) == frame


@settings(deadline=None)
@given(st.sampled_from(RFC5766_NUMBERS), st.binary(), st.binary(max_size=8))
def test_framing_goes_round(number: int, payload: bytes, padding: bytes) -> None:
    datagram = HEADER.pack(number, len(payload)) + payload + padding

    assert parse(datagram, len(datagram)) == (number, len(payload))
    assert datagram[HEADER_SIZE : HEADER_SIZE + len(payload)] == payload


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_within_the_datagram_or_none(datagram: bytes) -> None:
    frame = parse(datagram, len(datagram))

    if frame is None:
        assert len(datagram) < 4 or int.from_bytes(datagram[2:4], "big") > len(datagram) - 4
    else:
        assert frame == (
            int.from_bytes(datagram[:2], "big"),
            int.from_bytes(datagram[2:4], "big"),
        )
        assert frame[1] <= len(datagram) - 4


@pytest.mark.parametrize(
    ("numbers", "first", "last"),
    [
        pytest.param(RFC8656_NUMBERS, 0x4000, 0x4FFF, id="RFC 8656 §12"),
        pytest.param(RFC5766_NUMBERS, 0x4000, 0x7FFF, id="RFC 5766 §11"),
    ],
)
def test_ranges_of_channel_numbers(numbers: range, first: int, last: int) -> None:
    assert (numbers[0], numbers[-1]) == (first, last)
    assert first in numbers
    assert last in numbers
    assert last + 1 not in numbers
