"""The TURN server: a pure state machine. Messages and time go in, commands come out.

After each input take :meth:`Server.next_command` until it is None, and carry the commands
out in that order. This is the entrance: it lets requests in and hands each to its method's
handler, in :mod:`relay.turn.allocate` and :mod:`relay.turn.channels`. Relayed data never
passes through here: ``BindChannel`` and ``UnbindChannel`` say what is relayed in channels,
``InstallPermission`` and ``RemovePermission`` what is by indications.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final

from relay.stun.attributes import Attr, UndecodableAttribute
from relay.stun.const import ErrorCode, Family, Method
from relay.stun.raw import (
    TooManyAttributes,
    WrongFingerprint,
    is_request,
    read_attributes,
    read_header,
)
from relay.turn.admission import Admission
from relay.turn.allocate import AllocationHandler
from relay.turn.auth import Authenticator, AuthFailure
from relay.turn.channels import ChannelHandler
from relay.turn.commands import (
    ClientAddress,
    Command,
    Drop,
    PeerAddress,
    PortFailure,
    connection_of,
)
from relay.turn.peers import PeerPolicy
from relay.turn.ports import FreePorts
from relay.turn.ratelimit import RateLimiter
from relay.turn.request import Answers, Refused, Request, require_known_attributes
from relay.turn.settings import Settings
from relay.turn.state import State
from relay.turn.tables import Tables
from relay.turn.transfer import Transfer

# Units of work, for RateLimiter.
ANSWER: Final = 1
SIGNATURE: Final = 1  # to verify one costs about as much again
CONNECTION: Final = {"tcp": 2, "tls": 20}  # to accept one, by transport; TLS with its handshake


# Methods that others have. RFC 6062 §6.1
_KNOWN_ELSEWHERE: Final = {
    method: f" ({name}, RFC 6062: TCP towards peers)"
    for method, name in ((0x00A, "Connect"), (0x00B, "ConnectionBind"))
}


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
        self._commands: deque[Command] = deque()
        free_ports = FreePorts(settings.ports, settings.listen_port, randbelow)
        self._tables = Tables(now, free_ports, self._commands)
        self._answers = Answers(authenticator, self._commands, settings.software)
        self._state = State(
            settings, peer_policy, self._tables, self._answers, commands=self._commands
        )
        rates = settings.unauthenticated_rate_per_prefix, settings.unauthenticated_rate
        # One for datagrams, one for connections: neither can use up what the other may ask for.
        self._limiter, self._connection_limiter = RateLimiter(*rates), RateLimiter(*rates)
        self._admission = Admission(authenticator)
        self._allocations = AllocationHandler(self._state, randbelow)
        self._channels = ChannelHandler(self._state)
        self.transfer = Transfer(
            self._state,
            self._admission,
            self._channels,
            (self._limiter, self._connection_limiter),
        )
        self._handlers: dict[int, Callable[[Request], None]] = {
            Method.ALLOCATE: self._allocations.allocate,
            Method.REFRESH: self._allocations.refresh,
            Method.CREATE_PERMISSION: self._channels.create_permission,
            Method.CHANNEL_BIND: self._channels.channel_bind,
        }

    def handle_request(
        self, datagram: bytes, client: ClientAddress, *, now: float, unix_now: float
    ) -> Drop | None:
        """Serve a STUN datagram. Returns why it was dropped, or None if it was a request.

        *now* is in monotonic seconds, *unix_now* in seconds of Unix time.

        Each step costs more than the one before, and comes only after the cheaper ones had nothing
        against it: the header, who asks and how often, the attributes, the signature, the method.
        """
        header = read_header(datagram)
        if header is None:
            return Drop.MALFORMED_STUN
        if not is_request(header):
            return Drop.NOT_A_REQUEST
        allocation = self._tables.of_client(client)
        if allocation is not None and allocation.budget.is_spent(now):
            return Drop.CLIENT_RATE
        limiter, source = self._limiter, None
        proof = self._admission.proof_of_address(datagram, client)
        is_proven = proof is not None
        if connection_of(client) is not None:
            # Nobody opens a connection from a forged address.
            limiter, is_proven = self._connection_limiter, True
        if allocation is not None and is_proven:
            allocation.budget.spend(now)
            self._tables.note(client)
        else:
            source = limiter.source(client[0][0], is_proven=is_proven)
            over = limiter.refusal(source, now)
            if over is not None:
                return over
            limiter.count(source, ANSWER, now)
        try:
            message = read_attributes(datagram, header)
        except WrongFingerprint:
            return Drop.WRONG_FINGERPRINT
        except TooManyAttributes as error:
            message = error.message
            if message.method != Method.CREATE_PERMISSION:
                return Drop.MALFORMED_STUN
            # Somebody who means well, perhaps: it can be told to ask for fewer peers at once.
            request = Request(message, client, None, now, unix_now)
            self._answers.refuse(request, Refused(ErrorCode.BAD_REQUEST, str(error)))
            return None
        if source is not None and message.is_signed:
            limiter.count(source, SIGNATURE, now)
        key = self._admission.signing_key(message)
        self._serve(Request(message, client, key, now, unix_now, proof))
        return None

    def handle_connected(self, client: ClientAddress, *, now: float) -> Drop | None:
        """Let a client have a connection. Returns why it may not, or None."""
        connection = connection_of(client)
        assert connection is not None
        limiter = self._connection_limiter
        source = limiter.source(client[0][0], is_proven=True)
        over = limiter.refusal(source, now)
        if over is None:
            limiter.count(source, CONNECTION[connection.transport], now)
        return over

    def handle_disconnected(self, client: ClientAddress) -> None:
        """End what a client has whose connection has ended: it was the client's 5-tuple."""
        allocation = self._tables.of_client(client)
        if allocation is not None:
            self._tables.delete(allocation)

    def has_allocation(self, client: ClientAddress) -> bool:
        """Tell if a client has an allocation, perhaps one that is about to expire."""
        return self._tables.of_client(client) is not None

    def handle_port_opened(
        self, port: int, failures: Mapping[Family, PortFailure], *, now: float
    ) -> None:
        """Go on with the Allocate for which *port* was opened, but for what *failures* tells."""
        self._allocations.port_opened(port, failures, now)

    def handle_timeout(self, now: float) -> None:
        """Let everything end whose time has come."""
        self._tables.expire(now)
        self._channels.recheck_some(now)

    def poll_timeout(self) -> float | None:
        """Return when to call :meth:`handle_timeout`, in monotonic seconds, or None."""
        return 0.0 if self._channels.is_rechecking else self._tables.next_deadline

    def next_command(self) -> Command | None:
        """Return the next thing to do, or None when all is done."""
        return self._commands.popleft() if self._commands else None

    def drain(self) -> None:
        """Refuse new allocations from here on; those that exist live on."""
        self._allocations.draining = True

    def change_settings(self, settings: Settings) -> None:
        """Go on with other settings. What exists already is not measured by them."""
        self._state.settings = settings
        self._answers.software = settings.software
        for limiter in (self._limiter, self._connection_limiter):
            limiter.set_rates(
                settings.unauthenticated_rate_per_prefix, settings.unauthenticated_rate
            )

    def change_peer_policy(self, peer_policy: PeerPolicy, *, now: float) -> None:
        """Go on with other rules, and unbind the channels that they forbid.

        At once if there are few channels; else some at a time, so that nobody's data has to
        wait for all of them: :meth:`poll_timeout` asks for the next.
        """
        self._channels.change_peer_policy(peer_policy, now)

    def reaches_outside(self, peer: PeerAddress) -> bool | None:
        """Tell whether datagrams to *peer* may leave this relay, None if none may be sent to it."""
        return self._channels.reaches_outside(peer)

    def refuse_send(self) -> Drop:
        """Say why the Send indications of a client without any permission are dropped."""
        if self._state.settings.send_indications:
            return Drop.NO_PERMISSION
        self._state.hints.give(
            "Send",
            "a client sends Send indications, which are dropped; --send-indications relays them",
        )
        return Drop.SEND_INDICATIONS_OFF

    @property
    def allocations(self) -> int:
        """How many allocations there are."""
        return len(self._tables)

    @property
    def channels(self) -> int:
        """How many channels are bound."""
        return self._tables.bound

    @property
    def permissions(self) -> int:
        """How many permissions there are."""
        return self._tables.permissions

    @property
    def responses(self) -> Counter[tuple[str, str]]:
        """How many answers were sent, by method, and error code or "success"."""
        return self._answers.sent

    @property
    def auth_failures(self) -> Counter[AuthFailure]:
        """How many signed requests were not believed, by reason."""
        return self._admission.failures

    @property
    def refused_peers(self) -> Counter[str]:
        """How often peers were refused, by the rule that forbids them."""
        return self._channels.refused

    def check(self) -> None:
        """Assert that the state agrees with itself. For tests."""
        self._tables.check()
        self._allocations.check()

    def _serve(self, request: Request) -> None:
        """Answer a request."""
        try:
            self._dispatch(request)
        except Refused as refused:
            self._answers.refuse(request, refused)
        except UndecodableAttribute as error:
            self._answers.refuse(request, Refused(ErrorCode.BAD_REQUEST, str(error)))

    def _dispatch(self, request: Request) -> None:
        message = request.message
        if message.truncated:
            raise Refused(ErrorCode.BAD_REQUEST, "an attribute runs past the end")
        method = message.method
        if method == Method.BINDING:
            self._binding(request)
            return
        handler = self._handlers.get(method)
        if handler is None:
            what = _KNOWN_ELSEWHERE.get(method, "")
            self._state.hints.give(
                f"method {method}", f"a client asks for method {method:#05x}{what}: there is none"
            )
            raise Refused(ErrorCode.BAD_REQUEST, f"unknown method {method:#05x}")
        self._admission.admit(request)
        handler(request)

    def _binding(self, request: Request) -> None:
        """RFC 8489 §6.3.1: what is your address, seen from here."""
        require_known_attributes(request)
        mapped_address = (Attr.XOR_MAPPED_ADDRESS, request.mapped_address)
        self._answers.success(request, [mapped_address], key=None)
