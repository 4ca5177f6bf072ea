"""Data in indications. RFC 8656 §11."""

from relay.probe.lab import UNKNOWN_REQUIRED, Allocation, Broken, Lab, Seen, expect_success
from relay.probe.rules.rule import Rules
from relay.stun.attributes import Attr
from relay.stun.const import Kind, Method

rules = Rules()

LARGE = 1200  # bytes, as DTLS and QUIC send


@rules("RFC 8656 §11.2", "a Send indication reaches the peer, from the relayed address")
def send(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    source = lab.reaches_peer(seen, b"hello", lambda: _indicate(allocation, seen, b"hello"))
    if source != allocation.relayed:
        raise Broken(f"from {source}, not from {allocation.relayed}")


@rules("RFC 8656 §11.3", "what a peer sends comes in a Data indication, with its address")
def data(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    heard = lab.hears(allocation, seen, b"hello")
    if heard.peer != seen.address:
        raise Broken(f"from {heard.peer or heard.channel}, not from {seen.address}")


@rules("RFC 8656 §11.2", "an empty DATA is an empty datagram")
def empty(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    lab.reaches_peer(seen, b"", lambda: _indicate(allocation, seen, b""))


@rules("RFC 8656 §11.3", "an empty datagram is an empty DATA")
def empty_from_peer(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    lab.hears(allocation, seen, b"")


@rules("RFC 8656 §11.2", "1,200 bytes reach the peer as they are")
def large(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    payload = bytes(number % 251 for number in range(LARGE))
    lab.reaches_peer(seen, payload, lambda: _indicate(allocation, seen, payload))


@rules("RFC 8656 §11.3", "1,200 bytes reach the client as they are")
def large_from_peer(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    lab.hears(allocation, seen, bytes(number % 251 for number in range(LARGE)))


@rules("RFC 8656 §11.2", "a Send indication without a permission is dropped")
def without_permission(lab: Lab) -> None:
    allocation, seen = lab.allocation(), lab.peer()
    _indicate(allocation, seen, b"without")
    lab.settle(allocation.link)
    expect_success(allocation.permit(seen.address))
    _expect_only(lab, allocation, seen, b"with", not_this=b"without")


@rules("RFC 8656 §11.2", "a Send indication without DATA is dropped")
def without_data(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    link = allocation.link
    peer = (Attr.XOR_PEER_ADDRESS, seen.address)
    link.send(lab.message(link, Method.SEND, peer, kind=Kind.INDICATION))
    _expect_only(lab, allocation, seen, b"with", not_this=b"")


@rules("RFC 8656 §11.2", "a Send indication without a peer is dropped")
def without_peer(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    link = allocation.link
    link.send(lab.message(link, Method.SEND, (Attr.DATA, b"to whom?"), kind=Kind.INDICATION))
    _expect_only(lab, allocation, seen, b"with", not_this=b"to whom?")


@rules("RFC 8489 §6.3.2", "an indication with what must be understood and is not is dropped")
def unknown_attribute(lab: Lab) -> None:
    allocation, seen = _permitted(lab)
    link = allocation.link
    pairs = (
        (Attr.XOR_PEER_ADDRESS, seen.address),
        (Attr.DATA, b"unknown"),
        (UNKNOWN_REQUIRED, b""),
    )
    link.send(lab.message(link, Method.SEND, *pairs, kind=Kind.INDICATION))
    _expect_only(lab, allocation, seen, b"with", not_this=b"unknown")


@rules("RFC 8656 §11.2", "a Send indication is never answered")
def no_answer(lab: Lab) -> None:
    link = lab.user()
    pairs = ((Attr.XOR_PEER_ADDRESS, ("198.51.100.1", 9)), (Attr.DATA, b"nobody's"))
    lab.expect_silence(link, lab.message(link, Method.SEND, *pairs, kind=Kind.INDICATION))


def _permitted(lab: Lab) -> tuple[Allocation, Seen]:
    allocation, seen = lab.allocation(), lab.peer()
    expect_success(allocation.permit(seen.address))
    return allocation, seen


def _indicate(allocation: Allocation, seen: Seen, payload: bytes) -> None:
    allocation.link.indicate(seen.address, payload)


def _expect_only(
    lab: Lab, allocation: Allocation, seen: Seen, payload: bytes, *, not_this: bytes
) -> None:
    """Expect that one payload reaches the peer, and that another one did not before it."""
    lab.reaches_peer(seen, payload, lambda: _indicate(allocation, seen, payload))
    if any(received == not_this for received, _ in seen.peer.received):
        raise Broken("it reaches the peer")
