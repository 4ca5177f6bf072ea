"""The live set of this host's addresses: in network namespaces, and with a kernel of our own."""

import errno
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import closing

import pytest

from relay.net.addresses import (
    dump_addresses,
    has_local_route,
    is_local,
    lasting_address,
    local_addresses,
    pack,
)
from relay.net.hostaddresses import HostAddresses, ProbedAddresses, host_addresses
from relay.net.porthosts import PortHosts
from tests.netns import inside, ip
from tests.test_net_netlink import ADDRESS, attribute, body, message
from tests.turnclient import TIMEOUT

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="making a network namespace takes root and iproute2",
)

FIRST, SECOND, THIRD = "192.0.2.1", "192.0.2.2", "2001:db8::3"


# --- With the real kernel -------------------------------------------------------------------


@pytest.fixture
def host() -> Iterator[str]:
    """The name of a namespace with FIRST at one of two interfaces."""
    name = f"addresses-{os.getpid()}"
    ip("netns", "add", name)
    try:
        for device in ("one", "two"):
            ip("-n", name, "link", "add", device, "type", "veth", "peer", "name", f"{device}-end")
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "address", "add", f"{FIRST}/24", "dev", "one")
        yield name
    finally:
        ip("netns", "delete", name)


class Watched:
    """The addresses of a namespace, and what was said of changes."""

    def __init__(self, host: str) -> None:
        with inside(host):
            self.addresses = HostAddresses()
        self.addresses.on_change = self._on_change
        self.touched: set[bytes] = set()
        self.news = 0

    def _on_change(self, touched: Collection[bytes], is_any_new: bool) -> None:
        self.touched |= set(touched)
        self.news += is_any_new

    def reads_all(self) -> None:
        """Read until there is nothing more."""
        while self.addresses.on_readable():
            pass

    def has(self, host: str) -> bool:
        return pack(host) in self.addresses


@pytest.fixture
def watched(host: str) -> Iterator[Watched]:
    watched = Watched(host)
    with closing(watched.addresses):
        yield watched


@needs_root
def test_it_has_the_addresses_of_the_start(watched: Watched) -> None:
    assert watched.has(FIRST)
    assert not watched.has(SECOND)
    assert not watched.has(THIRD)


@needs_root
def test_an_address_comes_and_goes(host: str, watched: Watched) -> None:
    for address, prefix in ((SECOND, 24), (THIRD, 64)):
        ip("-n", host, "address", "add", f"{address}/{prefix}", "dev", "one")
        wait_readable(watched)
        watched.reads_all()
        assert watched.has(address)
        assert pack(address) in watched.touched
        assert watched.news

        ip("-n", host, "address", "delete", f"{address}/{prefix}", "dev", "one")
        watched.touched.clear()
        wait_readable(watched)
        watched.reads_all()
        assert not watched.has(address)
        assert pack(address) in watched.touched


@needs_root
def test_an_address_at_two_interfaces_stays_until_both_lose_it(host: str, watched: Watched) -> None:
    """And with an interface all of its addresses go."""
    ip("-n", host, "address", "add", f"{FIRST}/32", "dev", "two")
    watched.reads_all()
    assert not watched.news  # the address is an old one
    ip("-n", host, "address", "delete", f"{FIRST}/24", "dev", "one")
    watched.reads_all()
    assert watched.has(FIRST)
    ip("-n", host, "link", "delete", "two")
    watched.reads_all()
    assert not watched.has(FIRST)


@needs_root
def test_a_link_local_address_is_ours_but_no_news(host: str, watched: Watched) -> None:
    watched.reads_all()
    watched.news = 0
    ip("-n", host, "address", "add", "fe80::77/64", "dev", "one")
    watched.reads_all()
    assert watched.has("fe80::77")
    assert watched.news == 0


@needs_root
def test_thousands_of_addresses_are_read_in_small_pieces(host: str, watched: Watched) -> None:
    """They overrun the socket, so that all are asked for again."""
    many = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(3_000)]
    batch(host, [f"address add {address}/32 dev one" for address in many])
    sizes = Sizes(watched)
    watched.reads_all()
    assert all(watched.has(address) for address in many)
    assert watched.has(FIRST)
    assert sizes.most <= 250  # addresses at once

    ip("-n", host, "link", "delete", "one")
    watched.reads_all()
    assert not any(watched.has(address) for address in (*many, FIRST))


class Sizes:
    """How many addresses were touched at once, at most; those of a dump that are gone aside."""

    def __init__(self, watched: Watched) -> None:
        self.most = 0
        watched.addresses.on_change = self._on_change

    def _on_change(self, touched: Collection[bytes], _is_any_new: bool) -> None:
        self.most = max(self.most, len(touched))


@needs_root
def test_what_is_asked_for_once(host: str) -> None:
    with inside(host):
        assert {FIRST} == {one for one in local_addresses() if not one.startswith("fe80:")}
        entries = dump_addresses(socket.AF_INET)
        assert {(prefix, packed) for _, prefix, packed in entries} == {(24, pack(FIRST))}


@needs_root
def test_what_a_socket_can_be_bound_to_is_local(host: str) -> None:
    """Unless anything can be bound."""
    ip("-n", host, "route", "add", "local", "198.51.100.0/24", "dev", "one")
    with inside(host):
        assert is_local(FIRST)
        assert not is_local(SECOND)
        assert has_local_route("198.51.100.9")
        probed = ProbedAddresses()
        assert pack(FIRST) in probed
        assert pack(SECOND) not in probed
        assert pack(THIRD) not in probed
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1"], check=True)
        assert is_local(FIRST)
        assert not is_local(SECOND)
        assert not has_local_route("198.51.100.9")


# --- Where ports are bound ------------------------------------------------------------------

V4, V6 = 1, 2


@needs_root
def test_ports_are_bound_to_the_public_address_while_it_is_there(host: str) -> None:
    with inside(host):
        watched = Watched(host)
        hosts = PortHosts(watched.addresses, {V4: SECOND}, {V4: "0.0.0.0"})
        watched.addresses.on_change = lambda touched, _: hosts.on_change(touched)
        with closing(watched.addresses):
            assert hosts.current == {V4: "0.0.0.0"}
            assert hosts.missing == ""  # as behind a NAT
            assert hosts.are_sources_of(V4, FIRST)
            assert hosts.are_sources_of(V4, SECOND)  # what a NAT loops back
            assert not hosts.are_sources_of(V4, "192.0.2.9")

            ip("-n", host, "address", "add", f"{SECOND}/24", "dev", "one")
            watched.reads_all()
            assert hosts.current == {V4: SECOND}

            ip("-n", host, "address", "delete", f"{SECOND}/24", "dev", "one")
            watched.reads_all()
            assert hosts.current == {V4: "0.0.0.0"}
            assert hosts.missing == SECOND


@needs_root
def test_with_nonlocal_bind_only_what_is_there_counts(host: str) -> None:
    """As where addresses move between hosts: VRRP."""
    with inside(host):
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1"], check=True)
        hosts = PortHosts({pack(FIRST)}, {V4: SECOND}, {V4: "0.0.0.0"})
        assert hosts.current == {V4: "0.0.0.0"}
        hosts = PortHosts({pack(FIRST)}, {V4: FIRST}, {V4: "0.0.0.0"})
        assert hosts.current == {V4: FIRST}


def test_where_one_address_is_given_ports_are_bound_there() -> None:
    own = {pack(FIRST)}
    hosts = PortHosts(own, {V4: SECOND, V6: THIRD}, {V4: FIRST, V6: "2001:db8::9"})
    assert hosts.current == {V4: FIRST, V6: "2001:db8::9"}
    own.clear()
    assert hosts.missing == ""  # the other family never had one
    hosts = PortHosts(own, {V4: SECOND}, {V4: FIRST})
    own.add(pack(FIRST))
    hosts.look_at_all()
    own.clear()
    assert hosts.missing == FIRST


def test_an_address_that_cannot_be_bound_yet_is_passed_over() -> None:
    hosts = PortHosts({pack("127.0.0.1")}, {V4: "127.0.0.1"}, {V4: "0.0.0.0"})
    bound: list[str] = []

    def bind() -> str:
        bound.append(hosts.current[V4])
        if hosts.current[V4] == "127.0.0.1":
            raise OSError(errno.EADDRNOTAVAIL, "not yet")
        return "a port"

    assert hosts.open(V4, bind) == "a port"
    assert bound == ["127.0.0.1", "0.0.0.0"]
    hosts.on_change({pack("127.0.0.1")})
    assert hosts.current[V4] == "127.0.0.1"


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EMFILE])
def test_other_failures_are_the_callers(number: int) -> None:
    hosts = PortHosts({pack("127.0.0.1")}, {V4: "127.0.0.1"}, {V4: "0.0.0.0"})

    def bind() -> str:
        raise OSError(number, "no")

    with pytest.raises(OSError, match="no"):
        hosts.open(V4, bind)
    assert hosts.current[V4] == "127.0.0.1"


# --- An IPv6 address that lasts -------------------------------------------------------------

TEMPORARY, STABLE = "2001:db8:0:1::aaaa", "2001:db8:0:1::1"
LASTING = [
    pytest.param({(1, TEMPORARY): 0x01, (1, STABLE): 0x80}, STABLE, id="beside a temporary one"),
    pytest.param({(1, TEMPORARY): 0x80, (1, STABLE): 0x80}, TEMPORARY, id="what lasts is kept"),
    pytest.param({(1, TEMPORARY): 0x01}, TEMPORARY, id="there is no other"),
    pytest.param({(1, TEMPORARY): 0x01, (2, STABLE): 0x80}, TEMPORARY, id="another interface"),
    pytest.param({(1, TEMPORARY): 0x01, (1, THIRD): 0x80}, TEMPORARY, id="another prefix"),
    pytest.param({(1, TEMPORARY): 0x01, (1, STABLE): 0xA0}, TEMPORARY, id="deprecated"),
    pytest.param({(1, TEMPORARY): 0x01, (1, STABLE): 0xC0}, TEMPORARY, id="tentative"),
    pytest.param({}, TEMPORARY, id="nothing is known"),
]


@pytest.mark.parametrize(("flags", "found"), LASTING)
def test_an_address_that_lasts_is_preferred(flags: dict[tuple[int, str], int], found: str) -> None:
    entries = {(interface, 64, pack(host)): bits for (interface, host), bits in flags.items()}
    assert lasting_address(TEMPORARY, entries) == found


# --- A kernel of our own --------------------------------------------------------------------

NEW, DELETED, DONE, ERROR, INTERRUPTED = 20, 21, 3, 2, 0x10


class Kernel(socket.socket):
    """Says what it is told to: bytes, or an error to raise. Then it has nothing to say."""

    def __init__(self, *says: bytes | OSError) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.says = list(says)
        self.requests: list[int] = []
        self.sender = 0

    def send(self, request: bytes, _flags: int = 0) -> int:  # type: ignore[override]
        self.requests.append(struct.unpack_from("=I", request, 8)[0])
        return len(request)

    def recvfrom(self, _size: int, _flags: int = 0) -> tuple[bytes, tuple[int, int]]:
        return self.recv(_size), (self.sender, 0)

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self.says:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        said = self.says.pop(0)
        if isinstance(said, OSError):
            raise said
        return said


def has(host: str, *, sequence: int = 0, flags: int = 0) -> bytes:
    content = body(attribute(ADDRESS, pack(host)))
    return message(NEW, content, sequence=sequence, flags=flags)


def done(sequence: int, flags: int = 0) -> bytes:
    return message(DONE, bytes(4), sequence=sequence, flags=flags)


OVERRUN = OSError(errno.ENOBUFS, "overrun")


def test_what_was_lost_is_asked_for_again() -> None:
    """Once everything older is read: only what comes after the request may count."""
    kernel = Kernel(has(FIRST, sequence=1) + done(1))
    addresses = HostAddresses(lambda _: kernel)
    kernel.says = [OVERRUN, has("192.0.2.8"), has("192.0.2.9"), OVERRUN]
    assert addresses.on_readable()
    assert kernel.requests == [1, 2]
    assert pack("192.0.2.8") not in addresses
    assert pack(FIRST) in addresses

    kernel.says = [has(SECOND, sequence=2), done(2)]
    while addresses.on_readable():
        pass
    assert pack(SECOND) in addresses
    assert pack(FIRST) not in addresses
    kernel.close()


@pytest.mark.parametrize("how", ["overrun", "interrupted"])
def test_what_is_lost_during_a_dump_is_asked_for_after_it(how: str) -> None:
    kernel = Kernel(has(FIRST, sequence=1) + done(1))
    addresses = HostAddresses(lambda _: kernel)
    kernel.says = [OVERRUN]
    addresses.on_readable()
    flags = INTERRUPTED if how == "interrupted" else 0
    kernel.says = [has(SECOND, sequence=2, flags=flags), done(2)]
    if how == "overrun":
        kernel.says.insert(0, OVERRUN)
    while len(kernel.says) > 0:
        addresses.on_readable()
    assert kernel.requests == [1, 2, 3]
    assert pack(FIRST) in addresses  # what a dump lacks that is not whole, is not gone

    kernel.says = [has(SECOND, sequence=3) + done(3)]
    addresses.on_readable()
    assert pack(FIRST) not in addresses
    assert pack(SECOND) in addresses
    kernel.close()


def test_a_start_during_which_something_changes_goes_on_in_the_loop() -> None:
    kernel = Kernel(has(FIRST, sequence=1, flags=INTERRUPTED) + done(1))
    addresses = HostAddresses(lambda _: kernel)
    assert kernel.requests == [1, 2]
    assert pack(FIRST) in addresses
    kernel.close()


def test_nobody_but_the_kernel_is_believed() -> None:
    kernel = Kernel(done(1))
    addresses = HostAddresses(lambda _: kernel)
    kernel.sender = 4711
    kernel.says = [has(FIRST)]
    addresses.on_readable()
    assert pack(FIRST) not in addresses
    kernel.close()


def test_nonsense_is_said_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel(has(FIRST) + done(1))
    addresses = HostAddresses(lambda _: kernel)
    kernel.says = [b"nonsense", OSError(errno.EIO, "broken")]
    while addresses.on_readable():
        pass
    assert pack(FIRST) in addresses
    assert caplog.text.count("may be missed") == 2
    assert kernel.requests == [1]
    kernel.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(message(ERROR, struct.pack("=i", -errno.EPERM), sequence=1), id="refused"),
        pytest.param(b"nonsense", id="nonsense"),
        pytest.param(None, id="silence"),
    ],
)
def test_a_kernel_that_does_not_tell_is_asked_in_another_way(
    answer: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel() if answer is None else Kernel(answer)
    addresses = host_addresses(lambda _: kernel)
    assert not isinstance(addresses, HostAddresses)
    assert kernel.fileno() < 0
    assert "does not tell of this host's addresses" in caplog.text
    assert pack("127.0.0.1") in addresses
    assert pack("192.0.2.254") not in addresses


@needs_root
def test_where_that_tells_nothing_either_it_is_said(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    with inside(host):
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1"], check=True)
        addresses = host_addresses(refuses)
    assert pack(FIRST) not in addresses
    assert "--deny-peer" in caplog.text


def refuses(_groups: int) -> socket.socket:
    raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")


def test_without_descriptors_a_peer_counts_as_ours() -> None:
    """Which is safe."""
    limited = (
        "import resource; from relay.net.hostaddresses import ProbedAddresses; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
        "print(bytes([192, 0, 2, 254]) in ProbedAddresses())"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert done.stdout == "True\n"


# --- Helpers --------------------------------------------------------------------------------


def wait_readable(watched: Watched) -> None:
    assert select.select([watched.addresses], [], [], TIMEOUT)[0]


def batch(host: str, commands: list[str]) -> None:
    subprocess.run(
        ["ip", "-n", host, "-batch", "-"], input="\n".join(commands), text=True, check=True
    )
