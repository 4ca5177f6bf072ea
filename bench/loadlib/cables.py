"""The three hosts of ``netns.py``, joined as by cables, and what it costs to receive there.

A veth by itself is received from by whoever sends into it, with unfinished checksums. Here its ends
have a thread of the kernel each (threaded NAPI), as a network card would have an interrupt: those
of the relay's host run on the relay's CPU, and what they take is known. Checksums are finished
before they leave, and each end takes in what an XDP program sends back.
"""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.loadlib.clients import LoadError
from bench.loadlib.farend import like_a_cable, receive_by_napi
from bench.loadlib.netns import Network, inside

RELAY_DEVICES: Final = ("towards0", "towards1")


class CabledNetwork(Network):
    """The namespaces, for as long as this is entered. Takes root; raises LoadError, OSError."""

    def __init__(self, name: str, *, relay_cpu: int, load_cpu: int) -> None:
        super().__init__(name)
        self._relay_cpu = relay_cpu
        self._load_cpu = load_cpu

    def arrange(self, stack: ExitStack) -> None:
        """Make cables of the veths."""
        for name in (self.clients, self.peers):
            with inside(name):
                stack.enter_context(like_a_cable("eth0"))
            _receive_by_threads(name, ("eth0",), self._load_cpu)
        with inside(self.relay):
            for device in RELAY_DEVICES:
                receive_by_napi(device)
        self.threads = _receive_by_threads(self.relay, RELAY_DEVICES, self._relay_cpu)


def _receive_by_threads(namespace: str, devices: tuple[str, ...], cpu: int) -> tuple[int, ...]:
    """Give each device a thread of the kernel on one CPU; return their ids. Raises LoadError."""
    before = _threads()
    for device in devices:
        write = f"echo 1 > /sys/class/net/{device}/threaded"
        command = ["ip", "netns", "exec", namespace, "sh", "-c", write]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise LoadError(f"{device}: no threaded NAPI: {error.stderr.strip()}") from error
    threads = tuple(_threads() - before)
    for thread in threads:
        os.sched_setaffinity(thread, {cpu})
    return threads


def _threads() -> set[int]:
    """Return the kernel's threads that receive for a device."""
    found = set()
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().startswith("napi/"):
                found.add(int(comm.parent.name))
        except OSError:  # it has ended
            continue
    return found
