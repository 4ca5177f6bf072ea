"""Messages between the running process and its successor, with descriptors.

Each is one packet of a SOCK_SEQPACKET pair: its kind, and descriptors (SCM_RIGHTS). What it tells
is JSON in a memfd, which is the first of them: so it has no limit, waits for nobody, and secrets
never touch a disk.
"""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

MOST_DESCRIPTORS: Final = 250  # in one message, besides that of its body. SCM_MAX_FD is 253
_LONGEST_KIND: Final = 64  # bytes


class Closed(Exception):
    """The other process has closed its end, or has ended."""


@dataclass(slots=True)
class Message:
    """What the other process says. Its descriptors are the receiver's to close."""

    kind: str
    body: Any
    descriptors: list[int]

    def close(self) -> None:
        """Close the descriptors; for what nobody wants."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        """Own *sock*."""
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Return both ends of a new one. Raises OSError."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """Return the descriptor, which is readable when there is a message, or the end."""
        return self._sock.fileno()

    def wait_at_most(self, seconds: float | None) -> None:
        """Let sending and receiving take so long; None is for ever."""
        self._sock.settimeout(seconds)

    def send(self, kind: str, body: object = None, descriptors: Iterable[int] = ()) -> None:
        """Say something. Raises OSError, TimeoutError among them; Closed."""
        memory = os.memfd_create("relay-upgrade", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(json.dumps(body, separators=(",", ":")).encode())
            socket.send_fds(self._sock, [kind.encode()], [memory, *descriptors])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        finally:
            os.close(memory)

    def receive(self) -> Message:
        """Return the next message, and wait for it.

        Raises Closed; OSError, TimeoutError among them; ValueError for what is no message.
        """
        try:
            kind, descriptors, flags, _ = socket.recv_fds(
                self._sock, _LONGEST_KIND, MOST_DESCRIPTORS + 1, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as error:
            raise Closed from error
        if not kind:
            raise Closed
        message = Message(kind.decode(errors="replace"), None, list(descriptors))
        try:
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or not descriptors:
                # Where the limit of open files is reached, the kernel leaves some out.
                raise ValueError(f"message {message.kind!r}: it has lost descriptors")
            message.body = _read(message.descriptors.pop(0))
        except BaseException:
            message.close()
            raise
        return message

    def last_word(self) -> str | None:
        """Hear nothing from here on; return what the other process has said by now, if anything.

        Whatever it says after that it is told that nobody hears.
        """
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
            message = self.receive()
        except (Closed, OSError, ValueError):
            return None
        message.close()
        return message.kind

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


def _read(memory: int) -> Any:  # noqa: ANN401
    """Return what is in a memfd, and close it. Raises OSError, ValueError."""
    with os.fdopen(memory, "rb") as file:
        file.seek(0)
        return json.loads(file.read())
