"""Where rules are tried: fresh clients of one server, peers, and the means to say what came.

That something does *not* happen is told without waiting for it, where it can be: after what must
have no effect goes what must have one, on the same way, and once that has arrived the first has had
its time.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

from relay.probe.client import TIME_LIMIT, Answered, Credential, Data, Pair, Signature
from relay.probe.link import Link, LinkError, Peer, open_udp, wait
from relay.stun.address import Address
from relay.stun.attributes import Attr, Attribute, Coding
from relay.stun.const import UDP_PROTOCOL, Family, Kind, Method
from relay.stun.message import Message

ATTEMPTS: Final = 4  # to get a datagram through
ATTEMPT: Final = 0.1  # of the time limit of a request, until it is sent again
_FENCES: Final = 3  # round trips by which a server has read what came before


class Broken(Exception):
    """A rule is not kept; the text says what came instead."""


class Inapplicable(Exception):
    """A rule cannot be tried; the text says why."""


class Allocation:
    """A client that has an allocation."""

    def __init__(self, link: Link, answer: Answered) -> None:
        self.link = link
        self.answer = answer
        relayed = answer.message.get(Attr.XOR_RELAYED_ADDRESS)
        if relayed is None:
            raise Broken("Allocate succeeds without XOR-RELAYED-ADDRESS")
        self.relayed: Address = relayed

    def permit(self, *peers: Address) -> Answered:
        """Ask for permissions."""
        pairs: list[Pair] = [(Attr.XOR_PEER_ADDRESS, peer) for peer in peers]
        return self.link.request(Method.CREATE_PERMISSION, *pairs)

    def bind(self, number: int, peer: Address) -> Answered:
        """Ask for a channel."""
        return self.link.request(
            Method.CHANNEL_BIND, (Attr.CHANNEL_NUMBER, number), (Attr.XOR_PEER_ADDRESS, peer)
        )

    def refresh(self, lifetime: int, *attributes: Pair) -> Answered:
        """Ask for so many seconds more."""
        return self.link.request(Method.REFRESH, (Attr.LIFETIME, lifetime), *attributes)


@dataclass(frozen=True, slots=True)
class Seen:
    """A peer, and where the server sees it."""

    peer: Peer
    address: Address


class Lab:
    """One server, and those who are there for one rule: what it holds for them ends after it."""

    def __init__(
        self,
        connect: Callable[[Credential | None], Link],
        server: Address,
        credential: Credential | None,
        other: Credential | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        """``connect(credential)`` returns a client of the *server*, or raises LinkError.

        *credential* and *other* are of two users. A request may take *time_limit* seconds.
        """
        self._patience = ATTEMPT * time_limit
        self._connect = connect
        self.server = server
        self._credential = credential
        self._other = other
        # Sockets are closed at the very end: a port that comes again would be the same client to a
        # server that remembers it a while longer.
        self._sockets = ExitStack()
        self._links: list[Link] = []
        self._peers: list[Peer] = []

    def clear(self) -> None:
        """End the allocations. What the sockets hear from here on, nobody does."""
        for link in self._links:
            if link.client.nonce is not None and link.error is None:
                with suppress(LinkError):
                    link.request(Method.REFRESH, (Attr.LIFETIME, 0))
        self._links.clear()
        self._peers.clear()

    def close(self) -> None:
        """Close the sockets."""
        self._sockets.close()

    # --- Who there is -----------------------------------------------------------------------

    def link(self, credential: Credential | None = None) -> Link:
        """Return a new client that signs with a credential, or with none."""
        link = self._sockets.enter_context(self._connect(credential))
        self._links.append(link)
        return link

    @property
    def credential(self) -> Credential:
        """The user. Raises Inapplicable if there is none."""
        if self._credential is None:
            raise Inapplicable("no credential was given")
        return self._credential

    @property
    def other_credential(self) -> Credential:
        """Another user. Raises Inapplicable if there is none."""
        if self._other is None:
            raise Inapplicable("takes a second user: a secret instead of a credential")
        return self._other

    def user(self) -> Link:
        """Return a new client of the user, who has been told a nonce."""
        link = self.link(self.credential)
        challenge = link.transact(self.message(link, Method.ALLOCATE, TRANSPORT))
        if not link.client.heed(challenge.message):
            raise Broken(f"an Allocate without credentials: {described(challenge)}, and no nonce")
        return link

    def allocation(self, *attributes: Pair) -> Allocation:
        """Return a new client of the user, with an allocation. Raises Broken if it gets none."""
        link = self.link(self.credential)
        answer = link.request(Method.ALLOCATE, TRANSPORT, *attributes)
        expect_success(answer)
        return Allocation(link, answer)

    def peer(self) -> Seen:
        """Return a new peer that the server can send to. Raises Inapplicable if there is none."""
        try:
            local, mapped = self._mapped()
            peer = self._sockets.enter_context(Peer(*local))
        except (OSError, LinkError) as error:
            raise Inapplicable(f"there is no peer: {error}") from error
        self._peers.append(peer)
        return Seen(peer, mapped)

    def _mapped(self) -> tuple[Address, Address]:
        """Return an address of this machine that is free, and how the server sees it."""
        with Link(open_udp(self.server), None, time_limit=2) as link:
            local = link.local_address
            try:
                message = Message(Kind.REQUEST, Method.BINDING, os.urandom(12))
                mapped = link.transact(message.encode()).message.get(Attr.XOR_MAPPED_ADDRESS)
            except LinkError:  # over UDP there may be nobody
                mapped = None
        return local, mapped or local

    # --- Messages ---------------------------------------------------------------------------

    def message(
        self,
        link: Link,
        method: int,
        *attributes: Pair,
        kind: Kind = Kind.REQUEST,
        signed: bool = False,
        key: bytes | None = None,
        fingerprinted: bool = False,
    ) -> bytes:
        """Return a message as it is to be, signed by the link's user or with a *key*."""
        pairs = [*attributes, *(link.client.signature() if signed else [])]
        return Message(kind, method, link.client.new_transaction_id(), pairs).encode(
            (key or link.client.key) if signed or key else None, fingerprinted=fingerprinted
        )

    def fence(self, link: Link) -> None:
        """Wait until the server has read all that was sent on a link before."""
        message = Message(Kind.REQUEST, Method.BINDING, os.urandom(12))
        try:
            link.transact(message.encode())
        except LinkError as error:
            raise Broken(f"after that, a Binding request on the same 5-tuple: {error}") from error

    def expect_silence(self, link: Link, datagram: bytes) -> None:
        """Send what is not to be answered. Raises Broken if it is."""
        link.strays.clear()
        link.send_raw(datagram)
        self.fence(link)
        if link.strays:
            raise Broken(f"an answer: {_of_bytes(link.strays[0])}")

    # --- Data -------------------------------------------------------------------------------

    def arrives(self, send: Callable[[], None], has_come: Callable[[], bool]) -> bool:
        """Send something, a few times if it has to be, until it has come."""
        for _ in range(ATTEMPTS):
            send()
            if wait([*self._links, *self._peers], has_come, self._patience):
                return True
        return False

    def reaches_peer(self, seen: Seen, payload: bytes, send: Callable[[], None]) -> Address:
        """Send to a peer, and return from where that came. Raises Broken if it does not."""

        def found() -> list[Address]:
            return [source for data, source in seen.peer.received if data == payload]

        if not self.arrives(send, lambda: bool(found())):
            raise Broken("nothing reaches the peer")
        return found()[0]

    def reaches_client(self, link: Link, payload: bytes, send: Callable[[], None]) -> Data:
        """Send to a client, and return what came. Raises Broken if it does not."""

        def found() -> list[Data]:
            return [data for data in link.data if data.payload == payload]

        if not self.arrives(send, lambda: bool(found())):
            raise Broken("nothing reaches the client")
        return found()[0]

    def hears(self, allocation: Allocation, seen: Seen, payload: bytes) -> Data:
        """Have a peer send to an allocation, and return what the client hears of that."""
        return self.reaches_client(
            allocation.link, payload, lambda: seen.peer.send(payload, allocation.relayed)
        )

    def comes_in(self, allocation: Allocation, seen: Seen, payload: bytes) -> bool:
        """Have a peer send that has no permission; return whether the client hears it.

        This is not told by what comes later: a permission may be there before the server reads
        what was sent without it.
        """
        link = allocation.link
        seen.peer.send(payload, allocation.relayed)
        self.settle(link)
        return wait(
            [link], lambda: any(data.payload == payload for data in link.data), self._patience
        )

    def settle(self, link: Link) -> None:
        """Let the server read what was sent to it by somebody else, too."""
        for _ in range(_FENCES):
            self.fence(link)


def raw(attribute_type: int) -> Attribute[bytes]:
    """Return an attribute of any type, whose value is bytes as they are."""
    as_is: Coding[bytes] = Coding(lambda value, _: value, lambda value, _: value)
    return Attribute(attribute_type, f"{attribute_type:#06x}", as_is)


TRANSPORT: Final[Pair] = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)
UNKNOWN_REQUIRED: Final = raw(0x7FF0)
UNKNOWN_REQUIRED_TOO: Final = raw(0x7FF1)
UNKNOWN_OPTIONAL: Final = raw(0xFFF0)


def expect_success(answer: Answered) -> Message:
    """Return the message of a success. Raises Broken of anything else."""
    if answer.code is not None:
        raise Broken(described(answer))
    return answer.message


def expect_code(answer: Answered, *codes: int) -> Message:
    """Return the message of an error with one of *codes*. Raises Broken of anything else."""
    if answer.code not in codes:
        raise Broken(described(answer))
    return answer.message


def expect_signed(answer: Answered) -> None:
    """Raise Broken unless an answer is signed by the key of its request."""
    if answer.signature is not Signature.GOOD:
        raise Broken(f"{described(answer)}, {answer.signature.value}")


def expect_attributes(message: Message, *expected: Attribute[Any]) -> None:
    """Raise Broken if a message lacks one of the attributes."""
    missing = [each.name for each in expected if message.get(each) is None]
    if missing:
        raise Broken(f"it lacks {' and '.join(missing)}")


def described(answer: Answered) -> str:
    """Say what an answer is, in a few words."""
    if answer.code is None:
        return "success"
    _, reason = answer.message.get(Attr.ERROR_CODE) or (0, "")
    return f"{answer.code or 'an error without a code'} {reason}".strip(" \0")


def other_family(family: Family) -> Family:
    """Return the one of both families that is not *family*."""
    return Family.IPV6 if family is Family.IPV4 else Family.IPV4


def somebody(family: Family, number: int = 1) -> Address:
    """Return an address that nobody has, of documentation. RFC 5737, RFC 3849."""
    host = f"198.51.100.{number}" if family is Family.IPV4 else f"2001:db8::{number}"
    return host, 9


def names(types: Iterable[int]) -> str:
    """Return attribute types for people."""
    return ", ".join(f"{each:#06x}" for each in types) or "none"


def _of_bytes(data: bytes) -> str:
    kind = int.from_bytes(data[:2])
    return f"{len(data)} bytes that begin with {kind:#06x}"
