"""A TCP or TLS connection whose every wait can be broken off.

Whatever waits here, for DNS, TCP, TLS or a byte, waits for a stop signal as well, and only
until a deadline. It has the few methods that websocket-client asks of a socket.
"""

import logging
import os
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Any, Final

logger = logging.getLogger("relay.portal")

ADDRESS_TIMEOUT: Final = 4.0  # seconds for one of several addresses to answer

AddressInfo = tuple[Any, ...]  # as getaddrinfo gives it


class Stopped(Exception):
    """A wait was broken off because the portal client is to stop."""


class StreamError(Exception):
    """The connection failed; the text says how."""


class Stop:
    """A flag that any thread may raise, and that a wait can watch."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """Break off every wait, from here on."""
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the flag is raised."""
        return self._fd

    def close(self) -> None:
        """Release the descriptor. Nothing may wait any more."""
        os.close(self._fd)

    def wait(self, timeout: float) -> None:
        """Wait for *timeout* seconds. Raises Stopped."""
        self.wait_for(None, 0, time.monotonic() + timeout)

    def wait_for(self, fd: int | None, events: int, deadline: float) -> bool:
        """Wait until *fd* is ready for *events*; return False at the deadline. Raises Stopped."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if fd is not None:
            poll.register(fd, events)
        while True:
            remaining = deadline - time.monotonic()
            ready = {ready_fd for ready_fd, _ in poll.poll(max(0, remaining * 1000))}
            if self._fd in ready:
                raise Stopped
            if ready or remaining <= 0:
                return bool(ready)


class Stream:
    """A connected socket, plain or TLS, for one thread."""

    def __init__(self, sock: socket.socket, stop: Stop) -> None:
        """Own *sock*, which must not block."""
        self._sock = sock
        self._stop = stop
        self._deadline = 0.0
        self._allowance = 0
        self._ahead = b""  # what wait() had to read, to know that there is something

    def allow(self, seconds: float, size: int | None = None) -> None:
        """Let what follows take so many *seconds*, and read at most *size* bytes.

        Without *size*, what may still be read stays as it is.
        """
        self._deadline = time.monotonic() + seconds
        if size is not None:
            self._allowance = size

    def secure(self, context: ssl.SSLContext, host: str) -> None:
        """Turn to TLS. Raises StreamError, Stopped."""
        try:
            self._sock = context.wrap_socket(
                self._sock, server_hostname=host, do_handshake_on_connect=False
            )
            self._retry(self._sock.do_handshake)
        except (OSError, ValueError) as error:  # of which ssl.SSLError is one
            raise StreamError(f"TLS failed: {_reason(error)}") from error

    def wait(self, timeout: float) -> bool:
        """Wait for something to read, up to *timeout* seconds; tell if it came. Raises Stopped."""
        deadline = time.monotonic() + timeout
        while not self._ahead:
            if not self._is_pending() and not self._stop.wait_for(
                self._sock.fileno(), select.POLLIN, deadline
            ):
                return False
            self._stop.wait(0)  # in a flood there is always something pending
            if not isinstance(self._sock, ssl.SSLSocket):
                return True
            try:
                self._ahead = self._sock.recv(1)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue  # a record with nothing for us: a ticket, a new key
            return True  # of the end as well
        return True

    def _is_pending(self) -> bool:
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    def recv(self, size: int) -> bytes:
        """Read up to *size* bytes, none at the end. Raises StreamError, Stopped, OSError."""
        received, self._ahead = self._ahead, b""
        if not received:
            received = self._retry(self._sock.recv, size)
        self._allowance -= len(received)
        if self._allowance < 0:
            raise StreamError("a message is too large")
        return received

    def send(self, data: bytes) -> int:
        """Write some of *data*, and return how much. Raises StreamError, Stopped, OSError."""
        sent: int = self._retry(self._sock.send, data)
        return sent

    def gettimeout(self) -> float:
        """Tell websocket-client to leave waiting to us."""
        return 0.0

    def settimeout(self, timeout: float | None) -> None:
        """Do nothing: there are deadlines."""

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close it, without saying goodbye."""
        self._sock.close()

    def _retry(self, operation: Any, *arguments: Any) -> Any:  # noqa: ANN401
        """Call *operation* until it need not wait."""
        while True:
            try:
                return operation(*arguments)
            except (ssl.SSLWantReadError, BlockingIOError) as error:
                writing = isinstance(error, BlockingIOError) and operation == self._sock.send
                events = select.POLLOUT if writing else select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            if not self._stop.wait_for(self._sock.fileno(), events, self._deadline):
                raise StreamError("timed out")


def dial(host: str, port: int, stop: Stop, timeout: float) -> Stream:
    """Connect to the first address of *host* that answers. Raises StreamError, Stopped."""
    deadline = time.monotonic() + timeout
    failure = "no address"
    addresses = _resolve(host, port, stop, deadline)
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        is_last = index == len(addresses) - 1
        until = deadline if is_last else min(deadline, time.monotonic() + ADDRESS_TIMEOUT)
        try:
            return Stream(_connect(family, kind, protocol, address, stop, until), stop)
        except OSError as error:
            failure = f"{address[0]}: {_reason(error)}"
            logger.debug("cannot connect to %s", failure)
    raise StreamError(failure)


def _resolve(host: str, port: int, stop: Stop, deadline: float) -> list[AddressInfo]:
    """Look *host* up, in a thread of its own: nothing can break off a call to the resolver."""
    found: list[AddressInfo] = []
    failure: list[OSError] = []
    reader, writer = socket.socketpair()

    def look_up() -> None:
        with writer:
            try:
                found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except OSError as error:
                failure.append(error)
            except UnicodeError:
                failure.append(OSError(f"{host!r} is no name of a host"))

    with reader:
        threading.Thread(target=look_up, name="portal-resolver", daemon=True).start()
        if not stop.wait_for(reader.fileno(), select.POLLIN, deadline):
            raise StreamError(f"cannot look up {host}: timed out")
    if failure:
        raise StreamError(f"cannot look up {host}: {_reason(failure[0])}")
    return found


def _connect(
    family: int,
    kind: int,
    protocol: int,
    address: Any,  # noqa: ANN401
    stop: Stop,
    until: float,
) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        with suppress(BlockingIOError):
            sock.connect(address)
        if not stop.wait_for(sock.fileno(), select.POLLOUT, until):
            raise TimeoutError("timed out")
        _raise_for(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _raise_for(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
