"""Three hosts in network namespaces: clients and peers, with a relay between them.

::

    clients 192.0.2.2 ---- veth ---- 192.0.2.1 relay 198.51.100.1 ---- veth ---- 198.51.100.2 peers

The relay is known to both as 192.0.2.1. A veth carries what is sent with UDP_SEGMENT in one
piece, and a socket with UDP_GRO receives it so: nothing has to be set for that. It never merges
single datagrams, unlike a network card with GRO.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.loadlib.clients import LoadError

RELAY_HOST: Final = "192.0.2.1"
PEER_HOST: Final = "198.51.100.2"
PEER_PREFIX: Final = "198.51.100.0/24"

_CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Network:
    """The namespaces, for as long as this is entered. Takes root; raises LoadError."""

    def __init__(self, name: str = "versus") -> None:
        """Take what the names of the namespaces begin with."""
        self.clients = f"{name}-{os.getpid()}-clients"
        self.relay = f"{name}-{os.getpid()}-relay"
        self.peers = f"{name}-{os.getpid()}-peers"
        self.threads: tuple[int, ...] = ()  # of the kernel, which receive for the relay's host
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name in (self.clients, self.relay, self.peers):
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)  # the veths go with it
            self._join(self.clients, "192.0.2.2/24", f"{RELAY_HOST}/24", "towards0")
            self._join(self.peers, f"{PEER_HOST}/24", "198.51.100.1/24", "towards1")
            ip("-n", self.peers, "route", "add", "default", "via", "198.51.100.1")
            self.arrange(stack)
            self._stack = stack.pop_all()
        return self

    def arrange(self, stack: ExitStack) -> None:
        """Do what else there is to do, for as long as *stack* is open."""

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _join(self, namespace: str, address: str, relay_address: str, name: str) -> None:
        """Lay a veth from *namespace* to the relay's, which calls its end *name*."""
        veth = "type", "veth", "peer", "name", name, "netns", self.relay
        ip("-n", namespace, "link", "add", "eth0", *veth)  # libnice leaves out what is called veth
        ends = (namespace, "eth0", address), (self.relay, name, relay_address)
        for host, device, prefix in ends:
            ip("-n", host, "address", "add", prefix, "dev", device)
            ip("-n", host, "link", "set", device, "up")
            ip("-n", host, "link", "set", "lo", "up")


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Open sockets in *namespace*: they stay there. Only this thread moves, and back."""
    here, there = Path("/proc/thread-self/ns/net"), Path("/run/netns", namespace)
    with here.open() as home, there.open() as away:
        _enter(away.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def ip(*arguments: str) -> None:
    """Run the program ip. Raises LoadError."""
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise LoadError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
