"""The three hosts of ``netns.py``, joined as by cables, and what it costs to receive there.

Checksums are finished before they leave, and each end takes in what an XDP program sends back,
neither of which a veth does by itself. Also, on a veth whoever sends does the work of receiving, in
the same system call. So it is here, too, or the devices of the relay's host have a thread of the
kernel each (threaded NAPI), as a network card has an interrupt: these run on the relay's CPU, and
what they take is known.
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

    def __init__(self, name: str, *, relay_cpu: int, load_cpu: int, threaded: bool) -> None:
        super().__init__(name)
        self._relay_cpu = relay_cpu
        self._load_cpu = load_cpu
        self._threaded = threaded

    def arrange(self, stack: ExitStack) -> None:
        """Make cables of the veths."""
        for name in (self.clients, self.peers):
            with inside(name):
                stack.enter_context(like_a_cable("eth0"))
            # What the relay's CPU has delivered to this end is the load client's to handle.
            mask = f"{1 << self._load_cpu:x}"
            _write(name, "/sys/class/net/eth0/queues/rx-0/rps_cpus", mask)
        with inside(self.relay):
            for device in RELAY_DEVICES:
                receive_by_napi(device)
        if self._threaded:
            before = _threads()
            for device in RELAY_DEVICES:
                _write(self.relay, f"/sys/class/net/{device}/threaded", "1")
            self.threads = tuple(_threads() - before)
            for thread in self.threads:
                os.sched_setaffinity(thread, {self._relay_cpu})


def _write(namespace: str, file: str, text: str) -> None:
    """Write to a file of /sys, which shows each namespace its own devices. Raises LoadError."""
    command = ["ip", "netns", "exec", namespace, "sh", "-c", f"echo {text} > {file}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise LoadError(f"{file}: {error.stderr.strip()}") from error


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
