"""Clients in a network namespace, one hop away from a relay in another.

Browsers, and others, gather no candidates on loopback.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.loadlib.netns import RELAY_HOST, Network
from tests.interop.needs import needs_programs, needs_root
from tests.netns import ip
from tests.process import RelayProcess

PORT = 3478
RELAY_NAME = "relay.test"  # as clients know it


@contextmanager
def small_network() -> Iterator[Network]:
    """The namespaces. None of them is on the internet, whatever a browser looks for there."""
    needs_root()
    needs_programs("ip")
    with Network() as network:
        # Without a route, Firefox would not know which of its addresses to use.
        ip("-n", network.clients, "route", "add", "default", "via", RELAY_HOST)
        files = Path("/etc/netns", network.clients)  # which ip lays over /etc
        files.mkdir(parents=True)
        (files / "hosts").write_text(f"127.0.0.1 localhost\n{RELAY_HOST} {RELAY_NAME}\n")
        (files / "nsswitch.conf").write_text("hosts: files\n")  # nobody is to be asked
        (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        try:
            yield network
        finally:
            end_all_in(network.clients)
            shutil.rmtree(files)


def relay_in(network: Network, port: int = PORT, *more: str) -> RelayProcess:
    within = ("ip", "netns", "exec", network.relay)
    arguments = (f"--public-ip4-addr={RELAY_HOST}", "--drain-timeout=0", *more)
    return RelayProcess(*arguments, port=port, prefix=within, loopback=False)


def end_all_in(namespace: str) -> None:
    """End what a browser has left in a namespace of ours."""
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
    )
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
