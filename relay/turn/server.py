"""The TURN server: a pure state machine. Messages and time go in, commands come out.

After each input take :meth:`Server.next_command` until it is None, and carry the commands
out in that order. The handlers stand in the order of RFC 8656, their steps in the order
in which a request is judged. Relayed data never passes through here: ``BindChannel``
and ``UnbindChannel`` tell the forwarder what to relay.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from relay.stun import integrity
from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.attributes import Attr, Attribute, DecodeError
from relay.stun.const import HEADER_SIZE, UDP_PROTOCOL, ErrorCode, Family, Kind, Method
from relay.stun.message import Message, Received, WrongFingerprint, decode
from relay.turn.auth import REALM, Authenticator, AuthFailure
from relay.turn.commands import (
    ClientAddress,
    Command,
    Drop,
    OpenPort,
    PeerAddress,
    PortFailure,
    SendMessage,
)
from relay.turn.peers import PeerPolicy
from relay.turn.ratelimit import RateLimiter
from relay.turn.tables import Allocation, Channel, Tables, site_of

logger = logging.getLogger("relay.turn")

DEFAULT_LIFETIME: Final = 600  # seconds. RFC 8656 §7.2
MAX_LIFETIME: Final = 3600  # seconds. RFC 8656 §7.2
MOST_UNKNOWN_NAMED: Final = 32  # attributes in a 420: more could not be a mistake
PORT_TRIES: Final = 16  # ports that other processes hold, before a client is told to give up

SHORTEST_SIGNED: Final = HEADER_SIZE + 24  # bytes: a header and MESSAGE-INTEGRITY
JUDGED_AT_ONCE: Final = 500  # channels, when rules change; the others wait for their turn

_METHOD_NAMES: Final[dict[int, str]] = {method: method.name.lower() for method in Method}
_Attributes = list[tuple[Attribute[Any], Any]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server must know of its surroundings."""

    public_hosts: dict[Family, str]  # the hosts of relayed addresses, IPv4 first
    ports: range  # those that allocations may get, but for the listening port
    listen_port: int
    max_allocations: int
    max_sockets: int  # relay ports, counted once per family: what descriptors allow
    max_channels: int
    channel_numbers: range
    one_allocation_per_username: bool
    max_allocations_per_username: int | None = None
    max_allocations_per_ip: int | None = None  # for IPv6, per /64
    unauthenticated_rate_per_prefix: int = 0  # answers per second; 0: no limit
    unauthenticated_rate: int = 0  # likewise, in all
    software: str | None = None


class Server:
    """STUN Binding and TURN Allocate, Refresh, CreatePermission and ChannelBind."""

    def __init__(
        self,
        settings: Settings,
        *,
        authenticator: Authenticator,
        peer_policy: PeerPolicy,
        randbelow: Callable[[int], int],
        now: float,
    ) -> None:
        """Begin with no allocations. ``randbelow(n)`` draws from 0 to n - 1, unpredictably."""
        self._settings = settings
        self._authenticator = authenticator
        self._peer_policy = peer_policy
        self._randbelow = randbelow
        self._commands: deque[Command] = deque()
        self._tables = Tables(now, self._commands)
        self._strangers = RateLimiter(
            settings.unauthenticated_rate_per_prefix, settings.unauthenticated_rate
        )
        self.responses: Counter[tuple[str, str]] = Counter()  # by method, and code or "success"
        self.auth_failures: Counter[AuthFailure] = Counter()
        self._opening: dict[int, _Opening] = {}  # by port, between OpenPort and its answer
        self._draining = False
        self._unjudged: list[Channel] = []  # by rules about peers that have changed

    def handle_request(
        self, datagram: bytes, client: ClientAddress, *, now: float, unix_now: float
    ) -> Drop | None:
        """Serve a STUN datagram. Returns why it was dropped, or None if it was a request.

        *now* is in monotonic seconds, *unix_now* in seconds of Unix time.
        """
        host = client[0][0]
        over = self._strangers.refusal(host, now)
        if over is not None and len(datagram) < SHORTEST_SIGNED:
            return over  # before any work
        try:
            received = decode(datagram)
        except WrongFingerprint:
            return Drop.WRONG_FINGERPRINT
        except DecodeError:
            return Drop.MALFORMED_STUN
        if received.message.kind is not Kind.REQUEST:
            return Drop.NOT_A_REQUEST
        request = _Request(received, client, self._signing_key(received), now, unix_now)
        if request.key is None:
            if over is not None:
                return over
            self._strangers.count(host, now)
        try:
            self._serve(request)
        except Refused as refused:
            self._refuse(request, refused)
        return None

    def handle_port_opened(self, port: int, *, now: float) -> None:
        """Go on with the Allocate for which *port* was opened."""
        self._finish_allocate(self._opening.pop(port), port, now)

    def handle_port_failed(self, port: int, failure: PortFailure) -> None:
        """Try another port, or tell the client that there is none."""
        opening = self._opening.pop(port)
        opening.tried.add(port)
        try:
            if failure is PortFailure.REFUSED or len(opening.tried) >= PORT_TRIES:
                raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, f"port {port} is {failure.value}")
            self._open_some_port(opening)
        except Refused as refused:
            self._refuse(opening.request, refused)

    def handle_timeout(self, now: float) -> None:
        """Let everything end whose time has come."""
        self._tables.expire(now)
        self._judge_some(now)

    def poll_timeout(self) -> float | None:
        """Return when to call :meth:`handle_timeout`, in monotonic seconds, or None."""
        return 0.0 if self._unjudged else self._tables.next_deadline

    def next_command(self) -> Command | None:
        """Return the next thing to do, or None when all is done."""
        return self._commands.popleft() if self._commands else None

    def drain(self) -> None:
        """Refuse new allocations from here on; those that exist live on."""
        self._draining = True

    def change_settings(self, settings: Settings) -> None:
        """Go on with other settings. What exists already is not measured by them."""
        self._settings = settings
        self._strangers.set_rates(
            settings.unauthenticated_rate_per_prefix, settings.unauthenticated_rate
        )

    def change_peer_policy(self, peer_policy: PeerPolicy, *, now: float) -> None:
        """Go on with other rules, and unbind the channels that they forbid.

        At once if there are few channels; else some at a time, so that nobody's data has to
        wait for all of them: :meth:`poll_timeout` asks for the next.
        """
        self._peer_policy = peer_policy
        self._unjudged = self._tables.all_channels()
        self._judge_some(now)

    @property
    def allocations(self) -> int:
        """How many allocations there are."""
        return len(self._tables)

    @property
    def channels(self) -> int:
        """How many channels are bound."""
        return self._tables.bound

    def check(self) -> None:
        """Assert that the state agrees with itself. For tests."""
        self._tables.check()
        assert all(self._tables.at_port(port) is None for port in self._opening)

    def _judge_some(self, now: float) -> None:
        for channel in self._unjudged[-JUDGED_AT_ONCE:]:
            self._tables.judge_peer(channel, self._reach, now)
        del self._unjudged[-JUDGED_AT_ONCE:]

    def _signing_key(self, received: Received) -> bytes | None:
        """Return the claimed user's key if the request is signed with it, else None.

        Every answer to a request that proves to know the key is signed with it, errors
        too: Firezone's clients discard what is not.
        """
        username = received.message.get(Attr.USERNAME)
        if username is None or received.integrity_offset is None:
            return None
        key = self._authenticator.key(username)
        if key is None or not integrity.verify(received.raw, received.integrity_offset, key):
            return None
        return key

    def _serve(self, request: "_Request") -> None:
        message = request.received.message
        if request.received.undecodable is not None:
            raise Refused(ErrorCode.BAD_REQUEST, request.received.undecodable)
        number = message.get(Attr.CHANNEL_NUMBER)
        if number is not None and number not in self._settings.channel_numbers:
            raise Refused(ErrorCode.BAD_REQUEST, f"channel number {number:#06x} is out of range")
        match message.method:
            case Method.BINDING:
                self._binding(request)
            case Method.ALLOCATE:
                self._allocate(request, self._authenticate(request))
            case Method.REFRESH:
                self._refresh(request, self._authenticate(request))
            case Method.CREATE_PERMISSION:
                self._create_permission(request, self._authenticate(request))
            case Method.CHANNEL_BIND:
                self._channel_bind(request, self._authenticate(request))
            case method:
                raise Refused(ErrorCode.BAD_REQUEST, f"unknown method {method:#05x}")

    def _authenticate(self, request: "_Request") -> str:
        """Return the username that signed the request. RFC 8489 §9.2.4."""
        message = request.received.message
        username, nonce = message.get(Attr.USERNAME), message.get(Attr.NONCE)
        if request.received.integrity_offset is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "not signed")
        if username is None or message.get(Attr.REALM) is None:
            raise Refused(ErrorCode.BAD_REQUEST, "signed without USERNAME or REALM")
        if nonce is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "no nonce")
        if not self._authenticator.nonce_is_valid(nonce, request.client, request.now):
            self.auth_failures[AuthFailure.STALE_NONCE] += 1
            raise Refused(ErrorCode.STALE_NONCE, "nonce not from here, or too old")
        if request.key is None:
            self._fail_authentication(
                request, AuthFailure.WRONG_CREDENTIALS, "unknown user or wrong password"
            )
        if self._authenticator.has_expired(username, request.unix_now):
            self._fail_authentication(
                request, AuthFailure.EXPIRED_CREDENTIALS, "credentials have expired"
            )
        _require_known_attributes(request)
        return username

    def _fail_authentication(
        self, request: "_Request", failure: AuthFailure, reason: str
    ) -> NoReturn:
        """Refuse a client whose nonce was good: the address is its own, and can be named."""
        self.auth_failures[failure] += 1
        host, port = request.mapped_address
        logger.warning(
            "authentication failed for %s: %s",
            format_endpoint(host, port),
            reason,
            extra={"client": host, "reason": reason},
        )
        raise Refused(ErrorCode.UNAUTHORIZED, reason)

    def _binding(self, request: "_Request") -> None:
        """RFC 8489 §6.3.1: what is your address, seen from here."""
        _require_known_attributes(request)
        self._answer(request, [(Attr.XOR_MAPPED_ADDRESS, request.mapped_address)], key=None)

    def _allocate(self, request: "_Request", username: str) -> None:
        """RFC 8656 §7.2."""
        message, client = request.received.message, request.client
        existing = self._tables.of_client(client)
        if existing is not None:
            if (existing.transaction_id, existing.username) != (message.transaction_id, username):
                raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple has an allocation")
            # "The server MAY ... resend the success response": ours got lost on its way.
            self._answer_allocate(request, existing)
            return
        if any(opening.request.client == client for opening in self._opening.values()):
            raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple is getting an allocation")
        transport = message.get(Attr.REQUESTED_TRANSPORT)
        if transport is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no REQUESTED-TRANSPORT")
        if transport != UDP_PROTOCOL:
            raise Refused(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL, f"protocol {transport}")
        families = self._families(message)
        if self._draining:  # before a takeover: what relays is to go on
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "draining")
        replaced = []
        if self._settings.one_allocation_per_username:
            replaced = self._tables.of_username(username)
        self._require_quota(username, client[0][0], replaced)
        self._require_capacity(families, replaced)
        for other in replaced:  # only now: a refusal must not cost what there is
            logger.debug("%s takes over from %s", client[0], other.client[0])
            self._tables.delete(other)
        self._open_some_port(_Opening(request, username, families, tried=set()))

    def _require_quota(self, username: str, host: str, replaced: list[Allocation]) -> None:
        """RFC 8656 §7.2: 486 for one more than a user, or an address, may have."""
        most = self._settings.max_allocations_per_username
        opening = sum(opening.username == username for opening in self._opening.values())
        existing = len(self._tables.of_username(username)) - len(replaced)
        if most is not None and existing + opening >= most:
            raise Refused(ErrorCode.ALLOCATION_QUOTA_REACHED, f"the username has {most}")
        most = self._settings.max_allocations_per_ip
        if most is not None:
            site = site_of(host)
            opening = sum(site_of(o.request.client[0][0]) == site for o in self._opening.values())
            leaving = sum(site_of(other.client[0][0]) == site for other in replaced)
            if self._tables.at_site(site) - leaving + opening >= most:
                raise Refused(ErrorCode.ALLOCATION_QUOTA_REACHED, f"the address has {most}")

    def _require_capacity(self, families: tuple[Family, ...], replaced: list[Allocation]) -> None:
        """RFC 8656 §7.2: 508 for more than this relay may hold, or can."""
        allocations = len(self._tables) + len(self._opening)
        if not replaced and allocations >= self._settings.max_allocations:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many allocations as are allowed")
        opening = sum(len(opening.families) for opening in self._opening.values())
        leaving = sum(len(other.families) for other in replaced)
        sockets = self._tables.sockets - leaving + opening + len(families)
        if sockets > self._settings.max_sockets:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many sockets as are allowed")

    def _families(self, message: Message) -> tuple[Family, ...]:
        """Which relayed addresses an Allocate gets. RFC 8656 §7.2."""
        requested = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
        additional = message.get(Attr.ADDITIONAL_ADDRESS_FAMILY)
        available = self._settings.public_hosts
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

    def _open_some_port(self, opening: "_Opening") -> None:
        """Ask for a port that nobody holds, each of them equally likely."""
        ports = self._settings.ports
        taken = len(self._tables) + len(self._opening) + len(opening.tried)
        if taken < len(ports):
            # Mostly free: drawing until one fits takes two draws at half load.
            for _ in range(64):
                port = ports[self._randbelow(len(ports))]
                if self._is_free(port, opening):
                    return self._open_port(port, opening)
            free = [port for port in ports if self._is_free(port, opening)]
            if free:
                return self._open_port(free[self._randbelow(len(free))], opening)
        raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "no port is free")

    def _is_free(self, port: int, opening: "_Opening") -> bool:
        return (
            port != self._settings.listen_port
            and self._tables.at_port(port) is None
            and port not in self._opening
            and port not in opening.tried
        )

    def _open_port(self, port: int, opening: "_Opening") -> None:
        self._opening[port] = opening
        self._commands.append(OpenPort(port, opening.families))

    def _finish_allocate(self, opening: "_Opening", port: int, now: float) -> None:
        request = opening.request
        lifetime = _lifetime(request.received.message.get(Attr.LIFETIME) or DEFAULT_LIFETIME)
        allocation = Allocation(
            client=request.client,
            username=opening.username,
            port=port,
            families=opening.families,
            transaction_id=request.received.message.transaction_id,
            lifetime=lifetime,
            expires_at=now + lifetime,
        )
        self._tables.add(allocation)
        logger.debug("%s allocates port %d for %d s", request.client[0], port, lifetime)
        self._answer_allocate(request, allocation)

    def _answer_allocate(self, request: "_Request", allocation: Allocation) -> None:
        """RFC 8656 §7.2, the success response; §18.12 for the family that is missing."""
        attributes: _Attributes = [
            (Attr.XOR_RELAYED_ADDRESS, (self._settings.public_hosts[family], allocation.port))
            for family in allocation.families
        ]
        attributes += [
            (Attr.XOR_MAPPED_ADDRESS, request.mapped_address),
            (Attr.LIFETIME, allocation.lifetime),
        ]
        if request.received.message.get(Attr.ADDITIONAL_ADDRESS_FAMILY) is not None:
            code = ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED
            attributes += [
                (Attr.ADDRESS_ERROR_CODE, (family, code, code.reason))
                for family in Family
                if family not in allocation.families
            ]
        self._answer(request, attributes, key=request.key)

    def _refresh(self, request: "_Request", username: str) -> None:
        """RFC 8656 §8.2.

        Firezone's clients repeat the attributes of their Allocate here, so
        REQUESTED-TRANSPORT and ADDITIONAL-ADDRESS-FAMILY are ignored.
        """
        message = request.received.message
        allocation = self._allocation(request, username)
        family = message.get(Attr.REQUESTED_ADDRESS_FAMILY)
        if family is not None and family not in allocation.families:
            raise Refused(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH, f"no {family.name} allocated")
        requested = message.get(Attr.LIFETIME)
        lifetime = _lifetime(DEFAULT_LIFETIME if requested is None else requested)
        if lifetime == 0:
            self._tables.delete(allocation)
        else:
            self._tables.refresh(allocation, request.now + lifetime)
        self._answer(request, [(Attr.LIFETIME, lifetime)], key=request.key)

    def _create_permission(self, request: "_Request", username: str) -> None:
        """RFC 8656 §10.2: judged, but without effect, since only channels relay here."""
        allocation = self._allocation(request, username)
        peers = request.received.message.get_all(Attr.XOR_PEER_ADDRESS)
        if not peers:
            raise Refused(ErrorCode.BAD_REQUEST, "no XOR-PEER-ADDRESS")
        for host, port in peers:
            self._require_family(allocation, host)
            # A permission is for a host: the port is ignored, and often 0. RFC 8656 §10.1
            self._judge((host, port or 1))
        self._answer(request, [], key=request.key)

    def _channel_bind(self, request: "_Request", username: str) -> None:
        """RFC 8656 §12.2."""
        message = request.received.message
        allocation = self._allocation(request, username)
        number, address = message.get(Attr.CHANNEL_NUMBER), message.get(Attr.XOR_PEER_ADDRESS)
        if number is None or address is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no CHANNEL-NUMBER or no XOR-PEER-ADDRESS")
        peer = PeerAddress(address)
        self._require_family(allocation, peer[0])
        reaches_outside = self._judge(peer)
        by_peer, by_number = allocation.channels_by_peer.get(peer), allocation.channels.get(number)
        if by_peer is not None and by_peer.number != number:
            raise Refused(ErrorCode.BAD_REQUEST, f"peer is on channel {by_peer.number:#06x}")
        if by_number is not None and by_number.peer != peer:
            raise Refused(ErrorCode.BAD_REQUEST, f"channel {number:#06x} has another peer")
        if by_number is None and self._tables.channels >= self._settings.max_channels:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many channels as are allowed")
        self._tables.bind(
            allocation, number, peer, reaches_outside=reaches_outside, now=request.now
        )
        self._answer(request, [], key=request.key)

    def _allocation(self, request: "_Request", username: str) -> Allocation:
        """Find the allocation that a request other than Allocate is about. RFC 8656 §5."""
        allocation = self._tables.of_client(request.client)
        if allocation is None:
            raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple has no allocation")
        if allocation.username != username:
            raise Refused(ErrorCode.WRONG_CREDENTIALS, "made by another username")
        return allocation

    def _require_family(self, allocation: Allocation, host: str) -> None:
        if family_of(host) not in allocation.families:
            code = ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH
            raise Refused(code, f"no {family_of(host).name} allocated")

    def _judge(self, peer: Address) -> bool:
        """Refuse a forbidden peer; return whether datagrams to it may leave this relay.

        What this relay lends out may always be reached, from inside.
        """
        reaches_outside = self._reach(peer)
        if reaches_outside is not None:
            return reaches_outside
        rule = self._peer_policy.refusal(peer)
        logger.warning("peer refused: %s", rule)
        raise Refused(ErrorCode.FORBIDDEN, f"{format_endpoint(*peer)}: {rule}")

    def _reach(self, peer: Address) -> bool | None:
        """Tell whether datagrams to *peer* may leave this relay; None if none may be sent."""
        if self._peer_policy.refusal(peer) is None:
            return True
        return False if self._is_relayed_here(peer) else None

    def _is_relayed_here(self, address: Address) -> bool:
        host, port = address
        allocation = self._tables.at_port(port)
        family = family_of(host)
        return (
            allocation is not None
            and family in allocation.families
            and self._settings.public_hosts[family] == host
        )

    def _answer(self, request: "_Request", attributes: _Attributes, key: bytes | None) -> None:
        self._count_response(request, "success")
        self._send(request, Kind.SUCCESS, attributes, key)

    def _refuse(self, request: "_Request", refused: "Refused") -> None:
        """Send an error response: signed and with its reason, or as short as can be.

        Short, because anyone can ask for an unsigned one in the name of anyone else.
        """
        client, code = request.client, refused.code
        logger.debug("%d to %s: %s", code, client[0], refused.reason)
        self._count_response(request, str(code.value))
        reason = "" if request.key is None else code.reason
        attributes: _Attributes = [(Attr.ERROR_CODE, (code, reason))]
        if code in {ErrorCode.UNAUTHORIZED, ErrorCode.STALE_NONCE}:
            nonce = self._authenticator.nonce(client, request.now)
            attributes += [(Attr.REALM, REALM), (Attr.NONCE, nonce)]
        if code is ErrorCode.UNKNOWN_ATTRIBUTE:
            named = request.received.unknown[:MOST_UNKNOWN_NAMED]
            attributes.append((Attr.UNKNOWN_ATTRIBUTES, named))
        self._send(request, Kind.ERROR, attributes, request.key)

    def _count_response(self, request: "_Request", code: str) -> None:
        method = _METHOD_NAMES.get(request.received.message.method, "unknown")
        self.responses[method, code] += 1

    def _send(
        self, request: "_Request", kind: Kind, attributes: _Attributes, key: bytes | None
    ) -> None:
        if self._settings.software is not None:
            attributes.append((Attr.SOFTWARE, self._settings.software))
        asked = request.received.message
        message = Message(kind, asked.method, asked.transaction_id, attributes)
        datagram = message.encode(key, fingerprinted=request.received.fingerprinted)
        self._commands.append(SendMessage(request.client, datagram))


class Refused(Exception):
    """A request cannot be granted: *code* is for the client, *reason* for the log."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class _Request:
    """A request on its way through the handlers."""

    received: Received
    client: ClientAddress
    key: bytes | None  # of the user it claims to be from, if that is true
    now: float  # monotonic seconds
    unix_now: float

    @property
    def mapped_address(self) -> Address:
        """The client's address as seen from here. RFC 8489 §14.2."""
        host, port = self.client[0][:2]
        return host, port


@dataclass(slots=True)
class _Opening:
    """An Allocate that waits for its port."""

    request: _Request
    username: str
    families: tuple[Family, ...]
    tried: set[int]  # ports that turned out to be held by other processes


def _lifetime(requested: int) -> int:
    """Return the lifetime granted, in seconds.

    RFC 8656 §7.2 would raise what is under 600; a client that asks for less gets less.
    """
    return min(requested, MAX_LIFETIME)


def _require_known_attributes(request: _Request) -> None:
    """RFC 8489 §6.3.1: 420 for what must be understood and is not."""
    unknown = request.received.unknown
    if unknown:
        raise Refused(ErrorCode.UNKNOWN_ATTRIBUTE, f"{len(unknown)} unknown attributes")
