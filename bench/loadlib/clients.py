"""TURN clients by the thousand: each a socket with an allocation and its channels.

Works with any TURN server over UDP. Requests are pipelined: a window of them is on its way at
a time, and one that stays without an answer is sent again.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from bench.loadlib.mmsg import SOL_UDP, UDP_GRO
from relay.stun.address import Address, format_endpoint
from relay.stun.attributes import Attr, Attribute, DecodeError
from relay.stun.const import UDP_PROTOCOL, Family, Kind, Method
from relay.stun.integrity import long_term_key
from relay.stun.message import Message, decode

WINDOW: Final = 64  # requests on their way at a time
FIRST_TIMEOUT: Final = 0.5  # seconds; doubles with each retransmission, RFC 8489 §6.2.1
MOST_ATTEMPTS: Final = 4
# Seconds between attempts. Ports come back soon, and coturn knows them from the client before for
# a while after it has let go of its allocation: it answers 437 then.
FORGETS_WITHIN: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
LIFETIME: Final = 3600  # seconds, asked for; channels and permissions end sooner
RECEIVE_BUFFER: Final = 4 << 20  # bytes
_SO_RCVBUFFORCE: Final = 33  # past net.core.rmem_max, for root

Pair = tuple[Attribute[Any], Any]


class LoadError(Exception):
    """The server, or this machine, does not let the load begin. The text says what happened."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A username and its password."""

    username: str
    password: str


class Client:
    """A socket connected to the server, and what the server has said to it."""

    def __init__(self, server: Address, credentials: Credentials) -> None:
        self.socket = udp_socket(server[0])
        self._credentials = credentials
        self._signature: list[Pair] = []
        self._key: bytes | None = None
        self.relayed_address: Address = ("", 0)
        try:
            self.socket.connect(server)
        except OSError as error:
            self.socket.close()
            raise LoadError(f"{format_endpoint(*server)}: {error.strerror}") from error

    def request(self, method: Method, *attributes: Pair) -> bytes:
        """Return a request, signed as soon as the server has said for which realm."""
        message = Message(Kind.REQUEST, method, os.urandom(12), [*attributes, *self._signature])
        return message.encode(self._key)

    def heed(self, challenge: Message) -> bool:
        """Sign for realm and nonce of an error response; return False if it has none."""
        realm, nonce = challenge.get(Attr.REALM), challenge.get(Attr.NONCE)
        if realm is None or nonce is None:
            return False
        username, password = self._credentials.username, self._credentials.password
        self._signature = [(Attr.USERNAME, username), (Attr.REALM, realm), (Attr.NONCE, nonce)]
        self._key = long_term_key(username, realm, password)
        return True


class Clients:
    """So many clients of one server."""

    def __init__(self, server: Address, credentials: Credentials, count: int) -> None:
        self._server = server
        self._exchanging = 0.0  # seconds
        self.all: list[Client] = []
        try:
            for _ in range(count):
                self.all.append(Client(server, credentials))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets. The server keeps what :meth:`release` has not given back."""
        for client in self.all:
            client.socket.close()

    def allocate(self, family: Family = Family.IPV4) -> float:
        """Allocate for each client; return how many seconds the server took. Raises LoadError.

        Each asks twice, for the first request is answered by a challenge; both count. Signing
        and reading the answers does not: that is done before and after.
        """
        began = self._exchanging
        ask: list[Pair] = [(Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), (Attr.LIFETIME, LIFETIME)]
        if family is not Family.IPV4:  # which is what it gets unless it asks, RFC 8656 §7.1
            ask.append((Attr.REQUESTED_ADDRESS_FAMILY, family))
        unchallenged = self.all
        for wait in FORGETS_WITHIN:
            requests = [client.request(Method.ALLOCATE, *ask) for client in unchallenged]
            answers = self._exchange(requests, unchallenged)
            unchallenged = [
                client
                for client, answer in zip(unchallenged, answers, strict=True)
                if not client.heed(answer)
            ]
            if not unchallenged:
                break
            time.sleep(wait)
        else:
            raise LoadError(f"Allocate: {_complaint(answers[-1])} instead of a challenge")
        requests = [client.request(Method.ALLOCATE, *ask) for client in self.all]
        for client, answer in zip(self.all, self._exchange(requests), strict=True):
            relayed_address = answer.get(Attr.XOR_RELAYED_ADDRESS)
            if relayed_address is None:
                raise LoadError(f"Allocate: {_complaint(answer)}")
            client.relayed_address = relayed_address
        return self._exchanging - began

    def bind(self, number: int, peer: Address) -> None:
        """Bind a channel to *peer* for each client. Raises LoadError."""
        channel = (Attr.CHANNEL_NUMBER, number), (Attr.XOR_PEER_ADDRESS, peer)
        self._ask(lambda client: client.request(Method.CHANNEL_BIND, *channel))

    def permit(self, peer: Address) -> None:
        """Install a permission for *peer* for each client. Raises LoadError."""
        address = (Attr.XOR_PEER_ADDRESS, peer)
        self._ask(lambda client: client.request(Method.CREATE_PERMISSION, address))

    def release(self) -> None:
        """Give the allocations back. Raises LoadError."""
        self._ask(lambda client: client.request(Method.REFRESH, (Attr.LIFETIME, 0)))

    def _ask(self, request: Callable[[Client], bytes]) -> None:
        """Have each client ask, and once more if its nonce is stale. Raises LoadError."""
        answers = self._exchange([request(client) for client in self.all])
        stale = [
            client
            for client, answer in zip(self.all, answers, strict=True)
            if answer.kind is Kind.ERROR and _code(answer) == 438 and client.heed(answer)
        ]
        if stale:
            answers = self._exchange([request(client) for client in stale], stale)
        for answer in answers:
            if answer.kind is Kind.ERROR:
                raise LoadError(f"{Method(answer.method).name}: {_complaint(answer)}")

    def _exchange(
        self, requests: Sequence[bytes], clients: Sequence[Client] | None = None
    ) -> list[Message]:
        """Send each client's request, and return their answers. Raises LoadError."""
        exchange = _Exchange(self.all if clients is None else clients, requests)
        began = time.perf_counter()
        try:
            answers = exchange.run()
            self._exchanging += time.perf_counter() - began
            return [decode(answer).message for answer in answers]
        except (OSError, DecodeError) as error:
            raise LoadError(f"{format_endpoint(*self._server)}: {error}") from error


class _Exchange:
    """One request of each client, and one answer."""

    def __init__(self, clients: Sequence[Client], requests: Sequence[bytes]) -> None:
        self._sockets = {client.socket.fileno(): client.socket for client in clients}
        self._requests = dict(zip(self._sockets, requests, strict=True))
        self._answers: dict[int, bytes] = {}
        self._waiting: dict[int, tuple[float, int]] = {}  # deadline, attempts so far
        self._complaint = "no answer"

    def run(self) -> list[bytes]:
        """Return the answers, in the clients' order. Raises TimeoutError and OSError."""
        unsent = iter(self._requests)
        with select.epoll() as poll:
            for descriptor in self._requests:
                poll.register(descriptor, select.EPOLLIN)
            while len(self._answers) < len(self._requests):
                while len(self._waiting) < WINDOW:
                    descriptor = next(unsent, -1)
                    if descriptor < 0:
                        break
                    self._send(descriptor, 1)
                readable = poll.poll(FIRST_TIMEOUT / 4, WINDOW)
                for descriptor, _ in readable:
                    self._receive(descriptor)
                if not readable:
                    self._send_again()
        return [self._answers[descriptor] for descriptor in self._requests]

    def _send(self, descriptor: int, attempt: int) -> None:
        timeout = FIRST_TIMEOUT * 2 ** (attempt - 1)
        self._waiting[descriptor] = (time.monotonic() + timeout, attempt)
        with suppress(BlockingIOError, ConnectionRefusedError):
            self._sockets[descriptor].send(self._requests[descriptor])

    def _receive(self, descriptor: int) -> None:
        try:
            datagram = self._sockets[descriptor].recv(2048)
        except BlockingIOError:
            return
        except ConnectionRefusedError:  # coturn closes and opens its socket now and then
            self._complaint = "nobody listens there"
            return
        # Neither late data nor the answer to an earlier request.
        if datagram[8:20] == self._requests[descriptor][8:20]:
            self._answers[descriptor] = datagram
            self._waiting.pop(descriptor, None)

    def _send_again(self) -> None:
        now = time.monotonic()
        for descriptor, (deadline, attempt) in list(self._waiting.items()):
            if deadline > now:
                continue
            if attempt == MOST_ATTEMPTS:
                raise TimeoutError(self._complaint)
            self._send(descriptor, attempt + 1)


def udp_socket(host: str) -> socket.socket:
    """Return a non-blocking socket of that host's family that receives with GRO."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise LoadError(f"cannot open a socket: {error.strerror} (ulimit -n)") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    return sock


def _code(answer: Message) -> int:
    code, _ = answer.get(Attr.ERROR_CODE) or (0, "")
    return code


def _complaint(answer: Message) -> str:
    code, reason = answer.get(Attr.ERROR_CODE) or (0, "")
    return f"{code} {reason}".rstrip()
