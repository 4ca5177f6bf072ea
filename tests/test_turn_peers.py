"""Which peers may be reached. RFC 8656 §21.2.1, §21.4 and the special-purpose registries.

Public addresses stand here only where they adjoin a refused prefix. Elsewhere documentation
prefixes are opened by flag and serve as public ones.
"""

import re
from collections.abc import Callable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.turn.peers import PeerPolicy

Network = IPv4Network | IPv6Network

REFUSED = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "::/96",
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/23",
    "2001::/32",
    "100:0:0:1::/64",
    "2001:2::/48",
    "2001:10::/28",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]
REFUSED_IPV4 = [cidr for cidr in REFUSED if "." in cidr]


# --- Without flags --------------------------------------------------------------------------


@pytest.mark.parametrize("cidr", REFUSED)
def test_first_and_last_address_of_a_special_prefix_are_refused(cidr: str) -> None:
    network = ip_network(cidr)

    for address in (network[0], network[-1]):
        refusal = PeerPolicy().refusal((str(address), 9))
        assert refusal is not None
        assert refusal.startswith(f"{longest_of(REFUSED, address)} is ")


@pytest.mark.parametrize("cidr", REFUSED)
def test_neighbours_of_a_special_prefix_are_allowed(cidr: str) -> None:
    """Unless they belong to another one."""
    for neighbour in neighbours(ip_network(cidr)):
        refused = PeerPolicy().refusal((str(neighbour), 9)) is not None
        assert refused == (longest_of(REFUSED, neighbour) is not None), neighbour


@settings(deadline=None, max_examples=300)
@given(
    st.ip_addresses() | st.sampled_from(REFUSED).flatmap(lambda cidr: st.ip_addresses(network=cidr))
)
def test_what_is_in_no_special_prefix_is_allowed(address: IPv4Address | IPv6Address) -> None:
    """And nothing else is."""
    refused = PeerPolicy().refusal((str(address), 9)) is not None

    assert refused == (longest_of(REFUSED, address) is not None)


@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::7"])
def test_port_0_is_refused_everywhere(host: str) -> None:
    policy = PeerPolicy(allow=["198.51.100.0/24", "2001:db8::/32"])

    assert policy.refusal((host, 0)) is not None
    assert policy.refusal((host, 1)) is None
    assert policy.refusal((host, 65535)) is None


# --- Flags ----------------------------------------------------------------------------------

OVERRIDES = [
    pytest.param(["10.0.0.0/8"], [], "10.1.2.3", True, id="a flag beats the registry"),
    pytest.param(["10.1.0.0/16"], [], "10.1.2.3", True, id="a longer flag beats the registry"),
    pytest.param(["10.1.0.0/16"], [], "10.2.2.3", False, id="no more than it covers"),
    pytest.param(["0.0.0.0/0"], [], "10.1.2.3", False, id="the registry beats a shorter flag"),
    pytest.param(["10.1.2.3/32"], [], "10.1.2.3", True, id="a single host"),
    pytest.param(["10.1.2.3"], [], "10.1.2.3", True, id="a host without a length"),
    pytest.param(["10.1.2.3"], [], "10.1.2.4", False, id="not its neighbour"),
    pytest.param([], ["192.0.0.0/16"], "192.0.1.1", False, id="denied though public"),
    pytest.param([], ["0.0.0.0/0"], "192.0.1.1", False, id="everything denied"),
    pytest.param(["10.0.0.0/8"], ["10.0.0.0/8"], "10.1.2.3", False, id="deny on a tie"),
    pytest.param(["10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", False, id="longer deny"),
    pytest.param(["10.0.0.0/8"], ["10.1.0.0/16"], "10.2.2.3", True, id="with a longer deny"),
    pytest.param(["10.1.0.0/16"], ["10.0.0.0/8"], "10.1.2.3", True, id="longer allow"),
    pytest.param(["10.1.0.0/16"], ["10.0.0.0/8"], "10.2.2.3", False, id="with a longer allow"),
    pytest.param(
        ["10.1.2.0/24", "10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", True, id="three deep, allowed"
    ),
    pytest.param(
        ["10.1.0.0/16"], ["10.1.2.0/24", "10.0.0.0/8"], "10.1.2.3", False, id="three deep, denied"
    ),
    pytest.param(["::/0"], [], "fd00::1", False, id="IPv6, the registry beats a shorter flag"),
    pytest.param(["fd00::/8"], [], "fd00::1", True, id="IPv6, longer allow"),
    pytest.param(["fc00::/7"], [], "fd00::1", True, id="IPv6, a flag of equal length"),
    pytest.param(["fd00::/8"], ["fd00::/8"], "fd00::1", False, id="IPv6, deny on a tie"),
    pytest.param(["0.0.0.0/0"], ["::/0"], "198.51.99.1", True, id="IPv6 flags leave IPv4 alone"),
    pytest.param(["2001:db8::/32"], ["0.0.0.0/0"], "2001:db8::1", True, id="and the reverse"),
    pytest.param(["::1/128"], [], "::1", True, id="loopback"),
    pytest.param(["::/128"], [], "::", True, id="unspecified"),
]


@pytest.mark.parametrize(("allow", "deny", "host", "allowed"), OVERRIDES)
def test_the_longest_prefix_wins(
    allow: list[str], deny: list[str], host: str, allowed: bool
) -> None:
    assert (PeerPolicy(allow, deny).refusal((host, 9)) is None) is allowed


prefixes = st.builds(
    lambda address, length: str(ip_network((address, length), strict=False)),
    st.ip_addresses(v=4, network="198.51.100.0/24"),
    st.integers(20, 32),
) | st.builds(
    lambda address, length: str(ip_network((address, length), strict=False)),
    st.ip_addresses(v=6, network="2001:db8::/112"),
    st.integers(28, 128),
)
documented = st.ip_addresses(v=4, network="198.51.100.0/24") | st.ip_addresses(
    v=6, network="2001:db8::/112"
)


@settings(deadline=None, max_examples=150)
@given(st.lists(prefixes, max_size=5), st.lists(prefixes, max_size=5), documented)
def test_the_longest_prefix_wins_among_any(
    allow: list[str], deny: list[str], address: IPv4Address | IPv6Address
) -> None:
    candidates = [
        *(
            (ip_network(cidr).prefixlen, 0, False)
            for cidr in REFUSED
            if address in ip_network(cidr)
        ),
        *((ip_network(cidr).prefixlen, 1, True) for cidr in allow if address in ip_network(cidr)),
        *((ip_network(cidr).prefixlen, 2, False) for cidr in deny if address in ip_network(cidr)),
    ]
    _, _, allowed = max(candidates)

    assert (PeerPolicy(allow, deny).refusal((str(address), 9)) is None) is allowed


@pytest.mark.parametrize(
    "cidr",
    [
        pytest.param("10.0.0.1/8", id="host bits set"),
        pytest.param("10.0.0.0/33", id="length too large"),
        pytest.param("10.0.0/8", id="three numbers"),
        pytest.param("2001:db8::/129", id="IPv6, length too large"),
        pytest.param("example.org", id="a name"),
        pytest.param("", id="empty"),
    ],
)
def test_a_bad_prefix_is_refused(cidr: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whoever finds it words it)
        PeerPolicy(allow=[cidr])
    with pytest.raises(ValueError):  # noqa: PT011
        PeerPolicy(deny=[cidr])


# --- The relay itself -----------------------------------------------------------------------

OWN = [
    ("192.0.2.1", 3478),
    ("2001:db8::1", 3478),
    ("0.0.0.0", 3478),
    ("::", 3478),
    ("127.0.0.1", 8080),
]
OPENED = ["192.0.2.0/24", "2001:db8::/32", "127.0.0.0/8", "::ffff:0:0/96", "64:ff9b::/96"]


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(OWN[0], id="IPv4"),
        pytest.param(OWN[1], id="IPv6"),
        pytest.param(OWN[2], id="HTTP"),
        pytest.param(("::ffff:192.0.2.1", 3478), id="IPv4-mapped"),
        pytest.param(("64:ff9b::c000:201", 3478), id="NAT64"),
        pytest.param(("::ffff:127.0.0.1", 8080), id="IPv4-mapped loopback"),
        pytest.param(("2001:0db8:0::0001", 3478), id="spelled otherwise"),
        pytest.param(("127.0.0.2", 3478), id="another loopback address"),
        pytest.param(("::1", 3478), id="the loopback address of IPv6"),
        pytest.param(("0.0.0.0", 3478), id="no address"),
    ],
)
def test_the_relay_itself_is_never_a_peer(peer: tuple[str, int]) -> None:
    """No flag opens it, or clients could loop messages through it. RFC 8656 §21.2.1."""
    everything = [*OPENED, "192.0.2.1/32", "2001:db8::1/128", "127.0.0.0/8", "::1/128", "0.0.0.0/8"]
    policy = PeerPolicy(allow=everything, own=OWN)

    assert PeerPolicy(allow=everything).refusal(peer) is None
    refusal = policy.refusal(peer)
    assert refusal is not None
    assert "relay itself" in refusal
    assert "--allow-peer" not in refusal


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(("192.0.2.1", 3479), id="another port"),
        pytest.param(("192.0.2.2", 3478), id="another host"),
        pytest.param(("192.0.2.1", 8080), id="the port of another address"),
        pytest.param(("127.0.0.2", 8080), id="another loopback address than the bound one"),
    ],
)
def test_addresses_that_the_relay_does_not_use_are_peers(peer: tuple[str, int]) -> None:
    assert PeerPolicy(allow=OPENED, own=OWN).refusal(peer) is None


# --- IPv4 spelled as IPv6 -------------------------------------------------------------------


def mapped(address: IPv4Address, _filler: int = 0) -> IPv6Address:
    """RFC 4291 §2.5.5.2."""
    return IPv6Address(0xFFFF << 32 | int(address))


def compatible(address: IPv4Address, _filler: int = 0) -> IPv6Address:
    """RFC 4291 §2.5.5.1."""
    return IPv6Address(int(address))


def nat64(address: IPv4Address, _filler: int = 0) -> IPv6Address:
    """RFC 6052 §2.1."""
    return IPv6Address(0x0064FF9B << 96 | int(address))


def local_nat64(address: IPv4Address, filler: int = 0) -> IPv6Address:
    """RFC 8215: any /96 of 64:ff9b:1::/48."""
    subnet = filler & 0xFFFFFFFFFFFF
    return IPv6Address(0x0064FF9B0001 << 80 | subnet << 32 | int(address))


def six_to_four(address: IPv4Address, filler: int = 0) -> IPv6Address:
    """RFC 3056 §2: whatever subnet and interface follow."""
    return IPv6Address(0x2002 << 112 | int(address) << 80 | filler & (1 << 80) - 1)


Spell = Callable[[IPv4Address, int], IPv6Address]
SPELLINGS = [
    pytest.param(mapped, "::ffff:0:0/96", id="mapped"),
    pytest.param(compatible, "::/96", id="compatible"),
    pytest.param(nat64, "64:ff9b::/96", id="NAT64"),
    pytest.param(local_nat64, "64:ff9b:1::/48", id="local NAT64"),
    pytest.param(six_to_four, "2002::/16", id="6to4"),
]
fillers = st.integers(0, (1 << 80) - 1)
forbidden = st.sampled_from(REFUSED_IPV4).flatmap(
    lambda cidr: (
        st.ip_addresses(v=4, network=cidr)
        | st.sampled_from([ip_network(cidr)[0], ip_network(cidr)[-1]])
    )
)


@pytest.mark.parametrize(("spell", "prefix"), SPELLINGS)
@settings(deadline=None)
@given(address=forbidden, filler=fillers)
def test_no_spelling_reaches_what_its_plain_form_may_not(
    spell: Spell, prefix: str, address: IPv4Address, filler: int
) -> None:
    """Though the prefix of the spelling itself is allowed, even in halves."""
    peer = (str(spell(address, filler)), 9)
    halves = [str(half) for half in ip_network(prefix).subnets()]

    assert PeerPolicy().refusal(peer) is not None
    assert PeerPolicy(allow=[prefix, *halves]).refusal(peer) is not None


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        pytest.param("::", True, id="unspecified"),
        pytest.param("::1", True, id="loopback"),
        pytest.param("::2", False, id="0.0.0.2"),
        pytest.param("::7f00:1", False, id="127.0.0.1"),
    ],
)
def test_two_compatible_addresses_are_none(host: str, allowed: bool) -> None:
    """RFC 4291 §2.5.2, §2.5.3: what is no spelling of 0.0.0.0 and 0.0.0.1 needs its own flag."""
    policy = PeerPolicy(allow=["::/96", "::/128", "::1/128"])

    assert (policy.refusal((host, 9)) is None) is allowed
    assert PeerPolicy(allow=["::/96"]).refusal((host, 9)) is not None


@pytest.mark.parametrize(("spell", "prefix"), SPELLINGS)
@settings(deadline=None)
@given(address=st.ip_addresses(v=4, network="198.51.100.0/24"), filler=fillers)
def test_a_spelling_reaches_a_public_address_where_its_prefix_is_allowed(
    spell: Spell, prefix: str, address: IPv4Address, filler: int
) -> None:
    peer = (str(spell(address, filler)), 9)
    public = "198.51.100.0/24"

    assert PeerPolicy(allow=[public]).refusal(peer) is not None
    assert PeerPolicy(allow=[public, prefix]).refusal(peer) is None
    assert PeerPolicy(allow=[public, prefix], deny=[f"{address}/32"]).refusal(peer) is not None


# --- What a refusal says --------------------------------------------------------------------


@pytest.mark.parametrize("cidr", REFUSED)
def test_a_refusal_names_the_rule_and_the_flag(cidr: str) -> None:
    """An address that only this prefix covers, so that one flag is all it takes."""
    network = ip_network(cidr)
    address = next(
        each
        for each in (network[-1], network[1 % network.num_addresses])
        if longest_of(REFUSED, each) == cidr
    )
    refusal = PeerPolicy().refusal((str(address), 9))

    assert refusal is not None
    assert refusal.startswith(f"{cidr} is ")
    assert advised(refusal) == cidr


@settings(deadline=None)
@given(forbidden)
def test_the_advised_flag_does_allow_an_ipv4_peer(address: IPv4Address) -> None:
    peer = (str(address), 9)
    refusal = PeerPolicy().refusal(peer)

    assert refusal is not None
    assert PeerPolicy(allow=[advised(refusal)]).refusal(peer) is None


@settings(deadline=None)
@given(st.sampled_from(REFUSED).flatmap(lambda cidr: st.ip_addresses(network=cidr)))
def test_following_the_advice_leads_to_the_peer(address: IPv4Address | IPv6Address) -> None:
    """Where IPv4 is spelled as IPv6 the prefix of either may be in the way: two flags at most."""
    peer = (str(address), 9)
    flags: list[str] = []
    while refusal := PeerPolicy(allow=flags).refusal(peer):
        assert advised(refusal) not in flags
        flags.append(advised(refusal))

    assert 1 <= len(flags) <= 2


def test_a_denial_names_its_flag() -> None:
    refusal = PeerPolicy(deny=["198.51.0.0/16"]).refusal(("198.51.99.1", 9))

    assert refusal is not None
    assert refusal.startswith("--deny-peer 198.51.0.0/16; ")
    assert "longer prefix" in refusal
    longer = PeerPolicy(allow=["198.51.99.0/24"], deny=["198.51.0.0/16"])
    assert longer.refusal(("198.51.99.1", 9)) is None


@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::7"])
def test_a_denied_host_is_not_promised_a_longer_prefix(host: str) -> None:
    """There is none."""
    policy = PeerPolicy(allow=["198.51.100.0/24", "2001:db8::/32"], deny=[host])
    refusal = policy.refusal((host, 9))

    assert refusal is not None
    assert refusal.startswith(f"--deny-peer {host}")
    assert "longer prefix would allow it" not in refusal


# --- The relay's own host -------------------------------------------------------------------


def test_what_else_runs_on_the_relays_host_is_refused_unless_a_flag_opens_it() -> None:
    hosts = ["8.8.4.4", "2606:4700::1"]
    closed = PeerPolicy(own=[("8.8.4.4", 3478)], own_hosts=hosts)
    for host in hosts:
        assert (
            closed.refusal((host, 161))
            == f"{host} is this host; --allow-peer {host} would allow it"
        )
    assert closed.refusal(("8.8.8.8", 161)) is None

    opened = PeerPolicy(allow=["8.8.0.0/16"], own=[("8.8.4.4", 3478)], own_hosts=hosts)
    assert opened.refusal(("8.8.4.4", 161)) is None
    assert opened.refusal(("8.8.4.4", 3478)) is not None


# --- Helpers --------------------------------------------------------------------------------


def longest_of(cidrs: list[str], address: IPv4Address | IPv6Address) -> str | None:
    """Return the longest prefix that covers *address*."""
    covering = [cidr for cidr in cidrs if address in ip_network(cidr)]
    return max(covering, key=lambda cidr: ip_network(cidr).prefixlen, default=None)


def neighbours(network: Network) -> list[IPv4Address | IPv6Address]:
    """Return the address before the first and the one behind the last, where there is one."""
    below, above = int(network[0]) - 1, int(network[-1]) + 1
    last = (1 << network.max_prefixlen) - 1
    kind = type(network[0])
    return [kind(number) for number in (below, above) if 0 <= number <= last]


def advised(refusal: str) -> str:
    """Return the prefix for which the text advises ``--allow-peer``."""
    advice = re.search(r"--allow-peer (\S+) would allow it", refusal)
    assert advice, refusal
    return advice.group(1)
