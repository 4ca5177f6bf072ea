"""Which peers may be reached: one function, :meth:`PeerPolicy.refusal`.

A relay on the internet that would send anywhere is a way into the network it stands in
(RFC 8656 §21.1.7, §21.4), so what is not public is refused unless the operator says otherwise.

The rules are compiled to integers: for each family, first bits of an address and length of a
prefix, longest first, one table from prefix to rule. To check a peer costs a look into each that
there is for its first bits: a handful for most, a dozen at most.
"""

from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from relay.stun.address import Address, family_of, format_endpoint, pack_host, unpack_host
from relay.stun.const import Family

# The special-purpose registries of IANA, with multicast, the deprecated site-local, and the one
# address of a cloud's platform that is none of these.
NOT_PUBLIC: Final = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared address space",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "Azure's platform",  # which is its resolver, among others
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


# Why a peer is refused that no prefix is about.
PORT_ZERO: Final = "port 0"
OWN_RELAY: Final = "own relay"
OWN_HOST: Final = "own host"
DENIED: Final = "deny-peer"
RULES: Final = frozenset({*NOT_PUBLIC.values(), PORT_ZERO, OWN_RELAY, OWN_HOST, DENIED})
"""Every :attr:`Refusal.rule` that there can be: few enough to count by."""

# Whoever asks for these is lost or looks for a way in. The log does not propose to make one.
_NOT_ADVISED: Final = frozenset(
    {"this network", "loopback", "link-local", "unspecified", "multicast"}
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a peer may not be reached."""

    rule: str  # one of RULES
    text: str  # for the log: what the rule is, and mostly how to get around it

    def __str__(self) -> str:
        return self.text


Host = tuple[Family, int]
"""A numeric host as its family and the integer that its bytes are."""

_BITS: Final = {Family.IPV4: 32, Family.IPV6: 128}
_LOOPBACK_IPV4: Final = 127  # the first byte
_LOOPBACK_IPV6: Final = 1
_IPV4_MASK: Final = 0xFFFFFFFF

# IPv6 prefixes that carry an IPv4 address: length, prefix, how many bits follow the address, and
# which of its bits are flipped. Teredo has two: a server's, and the client's (RFC 4380 §4).
#
# The whole of 64:ff9b:1::/48 is read as if cut into prefixes of 96 bits, though a network may use
# shorter ones. There the address lies elsewhere (RFC 6052 §2.2), and nothing in it tells where.
# To forbid all readings would forbid every peer, since in one of them most hold 0.0.x.x.
_CARRIES_IPV4: Final = tuple(
    (network.prefixlen, int(network.network_address) >> 128 - network.prefixlen, after, flipped)
    for network, after, flipped in (
        (IPv6Network("::ffff:0:0/96"), 0, 0),
        (IPv6Network("::ffff:0:0:0/96"), 0, 0),
        (IPv6Network("::/96"), 0, 0),
        (IPv6Network("64:ff9b::/96"), 0, 0),
        (IPv6Network("64:ff9b:1::/48"), 0, 0),
        (IPv6Network("2001::/32"), 64, 0),
        (IPv6Network("2001::/32"), 0, _IPV4_MASK),
        (IPv6Network("2002::/16"), 80, 0),
    )
)
# Their first 16 bits: of most addresses no more has to be looked at.
_CARRYING_STARTS: Final = frozenset(prefix >> length - 16 for length, prefix, _, _ in _CARRIES_IPV4)
# ISATAP is told by its interface identifier, under any prefix: RFC 5214 §6.1. One bit of it says
# whether the IPv4 address is unique.
_ISATAP: Final = 0x00005EFE
_ISATAP_MASK: Final = 0xFDFFFFFF


class PeerPolicy:
    """The registries' prefixes, overridden by the operator's, and this host's addresses.

    The rules are fixed once built; *own_hosts* is asked each time.
    """

    def __init__(
        self,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        own: Collection[Address] = (),
        own_hosts: Container[bytes] = (),
    ) -> None:
        """Build the rules from prefixes in CIDR notation. Raises ValueError for a bad one.

        *own* are the addresses at which the relay itself serves, 0.0.0.0 and :: for all of its
        host; no flag opens them. *own_hosts* are the addresses that this host has at the moment,
        as their 4 or 16 bytes. What a datagram from here may reach there is what a firewall lets
        pass within a host, so only a flag for exactly that address opens one: a wider one is
        for others. Of loopback's 127.0.0.0/8 any flag is about this host.
        """
        # Of rules for one and the same prefix the last one counts: a flag beats the registries,
        # and deny beats allow.
        rules: list[tuple[IPv4Network | IPv6Network, Refusal | None]] = [
            (ip_network(cidr), _not_public(cidr, kind)) for cidr, kind in NOT_PUBLIC.items()
        ]
        rules += [(ip_network(cidr), None) for cidr in allow]
        rules += [(ip_network(cidr), _denied(cidr)) for cidr in deny]
        self._rules = {
            Family.IPV4: _Rules(rules, IPv4Network),
            Family.IPV6: _Rules(rules, IPv6Network),
        }
        self._own = {(_host(host), port) for host, port in own}
        self._own_ports = {port for _, port in own}
        self._own_hosts = own_hosts

    def refusal(self, peer: Address) -> Refusal | None:
        """Say which rule forbids *peer* and which flag would allow it, or None if it is allowed."""
        text, port = peer
        if port == 0:
            return _PORT_ZERO
        spellings = _spellings(_host(text))
        if port in self._own_ports and any(self._is_own(one, port) for one in spellings):
            where = format_endpoint(text, port)
            return Refusal(OWN_RELAY, f"{where} is this relay itself; nothing allows it")
        for family, number in spellings:
            packed = number.to_bytes(4 if family is Family.IPV4 else 16, "big")
            if packed in self._own_hosts and not _is_loopback((family, number)):
                refusal = self._own_host_refusal((family, number))
                if refusal is not None:
                    return refusal
                continue
            for shift, rules in self._rules[family].about(number):  # the longest prefix first
                prefix = number >> shift
                if prefix in rules:
                    if rules[prefix] is not None:
                        return rules[prefix]
                    break
        return None

    def _is_own(self, host: Host, port: int) -> bool:
        """Tell if the relay serves there. To a wildcard all of this host leads, and no address."""
        if (host, port) in self._own:
            return True
        family, number = host
        if ((family, 0), port) not in self._own:
            return False
        return number == 0 or _is_loopback(host) or _packed(host) in self._own_hosts

    def _own_host_refusal(self, host: Host) -> Refusal | None:
        """Say what there is against an address of this host, for which no wider rule counts."""
        family, number = host
        for shift, rules in self._rules[family].about(number):
            if not shift and number in rules:
                return rules[number]
        text = unpack_host(_packed(host))
        return Refusal(OWN_HOST, f"{text} is this host; --allow-peer {text} would allow it")


_Tables = list[tuple[int, dict[int, Refusal | None]]]
"""By how many bits follow the prefix, fewest first: what is against a prefix; None allows it."""


class _Rules:
    """The rules for one family, by the first bits of an address."""

    __slots__ = ("_by_start", "_shift", "_wide")

    def __init__(
        self,
        rules: Iterable[tuple[IPv4Network | IPv6Network, Refusal | None]],
        kind: type[IPv4Network] | type[IPv6Network],
    ) -> None:
        """Take those of the *rules* that are for networks of one *kind*."""
        bits, start_bits = (32, 8) if kind is IPv4Network else (128, 16)
        self._shift = bits - start_bits
        wide: dict[int, dict[int, Refusal | None]] = {}  # prefixes with fewer bits than a start has
        by_start: dict[int, dict[int, dict[int, Refusal | None]]] = {}
        for network, rule in rules:
            if isinstance(network, kind):
                number, shift = int(network.network_address), bits - network.prefixlen
                is_wide = shift > self._shift
                tables = wide if is_wide else by_start.setdefault(number >> self._shift, {})
                tables.setdefault(shift, {})[number >> shift] = rule
        self._wide: _Tables = sorted(wide.items())
        self._by_start: dict[int, _Tables] = {
            start: sorted(tables.items()) + self._wide for start, tables in by_start.items()
        }

    def about(self, number: int) -> _Tables:
        """Return the tables in which there may be a rule for an address."""
        return self._by_start.get(number >> self._shift, self._wide)


_PORT_ZERO: Final = Refusal(PORT_ZERO, "port 0 cannot be sent to")


def _not_public(cidr: str, kind: str) -> Refusal:
    text = f"{cidr} is {kind}"
    if kind not in _NOT_ADVISED:
        text += f"; --allow-peer {cidr} would allow it"
    return Refusal(kind, text)


def _denied(cidr: str) -> Refusal:
    network = ip_network(cidr)
    if network.prefixlen == network.max_prefixlen:
        return Refusal(DENIED, f"--deny-peer {cidr}; nothing else would allow it")
    text = f"--deny-peer {cidr}; an --allow-peer for a longer prefix would allow it"
    return Refusal(DENIED, text)


def _host(text: str) -> Host:
    return family_of(text), int.from_bytes(pack_host(text), "big")


def _packed(host: Host) -> bytes:
    family, number = host
    return number.to_bytes(_BITS[family] // 8, "big")


def _is_loopback(host: Host) -> bool:
    family, number = host
    return number >> 24 == _LOOPBACK_IPV4 if family is Family.IPV4 else number == _LOOPBACK_IPV6


def _spellings(host: Host) -> list[Host]:
    """Return the host and whatever IPv4 address is written inside it; each must be allowed."""
    family, number = host
    found = [host]
    if family is Family.IPV6:
        if number >> 112 in _CARRYING_STARTS and number > 1:  # :: and ::1 hold none
            for length, prefix, bits_after, flipped in _CARRIES_IPV4:
                if number >> 128 - length == prefix:
                    found.append((Family.IPV4, (number >> bits_after ^ flipped) & _IPV4_MASK))
        if number >> 32 & _ISATAP_MASK == _ISATAP:
            found.append((Family.IPV4, number & _IPV4_MASK))
    return found
