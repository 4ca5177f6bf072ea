"""UDP sockets: where they answer from, and what happens to what cannot be sent."""

import errno
import os
import select
import socket
from typing import Any

import pytest

from relay.net.addresses import is_local, local_addresses, outward_address
from relay.net.listening import ListeningSocket, WildcardSocket, listen
from relay.net.offload import Offload
from relay.net.udp import PortSocket, Shared, UdpReader, bind_udp

OFF = Offload(wanted=False)
ERRORS = [
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.EMSGSIZE,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EPERM,
    errno.EINVAL,
    errno.ECONNREFUSED,
]


class FailingSocket:
    """Stands in for a kernel that refuses to send."""

    family = socket.AF_INET

    def __init__(self, error: int) -> None:
        self._error = OSError(error, os.strerror(error))

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 3478

    def setsockopt(self, *_: Any) -> None:
        pass

    def getsockopt(self, *_: Any) -> int:
        return 0

    def recvfrom_into(self, *_: Any) -> None:
        raise AssertionError("a read")

    recvmsg_into = recvfrom_into

    def sendto(self, *_: Any) -> None:
        raise self._error

    def sendmsg(self, *_: Any) -> None:
        raise self._error


class Unread:
    """A reactor that reads nothing."""

    def register(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
def test_what_cannot_be_sent_is_counted_and_that_is_all(error: int) -> None:
    lost: list[str] = []
    sock: Any = FailingSocket(error)
    address: Any = ("127.0.0.1", 9)
    reactor: Any = Unread()
    counting = Shared(memoryview(b""), lost.append, OFF)
    port = PortSocket(sock, counting, Inbox(), reactor)
    port.reach(address).send(b"x")
    listening = ListeningSocket(sock, counting, Inbox())
    listening.reach((address, b"")).send(b"x")
    wildcard = WildcardSocket(sock, counting, Inbox())
    wildcard.reach((address, b"\x7f\0\0\1")).send(b"x")

    assert lost == [f"send_{errno.errorcode[error].lower()}"] * 3


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "127.1.2.3"])
def test_the_answer_comes_from_the_address_that_was_asked(address: str) -> None:
    """On a wildcard socket the kernel would pick 127.0.0.1 for all of these."""
    asks_and_is_answered("0.0.0.0", address)


def test_ipv6_answers_too() -> None:
    asks_and_is_answered("::", "::1")


@pytest.mark.parametrize(("wildcard", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_an_address_has_a_socket_of_its_own_but_its_clients_look_the_same(
    wildcard: str, address: str
) -> None:
    """They look the same to the wildcard socket too, which serves addresses added later."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    per_address = asks_and_is_answered(wildcard, address)
    sock = bind_udp(wildcard, 0, 65536)
    inbox = Inbox()
    alone = WildcardSocket(sock, shared(), inbox)
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.connect((address, alone.address[1]))
        client.send(b"ask")
        alone.reader.on_readable()
        assert inbox.sources[0][0] == client.getsockname()
    alone.close()

    assert inbox.sources[0][1] == per_address[1] == socket.inet_pton(family, address)


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "127.0.0.9"])
def test_nobody_else_can_bind_to_what_we_listen_on(address: str) -> None:
    listener = listen("0.0.0.0", 0, shared(), Inbox())
    with pytest.raises(OSError, match="in use"):
        bind_udp(address, listener.address[1], 65536, reuse_port=True)
    listener.close()


def test_closing_a_wildcard_socket_gives_back_the_port_at_all_addresses() -> None:
    listener = listen("0.0.0.0", 0, shared(), Inbox())
    assert len(listener.sockets) > 1
    listener.close()

    bind_udp("127.0.0.1", listener.address[1], 65536).close()


MANY = [f"127.0.0.{number}" for number in range(10, 99)]


@pytest.mark.parametrize(
    ("hosts", "bound"),
    [
        pytest.param(["192.0.2.254", "127.0.0.8", "::1"], ["127.0.0.8"], id="not ours"),
        pytest.param(MANY, MANY[:16], id="too many"),
    ],
)
def test_other_hosts_are_left_to_the_wildcard_socket(hosts: list[str], bound: list[str]) -> None:
    sock = bind_udp("0.0.0.0", 0, 65536)
    inbox = Inbox()
    listener = WildcardSocket(sock, shared(), inbox)
    listener.bind_per_address(hosts, inbox)

    assert listener.sockets[0] is listener
    assert [one.address[0] for one in listener.sockets[1:]] == bound
    listener.close()


def test_the_address_that_clients_write_to_gets_its_socket_before_others() -> None:
    """A host may have hundreds of addresses that nobody writes to, before it in the alphabet."""
    sock, inbox = bind_udp("0.0.0.0", 0, 65536), Inbox()
    listener = WildcardSocket(sock, shared(), inbox)
    listener.bind_per_address(MANY, inbox, {"127.0.0.77"})

    assert [one.address[0] for one in listener.sockets[1:]] == ["127.0.0.77", *MANY[:15]]
    listener.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_socket_bound_to_one_address_needs_no_such_care(address: str) -> None:
    client = asks_and_is_answered(address, address)

    assert client[1] == b""


def test_an_ipv6_socket_leaves_ipv4_alone() -> None:
    six = bind_udp("::", 0, 65536)
    four = bind_udp("0.0.0.0", six.getsockname()[1], 65536)
    four.close()
    six.close()


def test_a_port_cannot_be_bound_twice() -> None:
    first = bind_udp("127.0.0.1", 0, 65536)
    with pytest.raises(OSError, match="in use"):
        bind_udp("127.0.0.1", first.getsockname()[1], 65536)
    first.close()


def test_of_an_ipv6_peer_only_host_and_port_count() -> None:
    sock, inbox = bind_udp("::1", 0, 65536), Inbox()
    reader = UdpReader(sock, shared(), inbox)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer:
        peer.bind(("::1", 0))
        peer.sendto(b"hi", sock.getsockname())
        reader.on_readable()
        assert inbox.sources == [peer.getsockname()[:2]]
    sock.close()


def test_what_the_kernel_knows_of_addresses() -> None:
    assert is_local("127.0.0.1")
    assert is_local("127.9.9.9")
    assert not is_local("192.0.2.254")
    assert not is_local("2001:db8::fe")
    assert {"127.0.0.1"} <= local_addresses()
    for family in (socket.AF_INET, socket.AF_INET6):
        outward = outward_address(family)
        assert outward is None or is_local(outward)


def asks_and_is_answered(bind: str, address: str) -> tuple[Any, bytes]:
    """Send to *address* of a listening socket on *bind*; the answer must come from there."""
    buffer = bytearray(100)
    inbox = Inbox()
    listener = listen(bind, 0, shared(buffer), inbox)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.connect((address, listener.address[1]))  # hears from nobody else
        client.settimeout(10)
        client.send(b"ask")
        ready, _, _ = select.select(listener.sockets, [], [], 10)
        assert len(ready) == 1
        ready[0].reader.on_readable()
        assert bytes(buffer[:3]) == b"ask"
        listener.reach(inbox.sources[0]).send(b"answer")
        assert client.recv(100) == b"answer"
    listener.close()
    client_and_local: tuple[Any, bytes] = inbox.sources[0]
    return client_and_local


def shared(buffer: bytearray | None = None) -> Shared:
    return Shared(memoryview(bytearray(100) if buffer is None else buffer), _unexpected, OFF)


def _unexpected(name: str) -> None:
    raise AssertionError(name)


class Inbox:
    """Takes datagrams, and remembers where they came from."""

    def __init__(self) -> None:
        self.sources: list[Any] = []

    def on_datagram(self, _size: int, source: Any, _tos: int = 0) -> None:
        self.sources.append(source)

    def on_segments(self, *_: object) -> int:
        raise AssertionError("segments")
