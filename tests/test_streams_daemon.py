"""The running relay over TCP and TLS: real connections, certificates, reloads and its end."""

import os
import signal
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from relay.stun.address import Address
from relay.stun.attributes import Attr
from relay.stun.const import Family
from tests.certificates import Authority
from tests.fakeportal import FakePortal
from tests.probes import scrape
from tests.process import RelayProcess, free_port, free_tcp_port
from tests.turnclient import Peer, StreamClient, TurnClient, TurnError

AUTHORITY = Authority()
SERVER = AUTHORITY.issue("relay.test")
# Nobody else may read what a test has written.
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()


class Ports:
    """Where a relay is reached."""

    def __init__(self) -> None:
        self.udp = free_port()
        self.tcp, self.tls, self.http = free_tcp_port(), free_tcp_port(), free_tcp_port()


@pytest.fixture
def ports() -> Ports:
    return Ports()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SERVER.write_to(tmp_path)
    (tmp_path / "relay.conf").write_text("")
    return tmp_path


@pytest.fixture
def arguments(ports: Ports, folder: Path) -> list[str]:
    return [
        f"--config={folder / 'relay.conf'}",
        *(f"--tcp-port={ports.tcp}", f"--tls-port={ports.tls}"),
        *(f"--tls-cert={folder / 'server.crt'}", f"--tls-key={folder / 'server.key'}"),
        f"--http-addr=127.0.0.1:{ports.http}",
        *SAME_USER,
    ]


@pytest.fixture
def relay(ports: Ports, arguments: list[str]) -> Iterator[RelayProcess]:
    with RelayProcess(*arguments, port=ports.udp) as relay:
        yield relay


def context() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=AUTHORITY.pem)


def client_of(relay: RelayProcess, address: Address, *, tls: bool = False) -> StreamClient:
    return StreamClient(address, relay.username, relay.password, context=context() if tls else None)


# --- Calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
def test_data_flows_both_ways(relay: RelayProcess, ports: Ports, host: str, *, tls: bool) -> None:
    address = (host, ports.tls if tls else ports.tcp)
    family = Family.IPV6 if ":" in host else Family.IPV4
    with client_of(relay, address, tls=tls) as alice, Peer(family) as bob:
        assert alice.maps() == alice.address
        relayed = alice.allocates(family)
        alice.binds(0x4001, bob.address)
        alice.sends(0x4001, b"hello")
        assert bob.receives() == (b"hello", relayed)
        bob.sends(b"world", to=relayed)
        assert alice.receives() == (0x4001, b"world")


def test_indications_flow_both_ways(relay: RelayProcess, ports: Ports) -> None:
    with client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice, Peer() as bob:
        relayed = alice.allocates()
        alice.permits(bob.address)
        alice.indicates(bob.address, b"hello")
        assert bob.receives() == (b"hello", relayed)
        bob.sends(b"world", to=relayed)
        assert alice.hears().get(Attr.DATA) == b"world"


def test_large_datagrams_and_many_of_them(relay: RelayProcess, ports: Ports) -> None:
    """Each arrives whole and in order: one client is another one's peer."""
    with (
        client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice,
        client_of(relay, ("127.0.0.1", ports.tcp)) as bob,
    ):
        to_alice, to_bob = alice.allocates(), bob.allocates()
        alice.binds(0x4001, to_bob)
        bob.binds(0x4002, to_alice)
        payloads = [bytes([number]) * size for number, size in enumerate((1, 1200, 16383, 65000))]
        for payload in payloads * 3:
            alice.sends(0x4001, payload)
        assert [bob.receives() for _ in range(12)] == [(0x4002, one) for one in payloads * 3]


def test_an_allocation_ends_with_its_connection(relay: RelayProcess, ports: Ports) -> None:
    with client_of(relay, ("127.0.0.1", ports.tcp)) as alice:
        alice.allocates()
    # What comes after it is served after it.
    with client_of(relay, ("127.0.0.1", ports.tcp)) as bob:
        bob.maps()
    metrics = scrape(ports.http)
    assert metrics["relay_connections_accepted_total", "tcp"] == 2
    assert metrics["relay_connections_ended_total", "client"] >= 1
    relay.signals(signal.SIGTERM)  # with an allocation left it would drain
    assert relay.wait() == 0
    assert "draining" not in relay.errors()


def test_metrics_tell_transports_apart(relay: RelayProcess, ports: Ports) -> None:
    with (
        client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice,
        TurnClient(("127.0.0.1", ports.udp), relay.username, relay.password) as bob,
    ):
        to_alice, to_bob = alice.allocates(), bob.allocates()
        alice.binds(0x4001, to_bob)
        bob.binds(0x4002, to_alice)
        alice.sends(0x4001, b"hello")
        assert bob.receives() == (0x4002, b"hello")
        metrics = scrape(ports.http)
    assert metrics["relay_relayed_bytes_total", "tls", "client_to_peer", "sockets"] == 5
    assert metrics["relay_relayed_bytes_total", "udp", "peer_to_client", "sockets"] == 5
    assert metrics["relay_relayed_bytes_total", "udp", "client_to_peer", "sockets"] == 0
    assert metrics["relay_connections", "tls"] == 1
    assert metrics["relay_connections", "tcp"] == 0
    assert metrics["relay_tls_certificate_expiry_timestamp_seconds"] == SERVER.expires


def test_urls_of_every_transport_are_printed(relay: RelayProcess, ports: Ports) -> None:
    assert relay.urls == [
        f"turn:127.0.0.1:{ports.udp}?transport=udp",
        f"turn:[::1]:{ports.udp}?transport=udp",
        f"turn:127.0.0.1:{ports.tcp}?transport=tcp",
        f"turn:[::1]:{ports.tcp}?transport=tcp",
        f"turns:relay.test:{ports.tls}?transport=tcp",
    ]


def test_a_wrong_password_is_refused_and_named(relay: RelayProcess, ports: Ports) -> None:
    with StreamClient(("127.0.0.1", ports.tcp), relay.username, "wrong") as alice:
        with pytest.raises(TurnError, match="401"):
            alice.allocates()
        host, port = alice.address
        relay.logs(f"authentication failed for {host}:{port}")


def test_a_proxy_says_where_the_client_is(ports: Ports, arguments: list[str]) -> None:
    with (
        RelayProcess(*arguments, "--proxy-protocol-from=127.0.0.0/8", port=ports.udp) as relay,
        StreamClient(
            ("127.0.0.1", ports.tls),
            relay.username,
            relay.password,
            context=context(),
            first=b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n",
        ) as alice,
    ):
        assert alice.maps() == ("192.0.2.7", 50000)


JUNK = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",  # the start of a hello
    bytes(range(256)),
    b"\x40\x00\x07\x00" + bytes(100),  # of which the end never comes
    b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12),  # a Binding request
]


def test_whoever_else_connects_nobody_loses_anything(relay: RelayProcess, ports: Ports) -> None:
    """One client over UDP, one over TCP, one over TLS; beside them many who mean no good."""
    address = ("127.0.0.1", ports.udp)
    with (
        Peer() as peer,
        TurnClient(address, relay.username, relay.password) as by_udp,
        client_of(relay, ("127.0.0.1", ports.tcp)) as by_tcp,
        client_of(relay, ("127.0.0.1", ports.tls), tls=True) as by_tls,
        ExitStack() as stack,
    ):
        clients = (by_udp, by_tcp, by_tls)
        relayed = [client.allocates() for client in clients]
        for client in clients:
            client.binds(0x4001, peer.address)
        others: list[socket.socket] = []
        for number in range(300):
            port = (ports.tcp, ports.tls)[number % 2]
            other = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            other.send(JUNK[number % len(JUNK)])
            others.append(other)
            if number % 3 == 0:
                linger = struct.pack("ii", 1, 0)
                other = others.pop(number % len(others))
                other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                other.close()
            for client, source in zip(clients, relayed, strict=True):
                payload = b"%d" % number
                client.sends(0x4001, payload)
                assert peer.receives() == (payload, source)
                peer.sends(payload, to=source)
                assert client.receives() == (0x4001, payload)
        by_udp.refreshes(0)  # the others end with their connections
    relay.signals(signal.SIGTERM)
    assert relay.wait() == 0
    assert "ERROR" not in relay.errors()


# --- Certificates ----------------------------------------------------------------------------


def shown(ports: Ports) -> set[str]:
    """Return the names in the certificate that the relay shows now."""
    with (
        socket.create_connection(("127.0.0.1", ports.tls)) as sock,
        context().wrap_socket(sock, server_hostname="relay.test") as tls,
    ):
        certificate = tls.getpeercert()
        assert certificate is not None
        return {str(name[1]) for name in certificate["subjectAltName"]}


def test_a_reload_reads_the_certificate_again_and_loses_no_connection(
    relay: RelayProcess, ports: Ports, folder: Path
) -> None:
    with client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice, Peer() as bob:
        relayed = alice.allocates()
        alice.binds(0x4001, bob.address)
        for name in ("first.test", "second.test"):
            AUTHORITY.issue("relay.test", name).write_to(folder)
            relay.signals(signal.SIGHUP)
            relay.logs("reloaded; changed: tls-cert, tls-key", after=relay.lines - 1)
            while name not in shown(ports):  # the reload is still under way
                pass
            alice.sends(0x4001, b"still here")
            assert bob.receives() == (b"still here", relayed)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        pytest.param("server.crt", "", "holds no certificate in PEM", id="no certificate"),
        pytest.param("server.key", "hello", "holds no private key in PEM", id="no key"),
        pytest.param(
            "server.key", AUTHORITY.issue("relay.test").key, "the key is not that", id="another key"
        ),
        pytest.param("server.crt", None, "No such file or directory", id="no file"),
    ],
)
def test_a_certificate_that_is_no_good_changes_nothing(
    relay: RelayProcess, ports: Ports, folder: Path, file: str, content: str | None, problem: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    relay.signals(signal.SIGHUP)
    assert problem in relay.logs("not reloaded, all stays as it was: tls-")
    assert shown(ports) == {"relay.test"}


@pytest.mark.parametrize(
    ("lasts", "warning"),
    [
        pytest.param(
            timedelta(days=13, hours=1), "the certificate for TLS ends in 13 days", id="soon"
        ),
        pytest.param(timedelta(hours=-1), "the certificate for TLS has ended", id="over"),
        pytest.param(timedelta(days=15), None, id="not yet"),
    ],
)
def test_the_end_of_a_certificate_is_announced(
    ports: Ports, folder: Path, arguments: list[str], lasts: timedelta, warning: str | None
) -> None:
    AUTHORITY.issue("relay.test", lasts=lasts).write_to(folder)
    with RelayProcess(*arguments, port=ports.udp) as relay:
        if warning is None:
            assert "the certificate for TLS" not in relay.errors()
        else:
            assert warning in relay.errors()


def test_a_key_that_takes_long_is_warned_of(
    ports: Ports, folder: Path, arguments: list[str]
) -> None:
    AUTHORITY.issue("relay.test", kind="rsa-3072").write_to(folder)
    with RelayProcess(*arguments, port=ports.udp) as relay:
        assert "the certificate's key is RSA of 3072 bits" in relay.errors()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_certificate_is_reread_without_privileges(
    ports: Ports, folder: Path, arguments: list[str]
) -> None:
    """As nobody, whose process nobody may look into: ssl reads files, and finds those of memory."""
    folder.chmod(0o755)
    arguments = [argument for argument in arguments if not argument.startswith("--user")]
    for parent in folder.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    with RelayProcess(*arguments, port=ports.udp) as relay:
        AUTHORITY.issue("relay.test", "other.test").write_to(folder)
        relay.signals(signal.SIGHUP)
        relay.logs("reloaded; changed: tls-cert, tls-key")
        assert shown(ports) == {"relay.test", "other.test"}


# --- How it starts and ends ------------------------------------------------------------------


def test_a_port_in_use_is_named(ports: Ports, arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", ports.tcp)):
        relay = RelayProcess(*arguments, port=ports.udp)
        with pytest.raises(AssertionError, match="did not start"):
            relay.__enter__()
    assert relay.process.returncode == os.EX_CANTCREAT
    assert f"cannot listen on 0.0.0.0:{ports.tcp} (TCP): Address already in use" in relay.errors()


def test_sockets_of_systemd_are_used(ports: Ports, arguments: list[str]) -> None:
    """Told apart by their kind and port. One that does not listen is none of ours."""
    with (
        socket.create_server(("127.0.0.1", ports.tcp)) as tcp,
        socket.create_server(("127.0.0.1", ports.tls)) as tls,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket() as other,
    ):
        udp.bind(("127.0.0.1", ports.udp))
        other.bind(("127.0.0.1", 0))
        handed_over = (tcp, udp, other, tls)
        variables = {"LISTEN_FDS": "4", "LISTEN_FDNAMES": "turn:turn:turn:turn"}
        with RelayProcess(
            *arguments,
            port=ports.udp,
            descriptors=tuple(sock.fileno() for sock in handed_over),
            variables=variables,
        ) as relay:
            with tcp.dup() as shared:  # or who binds it again would have to wait for TIME_WAIT
                assert shared.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            for sock in handed_over:
                sock.close()
            assert f"127.0.0.1:{ports.tcp} (TCP)" in relay.logs("relaying")
            assert "not used: 127.0.0.1:" in relay.errors()
            with client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice:
                alice.allocates()


def test_a_socket_of_systemd_for_both_families_is_refused(
    ports: Ports, arguments: list[str]
) -> None:
    """Its clients of IPv4 would be of IPv6, and all of one /64."""
    with socket.create_server(
        ("::", ports.tcp), family=socket.AF_INET6, dualstack_ipv6=True
    ) as both:
        relay = RelayProcess(
            *arguments,
            port=ports.udp,
            descriptors=(both.fileno(),),
            variables={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "turn"},
        )
        with pytest.raises(AssertionError, match="did not start"):
            relay.__enter__()
    assert relay.process.returncode == os.EX_CONFIG
    assert "(BindIPv6Only=ipv6-only is missing)" in relay.errors()


def test_nobody_is_accepted_before_the_portal_says_so(ports: Ports, arguments: list[str]) -> None:
    """Connections wait, and are served then."""
    with FakePortal() as portal:
        portal.serves(init=False)
        variables = {"FIREZONE_TOKEN": "a-token", "FIREZONE_API_URL": portal.url}
        with RelayProcess(*arguments, port=ports.udp, portal=True, variables=variables) as relay:
            relay.logs("joined the portal")
            with StreamClient(("127.0.0.1", ports.tcp), "", "") as alice:
                assert scrape(ports.http)["relay_connections_accepted_total", "tcp"] == 0
                portal.says_init()
                assert alice.maps() == alice.address


def test_clients_are_told_of_the_end(relay: RelayProcess, ports: Ports) -> None:
    with (
        client_of(relay, ("127.0.0.1", ports.tls), tls=True) as alice,
        client_of(relay, ("127.0.0.1", ports.tcp)) as bob,
    ):
        alice.maps()
        bob.maps()
        relay.signals(signal.SIGTERM)
        assert alice.socket.recv(1) == b""  # by close_notify: cut off, it would be an error
        assert bob.socket.recv(1) == b""
    assert relay.wait() == 0


def test_what_there_is_relays_on_while_it_drains(relay: RelayProcess, ports: Ports) -> None:
    with client_of(relay, ("127.0.0.1", ports.tcp)) as alice, Peer() as bob:
        relayed = alice.allocates()
        alice.binds(0x4001, bob.address)
        relay.signals(signal.SIGTERM)
        relay.logs("draining")
        alice.sends(0x4001, b"still here")
        assert bob.receives() == (b"still here", relayed)
        with (
            client_of(relay, ("127.0.0.1", ports.tcp)) as late,
            pytest.raises(TurnError, match="508"),
        ):
            late.allocates()
        alice.refreshes(0)
        assert relay.wait() == 0


def test_without_the_options_nothing_listens(ports: Ports) -> None:
    with RelayProcess(port=ports.udp), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports.udp))
