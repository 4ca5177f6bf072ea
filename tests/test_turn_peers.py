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

from relay.stun.address import pack_host
from relay.turn.peers import NOT_PUBLIC, RULES, PeerPolicy

Network = IPv4Network | IPv6Network

REFUSED = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16/32",
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
        rule = longest_of(REFUSED, address)
        assert rule is not None
        assert refusal.rule == NOT_PUBLIC[rule]
        assert refusal.text.startswith(f"{rule} is {refusal.rule}")


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
    assert refusal.rule == "own relay"
    assert "relay itself" in refusal.text
    assert "--allow-peer" not in refusal.text


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


def teredo_server(address: IPv4Address, _filler: int = 0) -> IPv6Address:
    """RFC 4380 §4, with a client at 198.51.100.1, which the tests allow."""
    return IPv6Address(0x20010000 << 96 | int(address) << 64 | int(PUBLIC) ^ 0xFFFFFFFF)


def teredo_client(address: IPv4Address, filler: int = 0) -> IPv6Address:
    """RFC 4380 §4: flags and port vary, and all bits of the address are flipped."""
    flags_and_port = (filler & 0xFFFFFFFF) << 32
    return IPv6Address(
        0x20010000 << 96 | int(PUBLIC) << 64 | flags_and_port | int(address) ^ 0xFFFFFFFF
    )


def isatap(address: IPv4Address, filler: int = 0) -> IPv6Address:
    """RFC 5214 §6.1: a unique address or not, in any subnet."""
    subnet, unique = filler & 0xFFFF, filler >> 16 & 1
    interface = unique << 57 | 0x5EFE << 32 | int(address)
    return IPv6Address(0x20010DB8 << 96 | subnet << 64 | interface)


PUBLIC = IPv4Address("198.51.100.1")
Spell = Callable[[IPv4Address, int], IPv6Address]
SPELLINGS = [
    pytest.param(mapped, "::ffff:0:0/96", id="mapped"),
    pytest.param(compatible, "::/96", id="compatible"),
    pytest.param(nat64, "64:ff9b::/96", id="NAT64"),
    pytest.param(local_nat64, "64:ff9b:1::/48", id="local NAT64"),
    pytest.param(six_to_four, "2002::/16", id="6to4"),
    pytest.param(teredo_server, "2001::/32", id="server of Teredo"),
    pytest.param(teredo_client, "2001::/32", id="client of Teredo"),
    pytest.param(isatap, "2001:db8::/32", id="ISATAP"),
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

    other_end = [] if address == PUBLIC else [str(PUBLIC)]
    policy = PeerPolicy(allow=[prefix, *halves, *other_end])

    assert PeerPolicy().refusal(peer) is not None
    assert policy.refusal(peer) is not None


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


NOT_ADVISED = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4"]
NOT_ADVISED += ["::/128", "::1/128", "fe80::/10", "ff00::/8"]
ADVISED = [cidr for cidr in REFUSED if cidr not in NOT_ADVISED]


@pytest.mark.parametrize("cidr", ADVISED)
def test_a_refusal_names_the_rule_and_the_flag(cidr: str) -> None:
    """An address that only this prefix covers, so that one flag is all it takes."""
    refusal = PeerPolicy().refusal((str(only_in(cidr)), 9))

    assert refusal is not None
    assert refusal.text.startswith(f"{cidr} is ")
    assert advised(refusal.text) == cidr


@pytest.mark.parametrize("cidr", NOT_ADVISED)
def test_what_leads_into_the_host_or_its_link_is_refused_without_advice(cidr: str) -> None:
    """Or whoever tries 169.254.169.254 would have the log propose to open it."""
    refusal = PeerPolicy().refusal((str(only_in(cidr)), 9))

    assert refusal is not None
    assert refusal.text == f"{cidr} is {refusal.rule}"


@settings(deadline=None)
@given(
    st.sampled_from([cidr for cidr in ADVISED if "." in cidr]).flatmap(
        lambda cidr: st.ip_addresses(v=4, network=cidr)
    )
)
def test_the_advised_flag_does_allow_an_ipv4_peer(address: IPv4Address) -> None:
    peer = (str(address), 9)
    refusal = PeerPolicy().refusal(peer)

    assert refusal is not None
    assert PeerPolicy(allow=[advised(refusal.text)]).refusal(peer) is None


@settings(deadline=None)
@given(st.sampled_from(REFUSED).flatmap(lambda cidr: st.ip_addresses(network=cidr)))
def test_following_the_advice_leads_to_the_peer(address: IPv4Address | IPv6Address) -> None:
    """Where IPv4 is spelled as IPv6 a prefix of either may be in the way.

    So it takes two flags at most, three for the two addresses of Teredo.
    """
    peer = (str(address), 9)
    flags: list[str] = []
    while refusal := PeerPolicy(allow=flags).refusal(peer):
        if "--allow-peer" not in refusal.text:
            return
        assert advised(refusal.text) not in flags
        flags.append(advised(refusal.text))

    assert 1 <= len(flags) <= 3


@settings(deadline=None)
@given(st.ip_addresses(), st.sampled_from([0, 9, 3478]))
def test_refusals_can_be_counted_by_rule(address: IPv4Address | IPv6Address, port: int) -> None:
    """There is only a handful of rules, whatever peers ask for."""
    policy = PeerPolicy(deny=["198.51.0.0/16"], own=OWN, own_hosts={pack_host("8.8.4.4")})
    refusal = policy.refusal((str(address), port))

    assert refusal is None or refusal.rule in RULES
    assert len(RULES) < 50


def test_a_denial_names_its_flag() -> None:
    refusal = PeerPolicy(deny=["198.51.0.0/16"]).refusal(("198.51.99.1", 9))

    assert refusal is not None
    assert refusal.rule == "deny-peer"
    assert refusal.text.startswith("--deny-peer 198.51.0.0/16; ")
    assert "longer prefix" in refusal.text
    longer = PeerPolicy(allow=["198.51.99.0/24"], deny=["198.51.0.0/16"])
    assert longer.refusal(("198.51.99.1", 9)) is None


@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::7"])
def test_a_denied_host_is_not_promised_a_longer_prefix(host: str) -> None:
    """There is none."""
    policy = PeerPolicy(allow=["198.51.100.0/24", "2001:db8::/32"], deny=[host])
    refusal = policy.refusal((host, 9))

    assert refusal is not None
    assert refusal.text.startswith(f"--deny-peer {host}")
    assert "longer prefix would allow it" not in refusal.text


# --- The relay's own host -------------------------------------------------------------------


OURS = ["8.8.4.4", "10.0.0.5", "2606:4700::1"]
AT_THE_WILDCARDS = [("0.0.0.0", 3478), ("::", 3478)]


@pytest.mark.parametrize("host", OURS)
def test_only_a_flag_for_exactly_that_address_opens_the_relays_host(host: str) -> None:
    """A prefix that it happens to lie in is meant for others."""
    own_hosts = {pack_host(one) for one in OURS}
    wide = ["8.8.0.0/16", "10.0.0.0/8", "10.0.0.4/31", "2606:4700::/32", "2606:4700::/127"]
    closed = PeerPolicy(wide, own=AT_THE_WILDCARDS, own_hosts=own_hosts)
    refusal = closed.refusal((host, 161))
    assert refusal is not None
    assert refusal.rule == "own host"
    assert refusal.text == f"{host} is this host; --allow-peer {host} would allow it"
    for neighbour in ("8.8.8.8", "10.0.0.4", "2606:4700::"):
        assert closed.refusal((neighbour, 161)) is None

    opened = PeerPolicy([*wide, host], own=AT_THE_WILDCARDS, own_hosts=own_hosts)
    assert opened.refusal((host, 161)) is None
    refusal = opened.refusal((host, 3478))
    assert refusal is not None
    assert refusal.rule == "own relay"
    denied = PeerPolicy([host], [host], own_hosts=own_hosts).refusal((host, 161))
    assert denied is not None
    assert denied.rule == "deny-peer"


def test_no_spelling_of_ipv4_reaches_the_relays_host() -> None:
    policy = PeerPolicy(["10.0.0.0/8", "::ffff:0:0/96"], own_hosts={pack_host("10.0.0.5")})
    refusal = policy.refusal(("::ffff:10.0.0.5", 161))
    assert refusal is not None
    assert refusal.rule == "own host"
    assert policy.refusal(("::ffff:10.0.0.6", 161)) is None


def test_an_address_counts_as_the_hosts_own_from_when_it_has_it_until_it_goes() -> None:
    """The policy is not built anew for that."""
    own_hosts: set[bytes] = set()
    policy = PeerPolicy(own=AT_THE_WILDCARDS, own_hosts=own_hosts)
    peers = ("8.8.4.4", 161), ("8.8.4.4", 3478), ("2606:4700::1", 3478)
    assert [policy.refusal(peer) for peer in peers] == [None] * 3

    own_hosts |= {pack_host("8.8.4.4"), pack_host("2606:4700::1")}
    refusals = [policy.refusal(peer) for peer in peers]
    assert [each and each.rule for each in refusals] == ["own host", "own relay", "own relay"]

    own_hosts.clear()
    assert [policy.refusal(peer) for peer in peers] == [None] * 3


def test_any_flag_for_loopback_is_about_this_host() -> None:
    """No other host could be meant."""
    own_hosts = {pack_host("127.0.0.1"), pack_host("::1")}
    policy = PeerPolicy(["127.0.0.0/8", "::1/128"], own=AT_THE_WILDCARDS, own_hosts=own_hosts)
    assert policy.refusal(("127.0.0.1", 161)) is None
    assert policy.refusal(("::1", 161)) is None
    assert policy.refusal(("127.0.0.1", 3478)) is not None
    assert policy.refusal(("::1", 3478)) is not None
    assert PeerPolicy(["0.0.0.0/0", "::/0"]).refusal(("127.0.0.1", 161)) is not None


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


def only_in(cidr: str) -> IPv4Address | IPv6Address:
    """Return an address that no longer prefix covers."""
    network = ip_network(cidr)
    return next(
        each
        for each in (network[-1], network[1 % network.num_addresses])
        if longest_of(REFUSED, each) == cidr
    )


def advised(refusal: str) -> str:
    """Return the prefix for which the text advises ``--allow-peer``."""
    advice = re.search(r"--allow-peer (\S+) would allow it", refusal)
    assert advice, refusal
    return advice.group(1)
