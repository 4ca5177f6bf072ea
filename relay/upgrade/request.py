"""Asking a relay for an upgrade, and hearing what came of it: ``firezone-relay --upgrade PID``.

A signal asks as well, but has no answer. So each relay listens to an abstract socket that is named
after its process, or after the process that was started, if that has become a keeper. Only root and
the relay's own user are heard. See unix(7).
"""

import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from relay.net.reactor import Reactor

REQUEST: Final = b"upgrade"
DONE: Final = "done"
TIME_LIMIT: Final = 330.0  # seconds to wait for the answer: more than an upgrade may take
MOST_WAITING: Final = 8  # who have asked and wait
_LONGEST_ANSWER: Final = 2048  # bytes
_NAMES: Final = ("firezone-relay", "relay-keeper")  # of processes that SIGUSR2 does not kill
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: process, user, group
_ROOT: Final = 0


class RequestError(Exception):
    """There is no upgrade; the text says why."""


def name_of(pid: int) -> bytes:
    """Return the name of the socket at which process *pid* is asked."""
    return b"\0firezone-relay/%d" % pid


def ask(pid: int) -> str:
    """Ask process *pid* for an upgrade, wait for it, and return what came of it in words.

    Raises RequestError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIME_LIMIT)
        try:
            sock.connect(name_of(pid))
            if _other_end(sock)[0] != pid:
                return _signal(pid)  # somebody else has taken its name
            sock.send(REQUEST)
            answer = sock.recv(_LONGEST_ANSWER).decode(errors="replace")
        except ConnectionRefusedError:
            return _signal(pid)
        except OSError as error:
            raise RequestError(f"process {pid} does not answer: {error}") from error
    if not answer:
        raise RequestError(f"process {pid} hears only root and its own user, or has just ended")
    kind, _, text = answer.partition(" ")
    if kind != DONE:
        raise RequestError(text)
    return text


def _signal(pid: int) -> str:
    """Ask by a signal where nobody listens, perhaps only not in this network namespace."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise RequestError(f"there is no process {pid}") from None
    fields = dict(line.partition(":\t")[::2] for line in status.splitlines())
    name = fields["Name"]
    if name not in _NAMES:
        raise RequestError(f"process {pid} is {name}, not a relay")
    if not int(fields["SigCgt"], 16) & 1 << signal.SIGUSR2 - 1:
        raise RequestError(
            f"process {pid} does not catch SIGUSR2: it has just been started, or its version "
            "knows nothing of upgrades"
        )
    try:
        os.kill(pid, signal.SIGUSR2)
    except OSError as error:
        raise RequestError(f"process {pid} cannot be sent a signal: {error.strerror}") from None
    return f"process {pid} has been sent SIGUSR2; its log says what came of it"


class Requests:
    """The relay's side: who asks, and waits."""

    def __init__(
        self,
        reactor: Reactor,
        on_request: Callable[[], str | None],
        inherited: socket.socket | None = None,
    ) -> None:
        """Listen as this process, and at what is *inherited* of the one that was started.

        ``on_request()`` begins an upgrade, or says why not.
        """
        self._reactor = reactor
        self._on_request = on_request
        self._listening = [] if inherited is None else [inherited]
        self._waiting: list[socket.socket] = []
        self._silent: list[socket.socket] = []  # who has connected, and not asked yet

    @property
    def first(self) -> socket.socket | None:
        """What is named after the process that was started, if anything is."""
        return self._listening[0] if self._listening else None

    def start(self) -> None:
        """Listen from here on, to root and to the user that this process is by now."""
        own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            own.bind(name_of(os.getpid()))
            own.listen(MOST_WAITING)
        except OSError:  # such as one of another PID namespace, in the same network
            own.close()
        else:
            self._listening.append(own)
        for sock in self._listening:
            sock.setblocking(False)
            with suppress(OSError):  # epoll has a limit; then only signals ask
                self._reactor.register(sock, partial(self._accept, sock))

    def answer(self, answer: str) -> None:
        """Tell all who wait."""
        for sock in self._waiting:
            _tell(sock, answer)
        self._waiting.clear()

    def close(self) -> None:
        """Listen no more."""
        for sock in (*self._waiting, *self._silent, *self._listening):
            sock.close()
        self._waiting.clear()
        self._silent.clear()
        self._listening.clear()

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError:
            return
        _, user = _other_end(sock)
        if user not in {_ROOT, os.geteuid()} or len(self._waiting) >= MOST_WAITING:
            sock.close()
            return
        sock.setblocking(False)
        if len(self._silent) >= MOST_WAITING:
            self._forget(self._silent[0])
        self._silent.append(sock)
        self._reactor.register(sock, partial(self._hear, sock))

    def _forget(self, sock: socket.socket) -> None:
        self._silent.remove(sock)
        self._reactor.retire(sock)

    def _hear(self, sock: socket.socket) -> None:
        """Take the request of somebody who has connected."""
        try:
            has_asked = sock.recv(len(REQUEST)) == REQUEST
        except OSError:
            has_asked = False
        if not has_asked:
            self._forget(sock)
            return
        self._silent.remove(sock)
        self._reactor.leave(sock)
        refusal = self._on_request()
        if refusal is None:
            self._waiting.append(sock)
        else:
            _tell(sock, f"not {refusal}")


def _other_end(sock: socket.socket) -> tuple[int, int]:
    """Return process and user of who has connected, or of who listened first."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _tell(sock: socket.socket, answer: str) -> None:
    """Say the last word; who does not hear it has ended."""
    with suppress(OSError):
        sock.send(answer.encode(errors="replace")[:_LONGEST_ANSWER])
    sock.close()
