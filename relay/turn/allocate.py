"""Allocate and Refresh: how an allocation begins, lives on and ends. RFC 8656 §7, §8."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Final

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, ErrorCode, Family, Method
from relay.stun.raw import RawMessage
from relay.turn.commands import ClosePort, OpenPort, PortFailure
from relay.turn.quota import require_quota, room_for
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
    families: tuple[Family, ...]
    address_errors: dict[Family, ErrorCode]  # of families that were asked for
    lifetime: int  # seconds, as granted
    replaced: list[Allocation]  # which end when this one begins
    port: int
    tried: set[int] = field(default_factory=set)  # ports that could not be bound


class AllocationHandler:
    """Serves Allocate and Refresh."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._opening: _Opening | None = None  # between OpenPort and its answer
        self.draining = False

    def allocate(self, request: Request) -> None:
        """RFC 8656 §7.2."""
        state, message, client = self._state, request.message, request.client
        existing = state.tables.live_of_client(client, request.now)
        if existing is not None:
            if (existing.transaction_id, existing.user) != (message.transaction_id, request.user):
                raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple has an allocation")
            # "The server MAY ... resend the success response": ours got lost on its way.
            self._succeed(request, existing)
            return
        if state.tables.ended.has(client, Method.ALLOCATE, message.transaction_id):
            raise Refused(ErrorCode.ALLOCATION_MISMATCH, "what this Allocate made is gone")
        transport = message.get(Attr.REQUESTED_TRANSPORT)
        if transport is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no REQUESTED-TRANSPORT")
        if transport != UDP_PROTOCOL:
            raise Refused(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL, f"protocol {transport}")
        families, errors = self._families(message)
        lifetime = _lifetime(message.get(Attr.LIFETIME) or DEFAULT_LIFETIME)
        if self.draining:  # before a takeover: what relays is to go on
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "draining")
        replaced = []
        if state.settings.one_allocation_per_username:
            replaced = state.tables.of_user(request.user)
            for other in replaced:
                _require_recent_nonce(request, other)
        require_quota(state, request.user, client[0][0], replaced)
        room = room_for(state, families, replaced)
        for family in families[room:]:
            errors[family] = ErrorCode.INSUFFICIENT_CAPACITY
        port = self._take_port(request.now, replaced)
        self._open(_Opening(request, families[:room], errors, lifetime, replaced, port))

    def port_opened(self, port: int, failures: Mapping[Family, PortFailure], now: float) -> None:
        """Go on with the Allocate for which *port* was opened, or was not in some families.

        A port that is in use is no reason to do without a family, as long as there are others.
        """
        opening, self._opening = self._opening, None
        assert opening is not None
        assert opening.port == port
        families = tuple(family for family in opening.families if family not in failures)
        if PortFailure.IN_USE in failures.values():
            opening.tried.add(port)
            if self._tries_another(opening, families):
                return
        if families:
            errors = dict.fromkeys(failures, ErrorCode.INSUFFICIENT_CAPACITY)
            self._begin(opening, families, {**opening.address_errors, **errors}, now)
            return
        self._give_back(port, opening)
        reason = f"port {port} is {next(iter(failures.values())).value}"
        self._state.answers.refuse(
            opening.request, Refused(ErrorCode.INSUFFICIENT_CAPACITY, reason)
        )

    def _begin(
        self,
        opening: _Opening,
        families: tuple[Family, ...],
        errors: dict[Family, ErrorCode],
        now: float,
    ) -> None:
        """Enter the allocation whose port is open in *families*, and tell the client."""
        request = opening.request
        for other in opening.replaced:  # only now: what fails must not cost what there is
            if other.expires_at:  # it has not ended to make room
                self._take_over(request, other)
        allocation = Allocation(
            client=request.client,
            user=request.user,
            port=opening.port,
            expires_at=dict.fromkeys(families, now + opening.lifetime),
            address_errors=errors,
            transaction_id=request.message.transaction_id,
            nonce_issued=request.nonce_issued,
        )
        self._state.tables.add(allocation)
        logger.debug(
            "%s allocates port %d for %d s", request.client[0], opening.port, opening.lifetime
        )
        self._succeed(request, allocation)

    def _tries_another(self, opening: _Opening, families: tuple[Family, ...]) -> bool:
        """Open another port instead of one that could be bound in these *families* only."""
        if len(opening.tried) == PORT_TRIES:
            return False
        port, now = opening.port, opening.request.now
        another = self._state.tables.free_ports.take(now, opening.tried)
        if another is None:
            return False
        if families:
            self._state.commands.append(ClosePort(opening.request.client, port, families, []))
        self._give_back(port, opening)
        opening.port = another
        self._open(opening)
        return True

    def refresh(self, request: Request) -> None:
        """RFC 8656 §8.2.

        Firezone's client repeats the attributes of its Allocate; of these only the family counts.
        """
        tables, message = self._state.tables, request.message
        requested = message.get(Attr.LIFETIME)
        lifetime = _lifetime(DEFAULT_LIFETIME if requested is None else requested)
        if lifetime == 0:
            self._end(request)
        else:
            allocation = self._state.allocation(request)
            families = _refreshed(message, allocation)
            tables.refresh(allocation, families, request.now + lifetime)
        self._state.answers.success(request, [(Attr.LIFETIME, lifetime)], key=request.key)

    def _end(self, request: Request) -> None:
        """Delete what the 5-tuple holds, or one family of it.

        Whoever has good credentials may do that: a client that was restarted on its old port knows
        nothing of what it had there, and may have become another user meanwhile.
        """
        tables, message, client = self._state.tables, request.message, request.client
        if tables.ended.has(client, Method.REFRESH, message.transaction_id):
            return  # it is done: what there is now came after
        allocation = self._state.any_allocation(request)
        families = _refreshed(message, allocation)
        _require_recent_nonce(request, allocation)
        tables.delete(allocation, families)
        tables.ended.add(client, Method.REFRESH, message.transaction_id)

    def check(self) -> None:
        """Assert that no Allocate waits for its port. For tests."""
        assert self._opening is None

    def _families(self, message: RawMessage) -> tuple[tuple[Family, ...], dict[Family, ErrorCode]]:
        """Which relayed addresses an Allocate gets, and why it lacks others. RFC 8656 §7.2."""
        requested = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
        additional = message.get(Attr.ADDITIONAL_ADDRESS_FAMILY)
        available = self._state.settings.public_hosts
        unsupported = ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED
        if additional is None:
            wanted = Family.IPV4 if requested is None else requested
            if wanted not in available:
                raise Refused(unsupported, f"no address of family {wanted} here")
            return (Family(wanted),), {}
        if requested is not None:
            raise Refused(ErrorCode.BAD_REQUEST, "two ways of asking for a family")
        if additional == Family.IPV4:
            raise Refused(ErrorCode.BAD_REQUEST, "IPv4 is never the additional family")
        if additional != Family.IPV6:
            raise Refused(unsupported, f"there is no address family {additional}")
        missing = [family for family in Family if family not in available]
        return tuple(available), dict.fromkeys(missing, unsupported)

    def _take_port(self, now: float, replaced: list[Allocation]) -> int:
        free_ports = self._state.tables.free_ports
        port = free_ports.take(now)
        if port is None and replaced:  # then this one gets a port of theirs
            for other in replaced:
                self._state.tables.delete(other)
            port = free_ports.take(now)
        if port is None:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "no port is free")
        return port

    def _give_back(self, port: int, opening: _Opening) -> None:
        """Free a port that was not kept; one that is in use is set aside for a while."""
        free_ports = self._state.tables.free_ports
        if port in opening.tried:
            free_ports.set_aside(port, opening.request.now)
        else:
            free_ports.give_back(port)

    def _open(self, opening: _Opening) -> None:
        assert self._opening is None, "OpenPort is answered before the next input"
        self._opening = opening
        self._state.commands.append(OpenPort(opening.port, opening.families))

    def _take_over(self, request: Request, other: Allocation) -> None:
        logger.debug("%s takes over from %s", request.client[0], other.client[0])
        self._state.tables.delete(other)

    def _succeed(self, request: Request, allocation: Allocation) -> None:
        """RFC 8656 §7.2, the success response; §18.12 for the family that is missing."""
        public_hosts = self._state.settings.public_hosts
        attributes: Attributes = [
            (Attr.XOR_RELAYED_ADDRESS, (public_hosts[family], allocation.port))
            for family in allocation.families
        ]
        left = max(allocation.expires_at.values()) - request.now
        attributes += [
            (Attr.XOR_MAPPED_ADDRESS, request.mapped_address),
            (Attr.LIFETIME, max(ceil(left), 1)),  # it has not ended yet
        ]
        attributes += [
            (Attr.ADDRESS_ERROR_CODE, (family, code, code.reason))
            for family, code in allocation.address_errors.items()
        ]
        self._state.answers.success(request, attributes, key=request.key)


def _lifetime(requested: int) -> int:
    """Return the lifetime granted, in seconds.

    RFC 8656 §7.2 would raise what is under 600; a client that asks for less gets less.
    """
    return min(requested, MAX_LIFETIME)


def _refreshed(message: RawMessage, allocation: Allocation) -> tuple[Family, ...]:
    """Which of an allocation's families a Refresh is about: all, unless it names one."""
    family = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
    if family is None:
        return allocation.families
    if family not in allocation.families:
        code = ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH
        raise Refused(code, f"no address of family {family} is allocated")
    return (Family(family),)


def _require_recent_nonce(request: Request, allocation: Allocation) -> None:
    """Refuse to end an allocation by a request that is older than it, and so a replay.

    A nonce is good for an hour, and so would be what somebody has recorded. The client itself has
    the newer nonce, or gets one now and asks again.
    """
    if request.nonce_issued < allocation.nonce_issued:
        raise Refused(ErrorCode.STALE_NONCE, "the allocation was made with a newer nonce")
