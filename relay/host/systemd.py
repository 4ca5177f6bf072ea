"""What systemd and this process tell each other: notifications, the watchdog, sockets.

See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). Where systemd did not start the
process, none of it does anything.
"""

import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import repeat
from typing import Final

LAST_WORD_TIMEOUT: Final = 1.0  # seconds
FIRST_DESCRIPTOR: Final = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Tells the service manager how we are. Never blocks, never raises.

    What systemd must not miss (that we are ready, reload or stop) and cannot take at the
    moment goes out with whatever it is told next.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read ``NOTIFY_SOCKET``: a path, or an abstract name after ``@``. Others are ignored."""
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = name.replace("@", "\0", 1) if name.startswith("@") else name
        self._untold = ""
        self.is_alone = False  # nobody listens there any more
        self._socket: socket.socket | None = None
        if name.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    @property
    def is_active(self) -> bool:
        """Tell if there is anybody to tell."""
        return self._socket is not None

    def ready(self) -> None:
        """Say that we serve: at the end of the start, and of a reload."""
        self._tell("READY=1", must_arrive=True)

    def reloading(self) -> None:
        """Say that we read our configuration anew; :meth:`ready` says that it is done."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={now}", must_arrive=True)

    def replaced_by(self, pid: int) -> None:
        """Say that another process is the service from here on. Waits a moment, if it has to."""
        if self._socket is not None:
            self._socket.settimeout(LAST_WORD_TIMEOUT)
            with suppress(OSError):
                self._socket.sendto(f"MAINPID={pid}".encode(), self._address)

    def stopping(self) -> None:
        """Say that we are about to end."""
        self._tell("STOPPING=1", must_arrive=True)

    def status(self, text: str) -> None:
        """Say in words how we are, for ``systemctl status``."""
        self._tell(f"STATUS={' '.join(text.split())}")

    def watchdog(self) -> None:
        """Say that we are alive."""
        self._tell("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for so many seconds from now on for what we do: to start, reload or stop."""
        self._tell(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def close(self) -> None:
        """Close the socket. There is nobody to tell after that."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, message: str, *, must_arrive: bool = False) -> None:
        if self._socket is None:
            return
        if must_arrive:
            self._untold = message  # and what was untold before it is no more true
        elif self._untold:
            message = f"{self._untold}\n{message}"
        try:
            self._socket.sendto(
                message.encode(errors="replace"), socket.MSG_DONTWAIT, self._address
            )
        except OSError as error:
            self.is_alone = isinstance(error, ConnectionRefusedError)
        else:
            self._untold = ""


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds within which systemd wants to hear from us each time, or None.

    Tell it twice as often: that is what sd_watchdog_enabled(3) recommends.
    """
    microseconds = _number(environment.get("WATCHDOG_USEC", ""))
    if not microseconds or environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return microseconds / 1_000_000


class ActivationError(ValueError):
    """What systemd handed over is not what it says."""


def inherited_sockets(environment: Mapping[str, str], pid: int) -> list[tuple[str, socket.socket]]:
    """Return the sockets handed over to process *pid*, each after its ``FileDescriptorName=``.

    They are the caller's to close, and do not block. Raises ActivationError.
    """
    if environment.get("LISTEN_PID", "") != str(pid):  # none, or meant for a parent of ours
        return []
    count = _number(environment.get("LISTEN_FDS", ""))
    if count is None:
        raise ActivationError(f"LISTEN_FDS {environment.get('LISTEN_FDS', '')!r}: not a number")
    names: Iterable[str] = repeat("unknown", count)  # as sd_listen_fds_with_names(3) does
    if count and "LISTEN_FDNAMES" in environment:
        names = given = environment["LISTEN_FDNAMES"].split(":")
        if len(given) != count:
            raise ActivationError(f"LISTEN_FDNAMES: {len(given)} names for {count} descriptors")
    sockets: list[tuple[str, socket.socket]] = []
    try:
        for descriptor, name in enumerate(names, start=FIRST_DESCRIPTOR):
            sockets.append((name, _adopt(descriptor)))
    except OSError as error:
        for _, sock in sockets:
            sock.close()
        raise ActivationError(
            f"LISTEN_FDS {count}: descriptor {descriptor} is no socket: {error.strerror}"
        ) from error
    return sockets


def _adopt(descriptor: int) -> socket.socket:
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    sock.setblocking(False)
    # systemd sets it on whatever it binds. On UDP it would let every user of this host bind
    # the same port, and get the datagrams.
    if sock.type == socket.SOCK_DGRAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return sock


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None
