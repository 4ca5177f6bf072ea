"""What the kernel knows of this host's addresses. Nothing here sends a packet."""

import re
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Final

WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - every address of this host

# Somewhere out there: documentation addresses, which only the default route leads to.
_FAR_AWAY: Final = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}


def outward_address(family: socket.AddressFamily) -> str | None:
    """Return the source address that the routing table gives to the internet, or None."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR_AWAY[family], 9))  # on UDP this only picks a route
            host: str = probe.getsockname()[0]
    except OSError:
        return None
    return None if ip_address(host).is_link_local else host  # which nobody beyond the link can use


def is_local(host: str) -> bool:
    """Tell if *host* is an address of this host, so that a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def local_addresses() -> set[str]:
    """Return the addresses of all interfaces, as far as /proc tells them."""
    found = set()
    with suppress(OSError):
        table = Path("/proc/net/fib_trie").read_text()
        found.update(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", table))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])))
    return found
