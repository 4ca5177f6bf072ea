"""Allocate and Refresh: how an allocation begins, lives on and ends. RFC 8656 §7, §8."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, ErrorCode, Family
from relay.stun.raw import RawMessage
from relay.turn.commands import OpenPort, PortFailure
from relay.turn.quota import require_capacity, require_quota
from relay.turn.request import Attributes, Refused, Request
from relay.turn.state import State
from relay.turn.tables import Allocation

logger = logging.getLogger("relay.turn")

DEFAULT_LIFETIME: Final = 600  # seconds. RFC 8656 §7.2
MAX_LIFETIME: Final = 3600  # seconds. RFC 8656 §7.2
PORT_TRIES: Final = 16  # ports that cannot be bound, before a client is told to give up


@dataclass(slots=True)
class _Opening:
    """An Allocate that waits for its port."""

    request: Request
    username: str
    families: tuple[Family, ...]
    lifetime: int  # seconds, as granted
    port: int
    tried: set[int] = field(default_factory=set)  # ports that could not be bound


class AllocationHandler:
    """Serves Allocate and Refresh."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._opening: _Opening | None = None  # between OpenPort and its answer
        self.draining = False

    def allocate(self, request: Request, username: str) -> None:
        """RFC 8656 §7.2."""
        state, message, client = self._state, request.message, request.client
        existing = state.tables.of_client(client)
        if existing is not None:
            if (existing.transaction_id, existing.username) != (message.transaction_id, username):
                raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple has an allocation")
            # "The server MAY ... resend the success response": ours got lost on its way.
            self._succeed(request, existing)
            return
        transport = message.get(Attr.REQUESTED_TRANSPORT)
        if transport is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no REQUESTED-TRANSPORT")
        if transport != UDP_PROTOCOL:
            raise Refused(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL, f"protocol {transport}")
        families = self._families(message)
        lifetime = _lifetime(message.get(Attr.LIFETIME) or DEFAULT_LIFETIME)
        if self.draining:  # before a takeover: what relays is to go on
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "draining")
        replaced = []
        if state.settings.one_allocation_per_username:
            replaced = state.tables.of_username(username)
        require_quota(state, username, client[0][0], replaced)
        require_capacity(state, families, replaced)
        for other in replaced:  # only now: a refusal must not cost what there is
            logger.debug("%s takes over from %s", client[0], other.client[0])
            state.tables.delete(other)
        port = self._take_port(request.now)
        self._open(_Opening(request, username, families, lifetime, port))

    def port_opened(self, port: int, now: float) -> None:
        """Go on with the Allocate for which *port* was opened."""
        opening = self._answered(port)
        request, lifetime = opening.request, opening.lifetime
        allocation = Allocation(
            client=request.client,
            username=opening.username,
            port=port,
            families=opening.families,
            transaction_id=request.message.transaction_id,
            lifetime=lifetime,
            expires_at=now + lifetime,
        )
        self._state.tables.add(allocation)
        logger.debug("%s allocates port %d for %d s", request.client[0], port, lifetime)
        self._succeed(request, allocation)

    def port_failed(self, port: int, failure: PortFailure) -> None:
        """Try another port, or tell the client that there is none."""
        opening = self._answered(port)
        request, tried = opening.request, opening.tried
        free_ports = self._state.tables.free_ports
        if failure is PortFailure.REFUSED:
            free_ports.give_back(port)
        else:
            free_ports.set_aside(port, request.now)
            tried.add(port)
        try:
            if failure is PortFailure.REFUSED or len(tried) == PORT_TRIES:
                raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, f"port {port} is {failure.value}")
            opening.port = self._take_port(request.now, tried)
            self._open(opening)
        except Refused as refused:
            self._state.answers.refuse(request, refused)

    def refresh(self, request: Request, username: str) -> None:
        """RFC 8656 §8.2.

        Firezone's clients repeat the attributes of their Allocate here, so
        REQUESTED-TRANSPORT and ADDITIONAL-ADDRESS-FAMILY are ignored.
        """
        message, tables = request.message, self._state.tables
        allocation = self._state.allocation(request, username)
        family = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
        if family is not None and family not in allocation.families:
            raise Refused(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH, f"no {family.name} allocated")
        requested = message.get(Attr.LIFETIME)
        lifetime = _lifetime(DEFAULT_LIFETIME if requested is None else requested)
        if lifetime == 0:
            tables.delete(allocation)
        else:
            tables.refresh(allocation, request.now + lifetime)
        self._state.answers.success(request, [(Attr.LIFETIME, lifetime)], key=request.key)

    def check(self) -> None:
        """Assert that no Allocate waits for its port. For tests."""
        assert self._opening is None

    def _families(self, message: RawMessage) -> tuple[Family, ...]:
        """Which relayed addresses an Allocate gets. RFC 8656 §7.2."""
        requested = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
        additional = message.get(Attr.ADDITIONAL_ADDRESS_FAMILY)
        available = self._state.settings.public_hosts
        if additional is not None:
            if requested is not None:
                raise Refused(ErrorCode.BAD_REQUEST, "two ways of asking for a family")
            if additional is Family.IPV4:
                raise Refused(ErrorCode.BAD_REQUEST, "IPv4 is never the additional family")
            return tuple(available)
        wanted = requested or Family.IPV4
        if wanted not in available:
            raise Refused(ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED, f"no {wanted.name} here")
        return (wanted,)

    def _take_port(self, now: float, tried: Collection[int] = ()) -> int:
        port = self._state.tables.free_ports.take(now, tried)
        if port is None:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "no port is free")
        return port

    def _open(self, opening: _Opening) -> None:
        assert self._opening is None, "OpenPort is answered before the next input"
        self._opening = opening
        self._state.commands.append(OpenPort(opening.port, opening.families))

    def _answered(self, port: int) -> _Opening:
        opening, self._opening = self._opening, None
        assert opening is not None
        assert opening.port == port
        return opening

    def _succeed(self, request: Request, allocation: Allocation) -> None:
        """RFC 8656 §7.2, the success response; §18.12 for the family that is missing."""
        public_hosts = self._state.settings.public_hosts
        attributes: Attributes = [
            (Attr.XOR_RELAYED_ADDRESS, (public_hosts[family], allocation.port))
            for family in allocation.families
        ]
        attributes += [
            (Attr.XOR_MAPPED_ADDRESS, request.mapped_address),
            (Attr.LIFETIME, allocation.lifetime),
        ]
        if request.message.get(Attr.ADDITIONAL_ADDRESS_FAMILY) is not None:
            code = ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED
            attributes += [
                (Attr.ADDRESS_ERROR_CODE, (family, code, code.reason))
                for family in Family
                if family not in allocation.families
            ]
        self._state.answers.success(request, attributes, key=request.key)


def _lifetime(requested: int) -> int:
    """Return the lifetime granted, in seconds.

    RFC 8656 §7.2 would raise what is under 600; a client that asks for less gets less.
    """
    return min(requested, MAX_LIFETIME)
