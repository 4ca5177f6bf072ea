"""Allocate and Refresh: how an allocation begins, lives on and ends. RFC 8656 §7, §8."""

import logging
from collections.abc import Callable, Collection, Mapping
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
from relay.turn.tables import RESERVATION_LIFETIME, Allocation, Reservation, site_of

logger = logging.getLogger("relay.turn")

DEFAULT_LIFETIME: Final = 600  # seconds. RFC 8656 §7.2
MAX_LIFETIME: Final = 3600  # seconds. RFC 8656 §7.2
_ROUNDING: Final = 1e-3  # seconds: by less than that, (now + lifetime) - now may be too much
_R_BIT: Final = 0x80  # of EVEN-PORT: keep the next port, too. RFC 8656 §18.7
_TOKEN_SIZE: Final = 8  # bytes. RFC 8656 §18.10
PORT_TRIES: Final = 16  # ports that cannot be bound, before a client is told to give up


@dataclass(slots=True)
class _Opening:
    """An Allocate that waits for its port."""

    request: Request
    families: tuple[Family, ...]
    address_errors: dict[Family, ErrorCode]  # of families that were asked for
    lifetime: int  # seconds, as granted
    replaced: list[Allocation]  # which end when this one begins
    wanted: "_Port"
    port: int
    tried: set[int] = field(default_factory=set)  # ports that could not be bound


@dataclass(frozen=True, slots=True)
class _Port:
    """Which port an Allocate wants. RFC 8656 §7.2."""

    even: bool = False  # EVEN-PORT
    with_next: bool = False  # and the next one kept for later
    reserved: Reservation | None = None  # RESERVATION-TOKEN: the one that was kept


_ANY_PORT: Final = _Port()


class AllocationHandler:
    """Serves Allocate and Refresh."""

    def __init__(self, state: State, randbelow: Callable[[int], int]) -> None:
        """``randbelow(n)`` draws from 0 to n - 1, unpredictably."""
        self._state = state
        self._randbelow = randbelow
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
            self._succeed(request, existing, request.now)
            return
        if state.tables.ended.has(client, Method.ALLOCATE, message.transaction_id):
            raise Refused(ErrorCode.ALLOCATION_MISMATCH, "what this Allocate made is gone")
        transport = message.get(Attr.REQUESTED_TRANSPORT)
        if transport is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no REQUESTED-TRANSPORT")
        if transport != UDP_PROTOCOL:
            state.hints.give(
                f"transport {transport}",
                f"a client asks for an allocation of protocol {transport}: there are only UDP ones",
            )
            raise Refused(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL, f"protocol {transport}")
        wanted = self._wanted_port(request)
        if wanted.reserved is None:
            families, errors = self._families(message)
        else:
            families, errors = (wanted.reserved.family,), {}
        lifetime = _lifetime(message.get(Attr.LIFETIME) or DEFAULT_LIFETIME)
        if self.draining:  # before a takeover: what relays is to go on
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "draining")
        replaced = []
        if state.settings.one_allocation_per_username:
            replaced = state.tables.of_user(request.user)
            for other in replaced:
                _require_recent_nonce(request, other)
        # A reservation that is redeemed is counted already.
        more = int(wanted.reserved is None) + int(wanted.with_next)
        require_quota(state, request.user, client[0][0], replaced, wanted=more)
        room = room_for(state, families, replaced)
        for family in families[room:]:
            errors[family] = ErrorCode.INSUFFICIENT_CAPACITY
        port = self._take_port(wanted, request.now, replaced)
        self._open(_Opening(request, families[:room], errors, lifetime, replaced, wanted, port))

    def port_opened(self, port: int, failures: Mapping[Family, PortFailure], now: float) -> None:
        """Go on with the Allocate for which *port* was opened, or was not in some families.

        A port that is in use is no reason to do without a family, as long as there are others.
        """
        opening, self._opening = self._opening, None
        assert opening is not None
        assert opening.port == port
        families = tuple(family for family in opening.families if family not in failures)
        if PortFailure.IN_USE in failures.values() and opening.wanted.reserved is None:
            opening.tried.add(port)
            if self._tries_another(opening, families):
                return
        if families:
            errors = dict.fromkeys(failures, ErrorCode.INSUFFICIENT_CAPACITY)
            self._begin(opening, families, {**opening.address_errors, **errors}, now)
            return
        self._give_back(opening)
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
        reservation = None
        if opening.wanted.with_next:
            reservation = self._reserve(opening, families[0], now)
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
            reservation_token=None if reservation is None else reservation.token,
        )
        self._state.tables.add(allocation)
        logger.debug(
            "%s allocates port %d for %d s", request.client[0], opening.port, opening.lifetime
        )
        self._succeed(request, allocation, now)

    def _tries_another(self, opening: _Opening, families: tuple[Family, ...]) -> bool:
        """Open another port instead of one that could be bound in these *families* only."""
        if len(opening.tried) == PORT_TRIES:
            return False
        port = opening.port
        another = self._draw(opening.wanted, opening.request.now, opening.tried)
        if another is None:
            return False
        if families:
            self._state.commands.append(ClosePort(opening.request.client, port, families, []))
        self._give_back(opening)
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

    def _wanted_port(self, request: Request) -> _Port:
        """Which port a request is for. RFC 8656 §7.2, steps 5 and 7."""
        message = request.message
        even, token = message.get(Attr.EVEN_PORT), message.get(Attr.RESERVATION_TOKEN)
        if token is None:
            if even is None:
                return _ANY_PORT
            with_next = bool(even & _R_BIT)
            if with_next and message.get(Attr.ADDITIONAL_ADDRESS_FAMILY) is not None:
                raise Refused(ErrorCode.BAD_REQUEST, "two ports, and two families")
            return _Port(even=True, with_next=with_next)
        for other in (Attr.REQUESTED_ADDRESS_FAMILY, Attr.ADDITIONAL_ADDRESS_FAMILY):
            if message.get(other) is not None:
                raise Refused(ErrorCode.BAD_REQUEST, f"RESERVATION-TOKEN and {other}")
        if even is not None:
            raise Refused(ErrorCode.BAD_REQUEST, "RESERVATION-TOKEN and EVEN-PORT")
        reserved = self._state.tables.reservation(token)
        if reserved is None or reserved.user != request.user or reserved.expires_at <= request.now:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "nothing is reserved under that token")
        return _Port(reserved=reserved)

    def _take_port(self, wanted: _Port, now: float, replaced: list[Allocation]) -> int:
        if wanted.reserved is not None:
            return self._state.tables.redeem(wanted.reserved)
        port = self._draw(wanted, now)
        if port is None and replaced:  # then this one gets a port of theirs
            for other in replaced:
                self._state.tables.delete(other)
            port = self._draw(wanted, now)
        if port is None:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "no such port is free")
        return port

    def _draw(self, wanted: _Port, now: float, tried: Collection[int] = ()) -> int | None:
        free_ports = self._state.tables.free_ports
        if wanted.even:
            return free_ports.take_even(now, with_next=wanted.with_next)
        return free_ports.take(now, tried)

    def _reserve(self, opening: _Opening, family: Family, now: float) -> Reservation:
        """Keep the port after the one that was opened."""
        request = opening.request
        reservation = Reservation(
            token=self._randbelow(1 << 64).to_bytes(_TOKEN_SIZE, "big"),
            user=request.user,
            site=site_of(request.client[0][0]),
            family=family,
            port=opening.port + 1,
            expires_at=now + RESERVATION_LIFETIME,
        )
        self._state.tables.reserve(reservation)
        return reservation

    def _give_back(self, opening: _Opening) -> None:
        """Free a port that was not kept; one that is in use is set aside for a while."""
        free_ports, port = self._state.tables.free_ports, opening.port
        if opening.wanted.with_next:
            free_ports.give_back(port + 1)
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

    def _succeed(self, request: Request, allocation: Allocation, now: float) -> None:
        """RFC 8656 §7.2, the success response; §18.12 for the family that is missing."""
        public_hosts = self._state.settings.public_hosts
        attributes: Attributes = [
            (Attr.XOR_RELAYED_ADDRESS, (public_hosts[family], allocation.port))
            for family in allocation.families
        ]
        left = max(allocation.expires_at.values()) - now
        attributes += [
            (Attr.XOR_MAPPED_ADDRESS, request.mapped_address),
            (Attr.LIFETIME, max(ceil(left - _ROUNDING), 1)),  # it has not ended yet
        ]
        if allocation.reservation_token is not None:
            attributes.append((Attr.RESERVATION_TOKEN, allocation.reservation_token))
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
