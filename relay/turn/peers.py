"""Which peers may be reached: one function, :meth:`PeerPolicy.refusal`.

A relay on the internet that would send anywhere is a way into the network it stands in
(RFC 8656 §21.1.7, §21.4), so what is not public is refused unless the operator says otherwise.

The rules are compiled to integers: for each family and length of a prefix, longest first, one
table from prefix to rule. To check a peer costs a look into each, two dozen at most.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, NewType

from relay.stun.address import Address, family_of, format_endpoint, pack_host, unpack_host
from relay.stun.const import Family

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


Host = NewType("Host", tuple[Family, int])
"""A numeric host as its family and the integer that its bytes are."""

_BITS: Final = {Family.IPV4: 32, Family.IPV6: 128}
_LOOPBACK_IPV4: Final = 127  # the first byte
_LOOPBACK_IPV6: Final = 1

# IPv6 prefixes that carry an IPv4 address: length, prefix, and how many bits follow the address.
_CARRIES_IPV4: Final = tuple(
    (network.prefixlen, int(network.network_address) >> 128 - network.prefixlen, bits_after)
    for network, bits_after in (
        (IPv6Network("::ffff:0:0/96"), 0),
        (IPv6Network("::ffff:0:0:0/96"), 0),
        (IPv6Network("::/96"), 0),
        (IPv6Network("64:ff9b::/96"), 0),
        (IPv6Network("64:ff9b:1::/48"), 0),
        (IPv6Network("2002::/16"), 80),
    )
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Whether the peers in a prefix may be reached."""

    allows: bool
    text: str  # for the log: what the rule is and how to get around it


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
        # Of rules for one and the same prefix the last one counts: a flag beats the registries,
        # and deny beats allow.
        rules = [
            (ip_network(cidr), _Rule(allows=False, text=_not_public(cidr, kind)))
            for cidr, kind in NOT_PUBLIC.items()
        ]
        rules += [
            (ip_network(cidr), _Rule(allows=True, text=f"--allow-peer {cidr}")) for cidr in allow
        ]
        rules += [(ip_network(cidr), _Rule(allows=False, text=_denied(cidr))) for cidr in deny]
        self._rules = {
            Family.IPV4: _compile(rules, IPv4Network),
            Family.IPV6: _compile(rules, IPv6Network),
        }
        self._own = {(_host(host), port) for host, port in own}
        self._own_ports = {port for _, port in own}
        self._own_hosts = {_host(host) for host in own_hosts}

    def refusal(self, peer: Address) -> str | None:
        """Say which rule forbids *peer* and which flag would allow it, or None if it is allowed."""
        text, port = peer
        if port == 0:
            return "port 0 cannot be sent to"
        host = _host(text)
        if port in self._own_ports and any(self._is_own(one, port) for one in _spellings(host)):
            return f"{format_endpoint(text, port)} is this relay itself; nothing allows it"
        for spelling in _spellings(host):
            refusal = self._host_refusal(spelling)
            if refusal is not None:
                return refusal
        return None

    def _is_own(self, host: Host, port: int) -> bool:
        """Tell if the relay serves there. To a wildcard any loopback address leads, and none."""
        if (host, port) in self._own:
            return True
        family, number = host
        if family is Family.IPV4:
            leads_to_wildcard = number >> 24 == _LOOPBACK_IPV4 or number == 0
        else:
            leads_to_wildcard = number in {_LOOPBACK_IPV6, 0}
        return leads_to_wildcard and (Host((family, 0)), port) in self._own

    def _host_refusal(self, host: Host) -> str | None:
        """Say what the longest rule for a host has against it, if anything."""
        family, number = host
        for shift, rules in self._rules[family]:
            rule = rules.get(number >> shift)
            if rule is not None:
                return None if rule.allows else rule.text
        if host in self._own_hosts:
            text = unpack_host(number.to_bytes(_BITS[family] // 8, "big"))
            return f"{text} is this host; --allow-peer {text} would allow it"
        return None


Rules = list[tuple[int, dict[int, _Rule]]]
"""By how many bits follow the prefix, fewest first: the rules by prefix."""


def _compile(
    rules: Iterable[tuple[IPv4Network | IPv6Network, _Rule]],
    kind: type[IPv4Network] | type[IPv6Network],
) -> Rules:
    """Sort the rules for networks of one *kind* into tables."""
    tables: dict[int, dict[int, _Rule]] = {}
    for network, rule in rules:
        if isinstance(network, kind):
            shift = network.max_prefixlen - network.prefixlen
            tables.setdefault(shift, {})[int(network.network_address) >> shift] = rule
    return sorted(tables.items())


def _not_public(cidr: str, kind: str) -> str:
    return f"{cidr} is {kind}; --allow-peer {cidr} would allow it"


def _denied(cidr: str) -> str:
    network = ip_network(cidr)
    if network.prefixlen == network.max_prefixlen:
        return f"--deny-peer {cidr}; nothing else would allow it"
    return f"--deny-peer {cidr}; an --allow-peer for a longer prefix would allow it"


def _host(text: str) -> Host:
    return Host((family_of(text), int.from_bytes(pack_host(text), "big")))


def _spellings(host: Host) -> Iterator[Host]:
    """Yield the host and whatever IPv4 address is written inside it; each must be allowed."""
    yield host
    family, number = host
    if family is Family.IPV6 and number > 1:  # :: and ::1 hold none
        for length, prefix, bits_after in _CARRIES_IPV4:
            if number >> 128 - length == prefix:
                yield Host((Family.IPV4, number >> bits_after & 0xFFFFFFFF))
