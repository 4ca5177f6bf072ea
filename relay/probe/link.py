"""The ends that a probe plays, on sockets: clients over UDP, TCP and TLS, and peers.

Everything waits in :func:`wait`, for all ends at once.
"""

import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Protocol, Self

from relay.net.buffers import set_buffers
from relay.probe.client import TIME_LIMIT, Answered, Client, Credential, Data, NoAnswer, Pair
from relay.stun.address import Address
from relay.stun.const import Method
from relay.turn.framing import NotFramed

QUEUE_SIZE: Final = 4 << 20  # bytes that the kernel is asked to hold for each socket
LARGEST: Final = 65536
_ALPN: Final = "stun.turn"  # RFC 7443


class LinkError(Exception):
    """The server cannot be talked to; the text says why."""


class Unanswered(LinkError):
    """A request was sent, again and again, and nothing came."""


class End(Protocol):
    """One of those who wait."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""

    def handle_readable(self, now: float) -> None:
        """Read what there is."""

    def next_timeout(self) -> float | None:
        """Return when :meth:`handle_timeout` is due, by the monotonic clock."""

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""


def wait(ends: Sequence[End], is_over: Callable[[], bool], seconds: float) -> bool:
    """Serve *ends* until ``is_over()``, or for so many *seconds*; return whether it is over."""
    deadline = time.monotonic() + seconds
    poller = select.poll()
    by_descriptor = {end.fileno(): end for end in ends}
    for descriptor in by_descriptor:
        poller.register(descriptor, select.POLLIN)
    while not is_over():
        now = time.monotonic()
        if now >= deadline:
            return False
        due = [timeout for end in ends if (timeout := end.next_timeout()) is not None]
        patience = max(0.0, min([deadline, *due]) - now)
        ready = poller.poll(int(patience * 1000) + 1)
        now = time.monotonic()
        for descriptor, _ in ready:
            by_descriptor[descriptor].handle_readable(now)
        for end in ends:
            timeout = end.next_timeout()
            if timeout is not None and now >= timeout:
                end.handle_timeout(now)
    return True


class Link:
    """A client of a server, on a socket of its own. What comes from peers is in :attr:`data`."""

    def __init__(
        self,
        sock: socket.socket,
        credential: Credential | None,
        *,
        is_stream: bool = False,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        """Take a socket that is connected to the server; it is closed with the link."""
        sock.setblocking(False)
        self.socket = sock
        self.is_stream = is_stream
        self.client = Client(credential, os.urandom, is_stream=is_stream, time_limit=time_limit)
        self.data: deque[Data] = deque()
        self.strays: deque[bytes] = deque()
        self.error: LinkError | None = None  # why there is nobody at the other end any more
        self._answers: dict[bytes, Answered | NoAnswer] = {}
        self._unsent = bytearray()  # of a stream

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
        """Close the socket."""
        self.socket.close()

    @property
    def local_address(self) -> Address:
        """Where this end is, as this machine sees it."""
        host, port = self.socket.getsockname()[:2]
        return host, port

    def request(self, method: Method, *attributes: Pair) -> Answered:
        """Send a request and wait for its answer, an error too.

        Raises Unanswered, or another LinkError.
        """
        return self._answer_to(self.client.request(time.monotonic(), method, *attributes))

    def transact(self, encoded: bytes, key: bytes | None = None) -> Answered:
        """Send a request as it is, and wait for its answer. Raises LinkError.

        By *key* the answer is checked.
        """
        return self._answer_to(self.client.transact(time.monotonic(), encoded, key))

    def indicate(self, peer: Address, payload: bytes) -> None:
        """Send to a peer by an indication."""
        self.client.indicate(peer, payload)
        self.flush()

    def send_on(self, channel: int, payload: bytes) -> None:
        """Send to a peer by ChannelData."""
        self.client.send_on(channel, payload)
        self.flush()

    def send(self, message: bytes) -> None:
        """Send bytes as they are, padded in a stream."""
        self.client.send(message)
        self.flush()

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are, in a stream too."""
        self.client.outgoing.append(data)
        self.flush()

    def flush(self) -> None:
        """Send what the client has to say."""
        outgoing = self.client.outgoing
        while outgoing:
            message = outgoing.popleft()
            if self.is_stream:
                self._unsent += message
            else:
                try:
                    self.socket.send(message)
                except BlockingIOError:
                    pass  # as lost as in any other queue
                except OSError as error:
                    self._fail(error)
        if self._unsent:
            self._send_stream()

    def payloads(self) -> list[bytes]:
        """Return what has come from peers since the last time, and forget it."""
        found = [data.payload for data in self.data]
        self.data.clear()
        return found

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self.socket.fileno()

    def handle_readable(self, now: float) -> None:
        """Read what there is."""
        while True:
            try:
                data = self.socket.recv(LARGEST)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                self._fail(error)
                break
            if not self.is_stream:
                self.client.handle_datagram(data, now)
            elif not data:
                self.error = self.error or LinkError("the server has closed the connection")
                break
            else:
                try:
                    self.client.handle_stream(data, now)
                except NotFramed as error:
                    self.error = LinkError(f"the server sends what is no TURN: {error}")
                    break
        self._take_events()
        self.flush()

    def next_timeout(self) -> float | None:
        """Return when something is to be sent again, by the monotonic clock."""
        return time.monotonic() + 0.001 if self._unsent else self.client.next_timeout()

    def handle_timeout(self, now: float) -> None:
        """Send again what is due."""
        self.client.handle_timeout(now)
        self._take_events()
        self.flush()

    def _answer_to(self, request: bytes) -> Answered:
        self.flush()
        wait([self], lambda: request in self._answers or self.error is not None, 10 * TIME_LIMIT)
        answer = self._answers.pop(request, None)
        if isinstance(answer, Answered):
            return answer
        self.client.forget(request)
        if answer is None and self.error is not None:
            error, self.error = self.error, self.error if self.is_stream else None
            raise error
        times = answer.transmissions if answer is not None else 1
        raise Unanswered("no answer" if times == 1 else f"no answer to {times} requests")

    def _take_events(self) -> None:
        for event in self.client.events:
            if isinstance(event, Data):
                self.data.append(event)
            elif isinstance(event, Answered | NoAnswer):
                self._answers[event.request] = event
            else:
                self.strays.append(event.data)
        self.client.events.clear()

    def _send_stream(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._fail(error)
            self._unsent.clear()

    def _fail(self, error: OSError) -> None:
        self.error = LinkError(_in_words(error))


class Peer:
    """A UDP socket that knows nothing of TURN. What comes to it is in :attr:`received`."""

    is_stream = False

    def __init__(self, host: str, port: int = 0) -> None:
        """Bind it to an address of this machine. Raises OSError."""
        self.socket = _udp_socket(host)
        try:
            self.socket.bind((host, port))
        except BaseException:
            self.socket.close()
            raise
        self.socket.setblocking(False)
        self.received: deque[tuple[bytes, Address]] = deque()

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
        """Where it is, as this machine sees it."""
        host, port = self.socket.getsockname()[:2]
        return host, port

    def payloads(self) -> list[bytes]:
        """Return what has come since the last time, and forget it."""
        found = [payload for payload, _ in self.received]
        self.received.clear()
        return found

    def send(self, payload: bytes, to: Address) -> None:
        """Send a datagram; what the kernel does not take is lost."""
        with suppress(OSError):
            self.socket.sendto(payload, to)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self.socket.fileno()

    def handle_readable(self, _now: float) -> None:
        """Read what there is."""
        with suppress(OSError):  # of none left, and of ICMP errors
            while True:
                payload, source = self.socket.recvfrom(LARGEST)
                self.received.append((payload, source[:2]))

    def next_timeout(self) -> float | None:
        """Return None: it sends nothing again."""
        return None

    def handle_timeout(self, now: float) -> None:
        """Do nothing."""


def open_udp(server: Address, *, local: str | None = None) -> socket.socket:
    """Return a socket that is connected to a server. Raises LinkError."""
    sock = _udp_socket(server[0])
    try:
        if local is not None:
            sock.bind((local, 0))
        sock.connect(server)
    except OSError as error:
        sock.close()
        raise LinkError(_in_words(error)) from error
    return sock


def open_tcp(server: Address, timeout: float) -> socket.socket:
    """Return a connection to a server. Raises LinkError."""
    try:
        sock = socket.create_connection(server, timeout)
    except OSError as error:
        raise LinkError(_in_words(error)) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def open_tls(sock: socket.socket, name: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a connection with TLS, after the handshake. Raises LinkError, and closes *sock* then.

    *name* is what the certificate is to be for: a name, or an address.
    """
    context.set_alpn_protocols([_ALPN])
    try:
        return context.wrap_socket(sock, server_hostname=name)
    except OSError as error:  # of which SSLError is one
        sock.close()
        raise LinkError(_in_words(error)) from error


def _udp_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    set_buffers(sock, QUEUE_SIZE)
    return sock


def _in_words(error: OSError) -> str:
    """Say what an error means to somebody who asks a server."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not good: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {error.reason or error}"
    if isinstance(error, ConnectionRefusedError):
        return "refused: nothing listens at that port"
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
