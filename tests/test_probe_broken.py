"""What the probe says of servers, and networks, that are broken in one way each."""

import itertools
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from relay.probe.checks import Checks, Options
from relay.probe.client import Credential, Pair
from relay.probe.findings import Report, State
from relay.probe.target import parse_uri
from relay.stun.attributes import Attr, DecodeError
from relay.stun.const import ErrorCode, Kind, Method
from relay.stun.message import Message, Received, decode
from relay.turn.users import mint_rest
from tests.certificates import Authority
from tests.interop.needs import needs_programs, needs_root
from tests.middlebox import Hook, Middlebox, nothing, unchanged
from tests.netns import inside, ip
from tests.process import RelayProcess, free_port, free_tcp_port
from tests.turnclient import TIMEOUT

SECRET = "0123456789abcdef"
LIFETIME = 3600
PATIENT = 2.0  # seconds for a request, where something is waited for that does not come
CLOSED = """
table inet closed {
    chain input {
        type filter hook input priority 0;
        udp dport 61000-65535 drop
    }
}
"""
# Nobody else may read what a test has written.
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "auth.secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def relay(secret_file: Path) -> Iterator[RelayProcess]:
    """A relay that is all right."""
    with RelayProcess(f"--auth-secret-file={secret_file}", *SAME_USER, port=free_port()) as relay:
        yield relay


def credential(name: str = "alice", expires_in: int = LIFETIME, secret: str = SECRET) -> Credential:
    return Credential(*mint_rest(int(time.time()) + expires_in, name, secret))


def probe(port: int, *, url: str = "turn:127.0.0.1:{}", **options: Any) -> Report:
    """Probe what is at a port of loopback, and return what was found."""
    given = {"credential": credential(), "seconds": 0, "most_per_second": 0}
    report = Report()
    target = parse_uri(url.format(port))
    with closing(Checks(target, Options(**{**given, **options}), report)) as checks:
        checks.run()
    return report


def probe_through(
    relay: RelayProcess,
    *,
    to_server: Hook = unchanged,
    to_client: Hook = unchanged,
    replies: Hook = nothing,
    **options: Any,
) -> Report:
    hooks = {"to_server": to_server, "to_client": to_client, "replies": replies}
    with Middlebox(("127.0.0.1", relay.port), **hooks) as middlebox:
        return probe(middlebox.address[1], **options)


def failures(report: Report) -> dict[str, str]:
    return {each.name: each.text for each in report if each.state is State.FAILED}


def state_of(report: Report, name: str) -> tuple[State, str]:
    [found] = [each for each in report if each.name == name]
    return found.state, found.text


# --- Nothing is broken ----------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is_wrong(relay: RelayProcess) -> None:
    report = probe(relay.port, seconds=0.5, most_per_second=500)
    assert failures(report) == {}
    assert {each.name for each in report if each.state is State.OK} >= {
        *("reachable, IPv4", "mapped address", "authentication", "allocation, IPv4", "lifetime"),
        *("allocation, IPv6", "two clients", "sizes", "indications", "peer outside"),
        *("latency", "loss", "rate"),
    }
    assert state_of(report, "forbidden peers")[0] is State.OK


def test_a_relay_for_the_internet_keeps_its_users_from_its_networks(secret_file: Path) -> None:
    arguments = ("--public-ip4-addr=127.0.0.1", f"--auth-secret-file={secret_file}", *SAME_USER)
    with RelayProcess(*arguments, port=free_port(), loopback=False) as closed:
        report = probe(closed.port)
    assert failures(report) == {}
    assert state_of(report, "forbidden peers")[0] is State.OK
    # So this machine cannot be a peer either.
    assert state_of(report, "peer outside")[0] is State.SKIPPED


def test_nothing_is_found_through_a_middlebox_that_does_nothing(relay: RelayProcess) -> None:
    report = probe_through(relay)
    assert failures(report) == {}
    assert "behind a NAT" in state_of(report, "mapped address")[1]


def test_all_that_was_allocated_is_given_back(secret_file: Path) -> None:
    arguments = (f"--auth-secret-file={secret_file}", *SAME_USER, "--max-allocations=8")
    with RelayProcess(*arguments, port=free_port()) as small:
        for _ in range(5):
            assert failures(probe(small.port)) == {}


# --- Who asks -------------------------------------------------------------------------------


def test_wrong_secret(relay: RelayProcess) -> None:
    report = probe(relay.port, credential=credential(secret="another"))
    assert "wrong username or password, or another secret" in failures(report)["authentication"]


def test_expired_credential(relay: RelayProcess) -> None:
    report = probe(relay.port, credential=credential(expires_in=-100))
    assert "it expired 10" in failures(report)["authentication"]


def test_quota(secret_file: Path) -> None:
    arguments = (f"--auth-secret-file={secret_file}", *SAME_USER)
    with RelayProcess(*arguments, "--max-allocations-per-username=1", port=free_port()) as small:
        report = probe(small.port)
    assert "486" in failures(report)["two clients"]


def test_every_nonce_is_stale(relay: RelayProcess) -> None:
    numbers = itertools.count()

    def replies(datagram: bytes) -> Iterable[bytes]:
        request = read(datagram)
        if request is not None and request.integrity_offset is not None:
            nonce = (Attr.NONCE, b"%d" % next(numbers))
            yield error(request, ErrorCode.STALE_NONCE, (Attr.REALM, "firezone"), nonce)

    report = probe_through(relay, replies=replies, to_server=unless_signed)
    assert "each new nonce is refused as stale" in failures(report)["authentication"]


def test_whoever_comes_is_served(relay: RelayProcess) -> None:
    def replies(datagram: bytes) -> Iterable[bytes]:
        request = read(datagram)
        if request is not None and request.message.method == Method.ALLOCATE:
            relayed = (Attr.XOR_RELAYED_ADDRESS, ("127.0.0.1", 50000))
            yield answer(request, Kind.SUCCESS, relayed, (Attr.LIFETIME, 600))

    report = probe_through(relay, replies=replies)
    assert "it is open" in failures(report)["authentication"]


def test_answers_are_not_signed(relay: RelayProcess) -> None:
    def strip(datagram: bytes) -> Iterable[bytes]:
        received = read(datagram)
        if received is None or received.integrity_offset is None:
            return (datagram,)
        unsigned = bytearray(datagram[: received.integrity_offset])
        unsigned[2:4] = (len(unsigned) - 20).to_bytes(2)
        return (bytes(unsigned),)

    report = probe_through(relay, to_client=strip)
    assert "not signed" in failures(report)["signature"]


# --- What is relayed ------------------------------------------------------------------------


def test_hairpin_is_refused(relay: RelayProcess) -> None:
    """A client asks for a peer at the relay's own ports."""

    def is_hairpin(datagram: bytes) -> Received | None:
        request = read(datagram)
        if request is None or request.message.kind is not Kind.REQUEST:
            return None
        peers = request.message.get_all(Attr.XOR_PEER_ADDRESS)
        return request if any(port >= 49152 for _, port in peers) else None

    def replies(datagram: bytes) -> Iterable[bytes]:
        request = is_hairpin(datagram)
        if request is not None:
            yield error(request, ErrorCode.FORBIDDEN)

    def to_server(datagram: bytes) -> Iterable[bytes]:
        return () if is_hairpin(datagram) else (datagram,)

    report = probe_through(relay, replies=replies, to_server=to_server, seconds=0.2)
    assert "its own addresses are refused as peers" in failures(report)["two clients"]
    # So it is measured to a peer on this machine.
    assert state_of(report, "peer outside")[0] is State.OK
    assert state_of(report, "loss")[0] is State.OK


def test_permissions_have_no_effect(secret_file: Path) -> None:
    arguments = (f"--auth-secret-file={secret_file}", *SAME_USER, "--no-send-indications")
    with RelayProcess(*arguments, port=free_port()) as deaf:
        report = probe(deaf.port, time_limit=PATIENT)
        assert "Send indications are not relayed" in failures(report)["indications"]
        # Which Firezone's relays are meant to do.
        assert failures(probe(deaf.port, is_firezone=True, time_limit=PATIENT)) == {}


def test_channels_have_no_effect(relay: RelayProcess) -> None:
    report = probe_through(relay, to_server=unless_channel_data, time_limit=PATIENT)
    assert "nothing is relayed" in failures(report)["two clients"]


def test_large_datagrams_are_lost(relay: RelayProcess) -> None:
    report = probe_through(relay, to_server=up_to(1000), time_limit=PATIENT)
    assert "up to 160 bytes come through" in failures(report)["sizes"]
    report = probe_through(relay, to_server=up_to(1300), time_limit=PATIENT)
    assert state_of(report, "sizes") == (State.OK, "datagrams of up to 1200 bytes come through")


def test_a_link_that_loses_some(relay: RelayProcess) -> None:
    report = probe_through(relay, to_client=losing(every=20), seconds=1)
    assert "of 100 datagrams" in failures(report)["loss"]


def test_a_link_that_doubles_some(relay: RelayProcess) -> None:
    report = probe_through(relay, to_client=lambda datagram: (datagram, datagram), seconds=0.5)
    state, text = state_of(report, "loss")
    assert state is State.WARNING
    assert "came twice" in text


def test_a_rate_from_which_on_a_link_loses_some(relay: RelayProcess) -> None:
    """It carries 400 of the longest datagrams, and no more."""
    left = itertools.repeat(None, 400)

    def to_server(datagram: bytes) -> Iterable[bytes]:
        is_one = len(datagram) > 900
        if is_one and next(left, datagram) is datagram:
            return ()
        return (datagram,)

    report = probe_through(relay, to_server=to_server, most_per_second=4000)
    [rate] = [each for each in report if each.name == "rate"]
    assert rate.details["carried_per_second"] == 250
    assert rate.details["lossy_per_second"] == 500


@pytest.mark.slow
def test_relay_ports_that_a_firewall_closes(secret_file: Path) -> None:
    needs_root()
    needs_programs("ip", "nft")
    namespace = f"probe{os.getpid()}"
    ip("netns", "add", namespace)
    try:
        ip("-n", namespace, "link", "set", "lo", "up")
        with inside(namespace):
            subprocess.run(["nft", "-f", "-"], input=CLOSED, text=True, check=True, timeout=TIMEOUT)
            # Above those from which clients send.
            arguments = ("--lowest-port=61000", f"--auth-secret-file={secret_file}", *SAME_USER)
            with RelayProcess(*arguments, port=3478) as relay:
                report = probe(relay.port)
    finally:
        ip("netns", "del", namespace)
    assert list(failures(report)) == ["peer outside"]
    assert "are the relay's UDP ports open" in failures(report)["peer outside"]


def test_a_relayed_address_that_nobody_can_reach() -> None:
    """A server on the internet that does not know its public address."""
    report = Report()
    checks = Checks(parse_uri("turn:127.0.0.1"), Options(), report)
    checks._server = ("1.1.1.1", 3478)
    checks._see_relayed_address(("10.0.0.7", 50000))
    checks._see_relayed_address(("1.1.1.1", 50000))
    assert [each.state for each in report] == [State.FAILED, State.OK]
    assert "does not know its public address" in report.findings[0].text


# --- Whether there is anybody ---------------------------------------------------------------


def test_a_name_that_there_is_not() -> None:
    report = probe(3478, url="turn:nobody.invalid:{}")
    assert "nobody.invalid has no address" in failures(report)["name"]


def test_a_port_at_which_nobody_is() -> None:
    assert "nothing listens" in failures(probe(free_port()))["reachable, IPv4"]


def test_a_port_that_is_silent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        report = probe(silent.getsockname()[1], time_limit=0.2)
    assert "is UDP port" in failures(report)["reachable, IPv4"]


def test_a_tcp_port_at_which_nobody_is() -> None:
    report = probe(free_tcp_port(), url="turn:127.0.0.1:{}?transport=tcp")
    assert "nothing listens" in failures(report)["reachable, IPv4"]


def test_a_server_of_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with client, other:
            port = server.getsockname()[1]
            report = probe(port, url="turn:127.0.0.1:{}?transport=tcp", time_limit=0.2)
    assert "no answer" in failures(report)["reachable, IPv4"]


@pytest.mark.parametrize("what", ["another name", "another authority"])
def test_a_certificate_that_is_not_good(secret_file: Path, tmp_path: Path, what: str) -> None:
    """The rest is looked at all the same."""
    authority = Authority()
    certificate = authority.issue("turn.test" if what == "another name" else "relay.test")
    for name, text in (("cert", certificate.pem), ("key", certificate.key), ("ca", authority.pem)):
        (tmp_path / name).write_text(text)
    port = free_tcp_port()
    arguments = (f"--tls-port={port}", f"--tls-cert={tmp_path / 'cert'}", *SAME_USER)
    arguments += (f"--tls-key={tmp_path / 'key'}", f"--auth-secret-file={secret_file}")
    trusted = authority if what == "another name" else Authority()
    with RelayProcess(*arguments, port=free_port()):
        report = probe(
            *(port,),
            url="turns:relay.test:{}",
            address="127.0.0.1",
            context=ssl.create_default_context(cadata=trusted.pem),
        )
    assert list(failures(report)) == ["certificate"]
    assert "the certificate is not good" in failures(report)["certificate"]
    assert state_of(report, "two clients")[0] is State.OK


# --- Hooks ----------------------------------------------------------------------------------


def read(datagram: bytes) -> Received | None:
    try:
        return decode(datagram)
    except DecodeError:
        return None


def answer(request: Received, kind: Kind, *attributes: Pair) -> bytes:
    asked = request.message
    return Message(kind, asked.method, asked.transaction_id, list(attributes)).encode()


def error(request: Received, code: ErrorCode, *attributes: Pair) -> bytes:
    return answer(request, Kind.ERROR, (Attr.ERROR_CODE, (code, code.reason)), *attributes)


def unless_signed(datagram: bytes) -> Iterable[bytes]:
    request = read(datagram)
    return () if request is not None and request.integrity_offset is not None else (datagram,)


def unless_channel_data(datagram: bytes) -> Iterable[bytes]:
    return () if datagram[0] & 0xC0 == 0x40 else (datagram,)


def up_to(size: int) -> Hook:
    return lambda datagram: (datagram,) if len(datagram) <= size else nothing(datagram)


def losing(every: int) -> Hook:
    """Lose one of so many that came on channels, of the size of those that are counted."""
    numbers = itertools.count(1)

    def hook(datagram: bytes) -> Iterable[bytes]:
        is_one = datagram[0] & 0xC0 == 0x40 and len(datagram) == 164
        return () if is_one and next(numbers) % every == 0 else (datagram,)

    return hook
