"""Which peers may be reached: one function, :meth:`PeerPolicy.refusal`.

A relay on the internet that would send anywhere is a way into the network it stands in
(RFC 8656 §21.1.7, §21.4), so what is not public is refused unless the operator says otherwise.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from relay.stun.address import Address, format_endpoint

# The special-purpose registries of IANA, with multicast and the deprecated site-local.
NOT_PUBLIC: Final = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared address space",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 relay anycast",
    "192.168.0.0/16": "private",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::/96": "IPv4-compatible",
    "::ffff:0:0/96": "IPv4-mapped",
    "::ffff:0:0:0/96": "IPv4-translated",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "local NAT64",
    "100::/64": "discard-only",
    "100:0:0:1::/64": "dummy",
    "2001::/23": "protocol assignments",
    "2001::/32": "Teredo",
    "2001:2::/48": "benchmarking",
    "2001:10::/28": "deprecated ORCHID",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "2620:4f:8000::/48": "AS112",
    "3fff::/20": "documentation",
    "5f00::/16": "segment routing",
    "fc00::/7": "unique local",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}

_WILDCARDS: Final = {4: IPv4Address(0), 6: IPv6Address(0)}
REMEMBERED_HOSTS: Final = 4096  # for the rules that apply to them

# Prefixes that carry an IPv4 address, and how many bits follow it.
_IPV4_INSIDE: Final = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("::/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("64:ff9b:1::/48"), 0),
    (IPv6Network("2002::/16"), 80),
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A prefix, and whether the peers in it may be reached."""

    version: int
    prefix: int  # the network's bits, shifted down to its length
    length: int
    allows: bool
    by_flag: bool
    text: str  # for the log: what the rule is and how to get around it

    def covers(self, address: IPv4Address | IPv6Address) -> bool:
        if self.version != address.version:
            return False
        return int(address) >> (address.max_prefixlen - self.length) == self.prefix


class PeerPolicy:
    """The registries' prefixes, overridden by the operator's; fixed once built."""

    def __init__(
        self,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        own: Collection[Address] = (),
        own_hosts: Iterable[str] = (),
    ) -> None:
        """Build the rules from prefixes in CIDR notation. Raises ValueError for a bad one.

        *own* are the addresses at which the relay itself serves; no flag opens them. *own_hosts*
        are all of its host's, which are refused unless a flag says otherwise: what a datagram
        from here may reach on them is what a firewall lets pass within a host.
        """
        rules = [
            _rule(
                cidr,
                allows=False,
                by_flag=False,
                text=f"{cidr} is {kind}; --allow-peer {cidr} would allow it",
            )
            for cidr, kind in NOT_PUBLIC.items()
        ]
        rules += [
            _rule(cidr, allows=True, by_flag=True, text=f"--allow-peer {cidr}") for cidr in allow
        ]
        rules += [
            _rule(
                cidr,
                allows=False,
                by_flag=True,
                text=_denied(cidr),
            )
            for cidr in deny
        ]
        # The longest prefix wins; then a flag over the registries; then deny over allow.
        self._rules = sorted(
            rules, key=lambda rule: (rule.length, rule.by_flag, not rule.allows), reverse=True
        )
        self._own = {(ip_address(host), port) for host, port in own}
        self._own_ports = {port for _, port in own}
        self._own_hosts = {ip_address(host) for host in own_hosts}
        self._host_refusal = lru_cache(REMEMBERED_HOSTS)(self._judge_host)

    def refusal(self, peer: Address) -> str | None:
        """Say which rule forbids *peer* and which flag would allow it, or None if it is allowed."""
        host, port = peer
        if port == 0:
            return "port 0 cannot be sent to"
        if port in self._own_ports and self._is_own(host, port):
            return f"{format_endpoint(host, port)} is this relay itself; nothing allows it"
        return self._host_refusal(host)

    def _is_own(self, host: str, port: int) -> bool:
        """Tell if the relay serves there. To a wildcard any loopback address leads, and none."""
        return any(
            (spelling, port) in self._own
            or (
                (spelling.is_loopback or spelling.is_unspecified)
                and (_WILDCARDS[spelling.version], port) in self._own
            )
            for spelling in _spellings(ip_address(host))
        )

    def _judge_host(self, host: str) -> str | None:
        for spelling in _spellings(ip_address(host)):
            for rule in self._rules:
                if rule.covers(spelling):
                    if not rule.allows:
                        return rule.text
                    break
            else:
                if spelling in self._own_hosts:
                    return f"{spelling} is this host; --allow-peer {spelling} would allow it"
        return None


def _rule(cidr: str, *, allows: bool, by_flag: bool, text: str) -> _Rule:
    network = ip_network(cidr)
    length = network.prefixlen
    prefix = int(network.network_address) >> (network.max_prefixlen - length)
    return _Rule(network.version, prefix, length, allows, by_flag, text)


def _denied(cidr: str) -> str:
    network = ip_network(cidr)
    if network.prefixlen == network.max_prefixlen:
        return f"--deny-peer {cidr}; nothing else would allow it"
    return f"--deny-peer {cidr}; an --allow-peer for a longer prefix would allow it"


def _spellings(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address | IPv6Address]:
    """Yield the address and whatever IPv4 address is written inside it; each must be allowed."""
    yield address
    if isinstance(address, IPv6Address):
        for network, bits_after in _IPV4_INSIDE:
            if address in network and int(address) > 1:  # :: and ::1 hold none
                yield IPv4Address(int(address) >> bits_after & 0xFFFFFFFF)
