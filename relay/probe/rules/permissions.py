"""Who may send to a client. RFC 8656 §9, §10."""

from relay.probe.lab import (
    Broken,
    Lab,
    expect_code,
    expect_signed,
    expect_success,
    other_family,
    somebody,
)
from relay.probe.rules.rule import Rules
from relay.stun.address import family_of
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Method

rules = Rules()


@rules("RFC 8656 §10.2", "CreatePermission succeeds, and its answer is signed")
def permission(lab: Lab) -> None:
    allocation = lab.allocation()
    answer = allocation.permit(lab.peer().address)
    expect_success(answer)
    expect_signed(answer)


@rules("RFC 8656 §10.2", "CreatePermission for several peers succeeds")
def several_peers(lab: Lab) -> None:
    expect_success(lab.allocation().permit(*(lab.peer().address for _ in range(3))))


@rules("RFC 8656 §10.2", "CreatePermission without a peer: 400")
def without_peer(lab: Lab) -> None:
    expect_code(lab.allocation().permit(), ErrorCode.BAD_REQUEST)


@rules("RFC 8656 §5", "CreatePermission without an allocation: 437")
def without_allocation(lab: Lab) -> None:
    peer = (Attr.XOR_PEER_ADDRESS, lab.peer().address)
    answer = lab.user().request(Method.CREATE_PERMISSION, peer)
    expect_code(answer, ErrorCode.ALLOCATION_MISMATCH)


@rules("RFC 8656 §10.2", "CreatePermission for a peer of another family: 443")
def another_family(lab: Lab) -> None:
    allocation = lab.allocation()
    peer = somebody(other_family(family_of(allocation.relayed[0])))
    expect_code(allocation.permit(peer), ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)


@rules("RFC 8656 §9", "what a peer sends without a permission is dropped")
def no_permission(lab: Lab) -> None:
    allocation, seen = lab.allocation(), lab.peer()
    if lab.comes_in(allocation, seen, b"without"):
        raise Broken("it reaches the client")
    expect_success(allocation.permit(seen.address))
    lab.hears(allocation, seen, b"with")


@rules("RFC 8656 §9", "a permission is for an address, whatever the port")
def any_port(lab: Lab) -> None:
    allocation, seen, other = lab.allocation(), lab.peer(), lab.peer()
    expect_success(allocation.permit(seen.address))
    lab.hears(allocation, other, b"from another port")


@rules("RFC 8656 §9", "a permission is for one allocation alone")
def of_one_allocation(lab: Lab) -> None:
    alice, bob, seen = lab.allocation(), lab.allocation(), lab.peer()
    expect_success(alice.permit(seen.address))
    seen.peer.send(b"without", bob.relayed)
    lab.hears(alice, seen, b"with")
    lab.settle(bob.link)
    if bob.link.data:
        raise Broken("it reaches another client, too")
