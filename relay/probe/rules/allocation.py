"""Allocations, and how they are kept. RFC 8656 §7, §8."""

from typing import Final

from relay.probe.lab import (
    TRANSPORT,
    Broken,
    Lab,
    described,
    expect_attributes,
    expect_code,
    expect_success,
    other_family,
    raw,
)
from relay.probe.rules.rule import UDP, Rules
from relay.stun.address import family_of
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Family, Method

rules = Rules()

DEFAULT_LIFETIME: Final = 600  # seconds. RFC 8656 §3.2
LONGEST_LIFETIME: Final = 3600  # seconds, recommended. §7.2
DYNAMIC_PORTS: Final = range(49152, 65536)
_EVEN: Final = 0x00
_EVEN_AND_NEXT: Final = 0x80  # the bit R of EVEN-PORT. §18.7
_TCP_PROTOCOL: Final = 6


@rules(
    "RFC 8656 §7.2", "an Allocate success has XOR-RELAYED-ADDRESS, LIFETIME and XOR-MAPPED-ADDRESS"
)
def success(lab: Lab) -> None:
    expected = (Attr.XOR_RELAYED_ADDRESS, Attr.LIFETIME, Attr.XOR_MAPPED_ADDRESS)
    expect_attributes(lab.allocation().answer.message, *expected)


@rules("RFC 8656 §7.2", "an allocation lasts for 600 s unless more is asked for", level="SHOULD")
def default_lifetime(lab: Lab) -> None:
    lifetime = lab.allocation().answer.message.get(Attr.LIFETIME)
    if lifetime != DEFAULT_LIFETIME:
        raise Broken(f"{lifetime} s")


@rules("RFC 8656 §7.2", "an hour at most is granted, whatever is asked for", level="SHOULD")
def longest_lifetime(lab: Lab) -> None:
    asked = (Attr.LIFETIME, 0xFFFFFFFF)
    lifetime = lab.allocation(asked).answer.message.get(Attr.LIFETIME) or 0
    if not 0 < lifetime <= LONGEST_LIFETIME:
        raise Broken(f"{lifetime} s")


@rules("RFC 8656 §7.2", "less than 600 s are not granted", level="SHOULD")
def shortest_lifetime(lab: Lab) -> None:
    lifetime = lab.allocation((Attr.LIFETIME, 30)).answer.message.get(Attr.LIFETIME) or 0
    if lifetime < DEFAULT_LIFETIME:
        raise Broken(f"{lifetime} s, of 30 s asked for")


@rules("RFC 8656 §7.2", "relay ports are of 49152 to 65535", level="SHOULD")
def dynamic_ports(lab: Lab) -> None:
    port = lab.allocation().relayed[1]
    if port not in DYNAMIC_PORTS:
        raise Broken(f"{port}")


@rules("RFC 8656 §7.2", "an Allocate without REQUESTED-TRANSPORT: 400")
def without_transport(lab: Lab) -> None:
    expect_code(lab.user().request(Method.ALLOCATE), ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §7.2", "an Allocate for a protocol that nobody knows: 442")
def unknown_transport(lab: Lab) -> None:
    answer = lab.user().request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 0xFE))
    expect_code(answer, ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL)


@rules("RFC 8656 §7.2", "an Allocate for TCP over UDP: 442, or 400 as in RFC 6062", only=UDP)
def tcp_over_udp(lab: Lab) -> None:
    answer = lab.user().request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, _TCP_PROTOCOL))
    expect_code(answer, ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL, ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §7.2", "a second Allocate on one 5-tuple: 437")
def second_allocate(lab: Lab) -> None:
    answer = lab.allocation().link.request(Method.ALLOCATE, TRANSPORT)
    expect_code(answer, ErrorCode.ALLOCATION_MISMATCH)


@rules("RFC 8656 §7.2", "an Allocate that is sent again gets the same answer", only=UDP)
def allocate_again(lab: Lab) -> None:
    link = lab.user()
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, signed=True)
    first, second = (
        expect_success(link.transact(request, link.client.key)).get(Attr.XOR_RELAYED_ADDRESS)
        for _ in range(2)
    )
    if first != second:
        raise Broken(f"{first}, then {second}")


@rules("RFC 8656 §7.2", "two clients have two relayed addresses")
def addresses_differ(lab: Lab) -> None:
    first, second = lab.allocation(), lab.allocation()
    if first.relayed == second.relayed:
        raise Broken(f"both have {first.relayed}")


@rules("RFC 8656 §5", "a request on another user's allocation: 441")
def wrong_credentials(lab: Lab) -> None:
    other = lab.other_credential
    allocation = lab.allocation()
    client = allocation.link.client
    client.credential = other
    answer = allocation.refresh(DEFAULT_LIFETIME)
    client.credential = lab.credential
    expect_code(answer, ErrorCode.WRONG_CREDENTIALS)


@rules("RFC 8656 §7.2", "EVEN-PORT: an even port")
def even_port(lab: Lab) -> None:
    port = lab.allocation((Attr.EVEN_PORT, _EVEN)).relayed[1]
    if port % 2:
        raise Broken(f"{port}")


@rules("RFC 8656 §7.2", "EVEN-PORT with R: a token, for which the next port is given")
def reserved_port(lab: Lab) -> None:
    first = lab.allocation((Attr.EVEN_PORT, _EVEN_AND_NEXT))
    token = first.answer.message.get(Attr.RESERVATION_TOKEN)
    if token is None:
        raise Broken("no RESERVATION-TOKEN")
    second = lab.allocation((Attr.RESERVATION_TOKEN, token))
    if second.relayed[1] != first.relayed[1] + 1:
        raise Broken(f"{first.relayed[1]}, and for its token {second.relayed[1]}")


@rules("RFC 8656 §7.2", "EVEN-PORT and RESERVATION-TOKEN at once: 400")
def even_port_and_token(lab: Lab) -> None:
    both = ((Attr.EVEN_PORT, _EVEN), (Attr.RESERVATION_TOKEN, bytes(8)))
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, *both)
    expect_code(answer, ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §7.2", "a token that nobody was given: 508")
def unknown_token(lab: Lab) -> None:
    token = (Attr.RESERVATION_TOKEN, b"no token")
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, token)
    expect_code(answer, ErrorCode.INSUFFICIENT_CAPACITY)


@rules("RFC 8656 §7.2", "without REQUESTED-ADDRESS-FAMILY: IPv4")
def default_family(lab: Lab) -> None:
    relayed = lab.allocation().relayed
    if family_of(relayed[0]) is not Family.IPV4:
        raise Broken(f"{relayed[0]}")


@rules("RFC 8656 §7.2", "REQUESTED-ADDRESS-FAMILY: an address of that family, or 440")
def requested_family(lab: Lab) -> None:
    for family in Family:
        link = lab.user()
        asked = (Attr.REQUESTED_ADDRESS_FAMILY, family.value)
        answer = link.request(Method.ALLOCATE, TRANSPORT, asked)
        if answer.code == ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED:
            continue
        relayed = expect_success(answer).get(Attr.XOR_RELAYED_ADDRESS)
        if relayed is None or family_of(relayed[0]) is not family:
            raise Broken(f"{relayed and relayed[0]} for {family.name}")


@rules("RFC 8656 §7.2", "a family that nobody knows: 440")
def unknown_family(lab: Lab) -> None:
    asked = (raw(Attr.REQUESTED_ADDRESS_FAMILY.type), b"\x07\0\0\0")
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, asked)
    expect_code(answer, ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)


@rules("RFC 8656 §7.2", "REQUESTED-ADDRESS-FAMILY and ADDITIONAL-ADDRESS-FAMILY at once: 400")
def both_families(lab: Lab) -> None:
    both = (
        (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV4.value),
        (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6.value),
    )
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, *both)
    expect_code(answer, ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §7.2", "ADDITIONAL-ADDRESS-FAMILY for IPv4: 400")
def additional_ipv4(lab: Lab) -> None:
    asked = (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV4.value)
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, asked)
    expect_code(answer, ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §7.2", "ADDITIONAL-ADDRESS-FAMILY: both families, or ADDRESS-ERROR-CODE")
def dual_allocation(lab: Lab) -> None:
    asked = (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6.value)
    answer = expect_success(lab.user().request(Method.ALLOCATE, TRANSPORT, asked))
    families = {family_of(host) for host, _ in answer.get_all(Attr.XOR_RELAYED_ADDRESS)}
    if families != set(Family) and answer.get(Attr.ADDRESS_ERROR_CODE) is None:
        raise Broken(f"{len(families)} family, and no reason")


@rules("RFC 8656 §7.2", "DONT-FRAGMENT: success, or 420 where it cannot be done")
def dont_fragment(lab: Lab) -> None:
    answer = lab.user().request(Method.ALLOCATE, TRANSPORT, (Attr.DONT_FRAGMENT, b""))
    if answer.code is not None:
        expect_code(answer, ErrorCode.UNKNOWN_ATTRIBUTE)


@rules("RFC 8656 §5", "a Refresh without an allocation: 437")
def refresh_of_nothing(lab: Lab) -> None:
    answer = lab.user().request(Method.REFRESH, (Attr.LIFETIME, DEFAULT_LIFETIME))
    expect_code(answer, ErrorCode.ALLOCATION_MISMATCH)


@rules("RFC 8656 §8.2", "a Refresh success says the new lifetime")
def refresh(lab: Lab) -> None:
    answer = expect_success(lab.allocation().refresh(1200))
    lifetime = answer.get(Attr.LIFETIME)
    if lifetime is None or not DEFAULT_LIFETIME <= lifetime <= 1200:
        raise Broken(f"{lifetime} s, of 1200 s asked for")


@rules("RFC 8656 §8.2", "a Refresh of 0 s ends the allocation")
def refresh_ends(lab: Lab) -> None:
    allocation = lab.allocation()
    expect_success(allocation.refresh(0))
    expect_code(allocation.refresh(DEFAULT_LIFETIME), ErrorCode.ALLOCATION_MISMATCH)


@rules("RFC 8656 §8.2", "a Refresh of a family that the allocation lacks: 443")
def refresh_of_another_family(lab: Lab) -> None:
    allocation = lab.allocation()
    family = other_family(family_of(allocation.relayed[0]))
    answer = allocation.refresh(DEFAULT_LIFETIME, (Attr.REQUESTED_ADDRESS_FAMILY, family.value))
    expect_code(answer, ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)


@rules("RFC 8656 §7.2", "once it has ended, a new allocation can be made on the 5-tuple")
def allocate_anew(lab: Lab) -> None:
    allocation = lab.allocation()
    expect_success(allocation.refresh(0))
    answer = allocation.link.request(Method.ALLOCATE, TRANSPORT)
    if answer.code is not None:
        raise Broken(described(answer))
