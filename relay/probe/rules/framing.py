"""Messages as such, and Binding. RFC 8489 §5 to §7, §14."""

import os

from relay.probe.lab import (
    UNKNOWN_OPTIONAL,
    UNKNOWN_REQUIRED,
    UNKNOWN_REQUIRED_TOO,
    Broken,
    Lab,
    expect_code,
    expect_success,
    names,
)
from relay.probe.link import wait
from relay.probe.rules.rule import STREAM, UDP, Rules
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Kind, Method
from relay.stun.message import Message

rules = Rules()

_NO_METHOD = 0x0FF  # which nobody has registered


@rules("RFC 8489 §14.2", "a Binding success has XOR-MAPPED-ADDRESS")
def mapped_address(lab: Lab) -> None:
    link = lab.link()
    answer = expect_success(link.transact(lab.message(link, Method.BINDING)))
    if answer.get(Attr.XOR_MAPPED_ADDRESS) is None:
        raise Broken("there is none")


@rules("RFC 8489 §6.3.1", "an attribute that must be understood and is not: 420")
def unknown_attribute(lab: Lab) -> None:
    link = lab.link()
    request = lab.message(link, Method.BINDING, (UNKNOWN_REQUIRED, b"what?"))
    expect_code(link.transact(request), ErrorCode.UNKNOWN_ATTRIBUTE)


@rules("RFC 8489 §14.13", "the 420 lists all that was not understood")
def unknown_attributes_listed(lab: Lab) -> None:
    link = lab.link()
    sent = (UNKNOWN_REQUIRED, UNKNOWN_REQUIRED_TOO)
    request = lab.message(link, Method.BINDING, *((each, b"") for each in sent))
    answer = expect_code(link.transact(request), ErrorCode.UNKNOWN_ATTRIBUTE)
    listed = answer.get(Attr.UNKNOWN_ATTRIBUTES)
    if listed is None:
        raise Broken("a 420 without UNKNOWN-ATTRIBUTES")
    if {each.type for each in sent} - set(listed):
        raise Broken(f"only {names(listed)} of {names(each.type for each in sent)}")


@rules("RFC 8489 §14", "an attribute that need not be understood is ignored")
def unknown_optional_attribute(lab: Lab) -> None:
    link = lab.link()
    request = lab.message(link, Method.BINDING, (UNKNOWN_OPTIONAL, b"whatever"))
    expect_success(link.transact(request))


@rules("RFC 8489 §14", "padding may have any bits")
def padding_is_ignored(lab: Lab) -> None:
    link = lab.link()
    request = bytearray(lab.message(link, Method.BINDING, (Attr.SOFTWARE, "probe")))
    request[-3:] = b"\xff\xff\xff"
    expect_success(link.transact(bytes(request)))


@rules("RFC 8489 §7", "a request with FINGERPRINT is answered")
def fingerprint(lab: Lab) -> None:
    link = lab.link()
    expect_success(link.transact(lab.message(link, Method.BINDING, fingerprinted=True)))


@rules("RFC 8489 §6.3", "a request with a wrong FINGERPRINT is not answered", only=UDP)
def wrong_fingerprint(lab: Lab) -> None:
    link = lab.link()
    request = bytearray(lab.message(link, Method.BINDING, fingerprinted=True))
    request[-1] ^= 0xFF
    lab.expect_silence(link, bytes(request))


@rules("RFC 8489 §5", "a message whose length is no multiple of four is not answered", only=UDP)
def odd_length(lab: Lab) -> None:
    link = lab.link()
    request = bytearray(lab.message(link, Method.BINDING, (Attr.SOFTWARE, "probe")))
    request[3] -= 3
    lab.expect_silence(link, bytes(request[:-3]))


@rules("RFC 8489 §6.3", "a message that is longer than its datagram is not answered", only=UDP)
def too_long(lab: Lab) -> None:
    link = lab.link()
    request = bytearray(lab.message(link, Method.BINDING))
    request[3] += 8
    lab.expect_silence(link, bytes(request))


@rules("RFC 8489 §6.3", "what does not begin with two zero bits is not answered", only=UDP)
def not_stun(lab: Lab) -> None:
    link = lab.link()
    request = bytearray(lab.message(link, Method.BINDING))
    request[0] |= 0x80
    lab.expect_silence(link, bytes(request))


@rules("RFC 8489 §6.3.2", "a Binding indication is not answered")
def indication(lab: Lab) -> None:
    link = lab.link()
    lab.expect_silence(link, lab.message(link, Method.BINDING, kind=Kind.INDICATION))


@rules("RFC 8489 §6.3.3", "an answer that nobody waits for is not answered")
def unexpected_answer(lab: Lab) -> None:
    link = lab.link()
    lab.expect_silence(link, lab.message(link, Method.BINDING, kind=Kind.SUCCESS))


@rules("RFC 8489 §6.3", "a request with a method that nobody knows is not answered")
def unknown_method(lab: Lab) -> None:
    link = lab.link()
    lab.expect_silence(link, lab.message(link, _NO_METHOD))


@rules("RFC 8489 §6.2.1", "a request that is sent again is answered again", only=UDP)
def retransmission(lab: Lab) -> None:
    link = lab.link()
    request = lab.message(link, Method.BINDING)
    first, second = (
        expect_success(link.transact(request)).get(Attr.XOR_MAPPED_ADDRESS) for _ in range(2)
    )
    if first != second:
        raise Broken(f"{first}, then {second}")


@rules("RFC 8489 §6.2.2", "two requests in one piece are both answered", only=STREAM)
def two_in_one_piece(lab: Lab) -> None:
    link = lab.link()
    link.strays.clear()
    link.send_raw(lab.message(link, Method.BINDING) + lab.message(link, Method.BINDING))
    if not wait([link], lambda: len(link.strays) >= 2, 2.0):
        raise Broken(f"{len(link.strays)} answers")


@rules("RFC 8489 §6.2.2", "a request in pieces is answered", only=STREAM)
def in_pieces(lab: Lab) -> None:
    link = lab.link()
    request = Message(
        Kind.REQUEST, Method.BINDING, os.urandom(12), [(Attr.SOFTWARE, "probe")]
    ).encode()
    link.strays.clear()
    for at in range(0, len(request), 3):
        link.send_raw(request[at : at + 3])
    if not wait([link], lambda: bool(link.strays), 2.0):
        raise Broken("no answer")
