"""Data on channels. RFC 8656 §12."""

from typing import Final

from relay.probe.lab import (
    Allocation,
    Broken,
    Lab,
    Seen,
    expect_code,
    expect_signed,
    expect_success,
    other_family,
    somebody,
)
from relay.probe.rules.rule import STREAM, UDP, Rules
from relay.stun.address import family_of
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Method
from relay.turn import channeldata

rules = Rules()

NUMBER: Final = 0x4001
OTHER_NUMBER: Final = 0x4002
BELOW: Final = 0x3FFF
RESERVED: Final = 0x5000  # until RFC 8656 it could be a channel
ABOVE: Final = 0x8000
LARGE: Final = 1200


@rules("RFC 8656 §12.2", "ChannelBind succeeds, and its answer is signed")
def bind(lab: Lab) -> None:
    allocation = lab.allocation()
    answer = allocation.bind(NUMBER, lab.peer().address)
    expect_success(answer)
    expect_signed(answer)


@rules("RFC 8656 §12.6", "ChannelData reaches the peer, from the relayed address")
def send(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    source = lab.reaches_peer(seen, b"hello", lambda: allocation.link.send_on(NUMBER, b"hello"))
    if source != allocation.relayed:
        raise Broken(f"from {source}, not from {allocation.relayed}")


@rules("RFC 8656 §12.7", "what the peer of a channel sends comes as ChannelData")
def receive(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    heard = lab.hears(allocation, seen, b"hello")
    if heard.channel != NUMBER:
        raise Broken("in a Data indication" if heard.peer else f"on channel {heard.channel:#06x}")


@rules("RFC 8656 §12.6", "empty ChannelData is an empty datagram")
def empty(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    lab.reaches_peer(seen, b"", lambda: allocation.link.send_on(NUMBER, b""))


@rules("RFC 8656 §12.6", "1,200 bytes reach the peer as they are")
def large(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    payload = bytes(number % 251 for number in range(LARGE))
    lab.reaches_peer(seen, payload, lambda: allocation.link.send_on(NUMBER, payload))


@rules("RFC 8656 §12.7", "1,200 bytes reach the client as they are")
def large_from_peer(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    lab.hears(allocation, seen, bytes(number % 251 for number in range(LARGE)))


@rules("RFC 8656 §12.5", "ChannelData may be padded, and padding is not relayed", only=UDP)
def padded(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    frame = channeldata.HEADER.pack(NUMBER, 5) + b"hello\0\0\0"
    lab.reaches_peer(seen, b"hello", lambda: allocation.link.send_raw(frame))


@rules("RFC 8656 §12.6", "ChannelData that is longer than its datagram is dropped", only=UDP)
def truncated(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    allocation.link.send_raw(channeldata.HEADER.pack(NUMBER, 9) + b"half")
    lab.reaches_peer(seen, b"whole", lambda: allocation.link.send_on(NUMBER, b"whole"))
    if any(payload != b"whole" for payload, _ in seen.peer.received):
        raise Broken("it reaches the peer")


@rules("RFC 8656 §12.5", "ChannelData is padded to four bytes in a stream", only=STREAM)
def padded_in_a_stream(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    for payload in (b"1", b"12", b"123", b"1234"):  # else what follows could not be read
        lab.hears(allocation, seen, payload)


@rules("RFC 8656 §12.6", "ChannelData on a channel that is not bound is dropped")
def unbound(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    allocation.link.send_on(OTHER_NUMBER, b"unbound")
    lab.reaches_peer(seen, b"bound", lambda: allocation.link.send_on(NUMBER, b"bound"))
    if any(payload == b"unbound" for payload, _ in seen.peer.received):
        raise Broken("it reaches the peer")


@rules("RFC 8656 §12.2", "ChannelBind installs a permission, for every port of the peer")
def permits(lab: Lab) -> None:
    allocation, _ = _bound(lab)
    other = lab.peer()
    heard = lab.hears(allocation, other, b"from another port")
    if heard.peer is None:
        raise Broken("as ChannelData, though the channel is of another port")


@rules("RFC 8656 §12.2", "ChannelBind of the same channel to the same peer succeeds again")
def bind_again(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    expect_success(allocation.bind(NUMBER, seen.address))


@rules("RFC 8656 §12.2", "ChannelBind of a channel that is another peer's: 400")
def channel_of_another_peer(lab: Lab) -> None:
    allocation, _ = _bound(lab)
    expect_code(allocation.bind(NUMBER, lab.peer().address), ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §12.2", "ChannelBind of a peer that has another channel: 400")
def peer_of_another_channel(lab: Lab) -> None:
    allocation, seen = _bound(lab)
    expect_code(allocation.bind(OTHER_NUMBER, seen.address), ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §12.2", "ChannelBind of a number below 0x4000: 400")
def number_too_low(lab: Lab) -> None:
    _expect_bad_number(lab, BELOW)


@rules("RFC 8656 §12.2", "ChannelBind of a number that is reserved, 0x5000: 400")
def number_reserved(lab: Lab) -> None:
    _expect_bad_number(lab, RESERVED)


@rules("RFC 8656 §12.2", "ChannelBind of a number above 0x7FFF: 400")
def number_too_high(lab: Lab) -> None:
    _expect_bad_number(lab, ABOVE)


@rules("RFC 8656 §12.2", "ChannelBind without CHANNEL-NUMBER: 400")
def without_number(lab: Lab) -> None:
    peer = (Attr.XOR_PEER_ADDRESS, lab.peer().address)
    expect_code(lab.allocation().link.request(Method.CHANNEL_BIND, peer), ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §12.2", "ChannelBind without XOR-PEER-ADDRESS: 400")
def without_peer(lab: Lab) -> None:
    number = (Attr.CHANNEL_NUMBER, NUMBER)
    answer = lab.allocation().link.request(Method.CHANNEL_BIND, number)
    expect_code(answer, ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §5", "ChannelBind without an allocation: 437")
def without_allocation(lab: Lab) -> None:
    pairs = ((Attr.CHANNEL_NUMBER, NUMBER), (Attr.XOR_PEER_ADDRESS, lab.peer().address))
    answer = lab.user().request(Method.CHANNEL_BIND, *pairs)
    expect_code(answer, ErrorCode.ALLOCATION_MISMATCH)


@rules("RFC 8656 §12.2", "ChannelBind of a peer of another family: 443")
def another_family(lab: Lab) -> None:
    allocation = lab.allocation()
    peer = somebody(other_family(family_of(allocation.relayed[0])))
    expect_code(allocation.bind(NUMBER, peer), ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)


def _bound(lab: Lab) -> tuple[Allocation, Seen]:
    allocation, seen = lab.allocation(), lab.peer()
    expect_success(allocation.bind(NUMBER, seen.address))
    return allocation, seen


def _expect_bad_number(lab: Lab, number: int) -> None:
    expect_code(lab.allocation().bind(number, lab.peer().address), ErrorCode.BAD_REQUEST)
