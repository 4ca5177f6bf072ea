"""A TURN client on a real socket, for tests. It waits for answers, and never sleeps."""

import os
import socket
import ssl
import time
from types import TracebackType
from typing import Any, Self

from relay.probe.client import Answered, Client, Credential, Signature
from relay.stun.address import Address
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import HEADER_SIZE, UDP_PROTOCOL, Family, Kind, Method
from relay.stun.message import Message, decode
from relay.turn import channeldata
from relay.turn.framing import PADDING
from relay.turn.users import DEFAULT_REALM

TIMEOUT = 10.0  # seconds; only a failing test waits for so long


class TurnError(Exception):
    """An error response."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class TurnClient:
    """One client, on a socket of its own."""

    def __init__(
        self,
        server: Address,
        username: str,
        password: str,
        *,
        bind: str = "",
        realm: str = DEFAULT_REALM,
    ) -> None:
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        self.socket = self._connect(server, family, bind)
        self.socket.settimeout(TIMEOUT)
        self.client = Client(Credential(username, password), os.urandom)
        self._realm = realm

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    @property
    def address(self) -> Address:
        host, port = self.socket.getsockname()[:2]
        return host, port

    def maps(self) -> Address:
        """Ask for the own address by a Binding request."""
        request = Message(Kind.REQUEST, Method.BINDING, self.client.new_transaction_id())
        self.client.transact(time.monotonic(), request.encode())
        mapped = self._answer().message.get(Attr.XOR_MAPPED_ADDRESS)
        assert mapped is not None
        return mapped

    def allocates(self, family: Family | None = None, lifetime: int | None = None) -> Address:
        """Allocate and return the relayed address. Raises TurnError."""
        attributes: list[tuple[Attribute[Any], Any]] = [(Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)]
        if family is not None:
            attributes.append((Attr.REQUESTED_ADDRESS_FAMILY, family))
        if lifetime is not None:
            attributes.append((Attr.LIFETIME, lifetime))
        relayed = self.request(Method.ALLOCATE, *attributes).get(Attr.XOR_RELAYED_ADDRESS)
        assert relayed is not None
        return relayed

    def refreshes(self, lifetime: int) -> None:
        """Refresh. Raises TurnError."""
        self.request(Method.REFRESH, (Attr.LIFETIME, lifetime))

    def binds(self, number: int, peer: Address) -> None:
        """Bind a channel. Raises TurnError."""
        self.request(
            Method.CHANNEL_BIND, (Attr.CHANNEL_NUMBER, number), (Attr.XOR_PEER_ADDRESS, peer)
        )

    def permits(self, *peers: Address) -> None:
        """Install permissions. Raises TurnError."""
        self.request(Method.CREATE_PERMISSION, *((Attr.XOR_PEER_ADDRESS, peer) for peer in peers))

    def request(self, method: Method, *attributes: tuple[Attribute[Any], Any]) -> Message:
        """Send an authenticated request, again after a first 401 or 438. Raises TurnError."""
        self.client.request(time.monotonic(), method, *attributes)
        answer = self._answer()
        if answer.code is not None:
            raise TurnError(answer.code)
        assert answer.signature is Signature.GOOD
        assert self.client.realm == self._realm
        return answer.message

    def sends(self, number: int, payload: bytes) -> None:
        """Send ChannelData."""
        self._send(channeldata.HEADER.pack(number, len(payload)) + payload)

    def indicates(
        self, peer: Address, payload: bytes, *attributes: tuple[Attribute[Any], Any]
    ) -> None:
        """Send a Send indication."""
        values: list[tuple[Attribute[Any], Any]] = [
            (Attr.XOR_PEER_ADDRESS, peer),
            (Attr.DATA, payload),
            *attributes,
        ]
        self._send(Message(Kind.INDICATION, Method.SEND, os.urandom(12), values).encode())

    def hears(self) -> Message:
        """Wait for a Data indication."""
        message = decode(self._receive()).message
        assert (message.kind, message.method) == (Kind.INDICATION, Method.DATA)
        return message

    def receives(self) -> tuple[int, bytes]:
        """Wait for ChannelData: its number and payload. The frame must not be padded."""
        datagram = self._receive()
        number, length = channeldata.HEADER.unpack_from(datagram)
        assert len(datagram) == channeldata.HEADER_SIZE + length
        return number, datagram[channeldata.HEADER_SIZE :]

    def _answer(self) -> Answered:
        """Send what is to be sent, and wait for the answer to it."""
        while True:
            while self.client.outgoing:
                self._send(self.client.outgoing.popleft())
            datagram = self._receive()
            if datagram[0] <= 0x03:  # data may come in between
                self.client.handle_datagram(datagram, time.monotonic())
            while self.client.events:
                event = self.client.events.popleft()
                if isinstance(event, Answered):
                    return event

    def _connect(self, server: Address, family: int, bind: str) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if bind:
            sock.bind((bind, 0))
        sock.connect(server)
        return sock

    def _send(self, message: bytes) -> None:
        self.socket.send(message)

    def _receive(self) -> bytes:
        return self.socket.recv(65536)


class StreamClient(TurnClient):
    """One client on a connection: over TCP, or with a *context* over TLS."""

    def __init__(
        self,
        server: Address,
        username: str,
        password: str,
        *,
        realm: str = DEFAULT_REALM,
        context: ssl.SSLContext | None = None,
        first: bytes = b"",
    ) -> None:
        """Connect, and begin with the bytes *first*, in front of a handshake."""
        self._context = context
        self._first = first
        super().__init__(server, username, password, realm=realm)

    def _connect(self, server: Address, _family: int, _bind: str) -> socket.socket:
        sock = socket.create_connection(server, TIMEOUT)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(self._first)
            if self._context is None:
                return sock
            return self._context.wrap_socket(sock, server_hostname="relay.test")
        except BaseException:
            sock.close()
            raise

    def _send(self, message: bytes) -> None:
        self.socket.sendall(message + PADDING[len(message) % 4])

    def _receive(self) -> bytes:
        """Return the next message, without padding, which has to be there."""
        header = self._exactly(4)
        kind, length = channeldata.HEADER.unpack(header)
        if kind >= channeldata.RFC8656_NUMBERS[0]:
            return header + self._exactly(length + -length % 4)[:length]
        return header + self._exactly(HEADER_SIZE - 4 + length)

    def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            part = self.socket.recv(size - len(received))
            if not part:
                raise ConnectionError("the relay has closed the connection")
            received += part
        return received


class Peer:
    """A socket that knows nothing of TURN."""

    def __init__(self, family: Family = Family.IPV4, port: int = 0, host: str = "") -> None:
        ipv6 = family is Family.IPV6
        self.socket = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.socket.bind((host or ("::1" if ipv6 else "127.0.0.1"), port))
        self.socket.settimeout(TIMEOUT)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def sends(self, payload: bytes, to: tuple[str, int]) -> None:
        self.socket.sendto(payload, to)

    def receives(self) -> tuple[bytes, tuple[str, int]]:
        payload, source = self.socket.recvfrom(65536)
        return payload, source[:2]
