"""Upgrades of the real process: whoever calls, waits or comes meanwhile loses nothing.

Whatever is wrong with the new program, the old one serves on and says why.
"""

import os
import re
import secrets
import select
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self

import pytest

from relay.daemon import CAUGHT
from relay.stun.attributes import Attr
from relay.stun.const import Family, Method
from relay.turn.users import mint
from tests.certificates import Authority
from tests.fakeportal import FakePortal
from tests.interop.needs import needs_programs
from tests.probes import ask, scrape
from tests.process import (
    SECRET,
    TIMEOUT,
    RelayProcess,
    environment,
    free_port,
    free_tcp_port,
    run,
)
from tests.steady import Steady
from tests.test_operation import Manager
from tests.turnclient import StreamClient, TurnClient, TurnError

UNLIMITED = (
    "--max-allocations-per-username=0",
    "--max-allocations-per-ip=0",
    "--unauthenticated-rate=0",
    "--unauthenticated-rate-per-prefix=0",
)
NUMBER = 0x4001
AUTHORITY = Authority()

# The relay, but for what a file says that it runs first: empty at the start, broken later.
CHANGEABLE = """
import pathlib, sys
exec(pathlib.Path({file!r}).read_text())
from relay.cli import main
sys.exit(main())
"""


def upgrades(relay: RelayProcess) -> int:
    """Ask for an upgrade by a signal, and return which process serves then."""
    before = relay.lines
    relay.signals(signal.SIGUSR2)
    return replaced(relay, before)


def replaced(relay: RelayProcess, before: int) -> int:
    return int(relay.logs("replaced by process", after=before).split("process ")[1].split(",")[0])


def client_of(relay: RelayProcess) -> TurnClient:
    return TurnClient(("127.0.0.1", relay.port), relay.username, relay.password)


class Peer:
    """Somebody to call, on loopback."""

    def __init__(self, family: Family = Family.IPV4) -> None:
        is_ipv4 = family is Family.IPV4
        self._socket = socket.socket(
            socket.AF_INET if is_ipv4 else socket.AF_INET6, socket.SOCK_DGRAM
        )
        self._socket.bind(("127.0.0.1" if is_ipv4 else "::1", 0))
        self._socket.settimeout(TIMEOUT)
        self.address = self._socket.getsockname()[:2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def exchanges(self, client: TurnClient, payload: bytes = b"hello") -> None:
        """Hear something over a channel, and answer it."""
        client.sends(NUMBER, payload)
        received, relayed = self._socket.recvfrom(2048)
        assert received == payload
        self._socket.sendto(payload, relayed)
        assert client.receives() == (NUMBER, payload)

    def is_indicated_to(self, client: TurnClient) -> None:
        """Hear something by a Send indication, and answer it."""
        client.indicates(self.address, b"hello")
        received, relayed = self._socket.recvfrom(2048)
        self._socket.sendto(received, relayed)
        assert client.hears().get(Attr.DATA) == b"hello"


# --- Under load ------------------------------------------------------------------------------

AS_ROOT = pytest.param((), id="as another user than it was started by")
AS_IT_IS = pytest.param(("--harden=off",), id="as it was started")


@pytest.mark.parametrize("arguments", [AS_ROOT, AS_IT_IS])
def test_ten_upgrades_under_load_lose_nothing(arguments: tuple[str, ...]) -> None:
    with RelayProcess(*UNLIMITED, *arguments, port=free_port()) as relay:
        address = ("127.0.0.1", relay.port)
        steady = Steady(
            *(address, relay.username, relay.password), calls=8, rate=50, idle=200, requests=100
        )
        upgraded = 0

        def is_upgraded() -> bool:
            nonlocal upgraded
            if relay.errors().count("replaced by process") == upgraded < 10:
                upgraded += 1
                relay.signals(signal.SIGUSR2)
            return relay.errors().count("replaced by process") == 10

        outcome = steady.runs(is_upgraded)
        assert (outcome.lost, outcome.odd, outcome.unanswered) == (0, 0, 0)
        assert outcome.refused == {}
        assert outcome.answers.keys() == {"refresh success", "allocate success"}
        assert steady.everyone_refreshes() == 208
        steady.close()
    assert relay.process.returncode == 0
    assert "this is a bug" not in relay.errors()
    assert "Traceback" not in relay.errors()


# --- What goes on ----------------------------------------------------------------------------


@pytest.fixture
def relay() -> Iterator[RelayProcess]:
    with RelayProcess(port=free_port()) as relay:
        yield relay


def test_whatever_a_client_has_it_still_has(relay: RelayProcess) -> None:
    with client_of(relay) as alice, Peer() as bob, Peer(Family.IPV6) as carol:
        alice.request(
            Method.ALLOCATE,
            (Attr.REQUESTED_TRANSPORT, 17),
            (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6),
        )
        alice.binds(NUMBER, bob.address)
        alice.permits(carol.address)
        for _ in range(3):
            upgrades(relay)
            bob.exchanges(alice)
            carol.is_indicated_to(alice)
            alice.refreshes(600)
            with pytest.raises(TurnError, match="437"):
                alice.allocates()


def test_newcomers_find_it_as_before(relay: RelayProcess) -> None:
    upgrades(relay)
    with client_of(relay) as alice, Peer() as bob:  # with the credential of the first process
        alice.allocates()
        alice.binds(NUMBER, bob.address)
        bob.exchanges(alice)


def test_a_nonce_stays_good(relay: RelayProcess) -> None:
    with client_of(relay) as alice:
        alice.allocates()
        nonce = alice.client.nonce
        upgrades(relay)
        alice.refreshes(600)
        assert alice.client.nonce == nonce


def test_icmp_errors_are_still_reported(relay: RelayProcess) -> None:
    with client_of(relay) as alice:
        with Peer() as bob:
            alice.allocates()
            alice.permits(bob.address)
            upgrades(relay)
            bob.is_indicated_to(alice)
        alice.indicates(bob.address, b"anybody there?")
        assert alice.hears().get(Attr.DATA) is None


def test_metrics_and_probes_go_on() -> None:
    http = free_tcp_port()
    with (
        RelayProcess(f"--http-addr=127.0.0.1:{http}", port=free_port()) as relay,
        client_of(relay) as alice,
        Peer() as bob,
    ):
        alice.allocates()
        alice.binds(NUMBER, bob.address)
        bob.exchanges(alice)
        upgrades(relay)
        assert ask(http, "/readyz")[0] == 200
        bob.exchanges(alice)
        metrics = scrape(http)
    assert metrics["relay_allocations"] == metrics["relay_channels"] == 1
    assert metrics["relay_relayed_packets_total", "udp", "client_to_peer", "sockets"] == 2
    assert metrics["relay_responses_total", "channel_bind", "success"] == 1


def test_a_new_configuration_counts_from_then_on(tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    file.write_text("software = first\n")
    with RelayProcess(f"--config={file}", port=free_port()) as relay, client_of(relay) as alice:
        alice.allocates()
        file.write_text("software = second\nlowest-port = 49152\nmax-allocations = 1\n")
        upgrades(relay)
        answer = alice.request(Method.REFRESH)
        assert answer.get(Attr.SOFTWARE) == "second"
        with client_of(relay) as bob, pytest.raises(TurnError, match="508"):
            bob.allocates()


def test_peers_that_are_forbidden_now_are_reached_no_more(tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    with client_and_relay(file, "") as (relay, alice), Peer() as bob:
        alice.binds(NUMBER, bob.address)
        file.write_text(f"deny-peer = {bob.address[0]}\n")
        upgrades(relay)
        with pytest.raises(TurnError, match="403"):
            alice.binds(NUMBER, bob.address)


def test_a_socket_that_was_opened_for_marks_reads_on_without(tmp_path: Path) -> None:
    """What the kernel reports with each datagram can be another thing from one to the next."""
    file = tmp_path / "relay.conf"
    with client_and_relay(file, "copy-tos = on\n") as (relay, alice), Peer() as bob:
        alice.binds(NUMBER, bob.address)
        bob.exchanges(alice)
        for text in ("copy-tos = off\noffload = off\n", "copy-tos = auto\n", "copy-tos = on\n"):
            file.write_text(text)
            upgrades(relay)
            for _ in range(40):
                bob.exchanges(alice)


class client_and_relay(AbstractContextManager[tuple[RelayProcess, TurnClient]]):  # noqa: N801
    """A relay with a file of options, and a client with an allocation."""

    def __init__(self, file: Path, text: str, *arguments: str) -> None:
        file.write_text(text)
        self._relay = RelayProcess(f"--config={file}", *arguments, port=free_port())

    def __enter__(self) -> tuple[RelayProcess, TurnClient]:
        self._relay.__enter__()
        self._client = client_of(self._relay)
        self._client.allocates()
        return self._relay, self._client

    def __exit__(self, *details: object) -> None:
        self._client.refreshes(0)
        self._client.socket.close()
        self._relay.__exit__(None, None, None)


def test_a_reload_works_as_before(tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    with client_and_relay(file, "", "--user=root") as (relay, alice):
        upgrades(relay)
        file.write_text("software = reloaded\n")
        relay.signals(signal.SIGHUP)
        relay.logs("reloaded; changed: software")
        assert alice.request(Method.REFRESH).get(Attr.SOFTWARE) == "reloaded"


# --- Connections -----------------------------------------------------------------------------


class Streaming(RelayProcess):
    """A relay for TCP and TLS."""

    def __init__(self, folder: Path) -> None:
        self.tcp, self.tls = free_tcp_port(), free_tcp_port()
        certificate, key = AUTHORITY.issue("relay.test").write_to(folder)
        super().__init__(
            f"--tcp-port={self.tcp}",
            f"--tls-port={self.tls}",
            f"--tls-cert={certificate}",
            f"--tls-key={key}",
            port=free_port(),
        )

    def client(self, *, tls: bool = False) -> StreamClient:
        context = ssl.create_default_context(cadata=AUTHORITY.pem) if tls else None
        address = ("127.0.0.1", self.tls if tls else self.tcp)
        return StreamClient(address, self.username, self.password, context=context)


def test_tcp_goes_on_and_tls_is_told(tmp_path: Path) -> None:
    with Streaming(tmp_path) as relay, Peer() as bob:
        with relay.client() as alice, relay.client(tls=True) as carol, relay.client() as idle:
            alice.allocates()
            alice.binds(NUMBER, bob.address)
            carol.allocates()
            for _ in range(2):
                upgrades(relay)
                bob.exchanges(alice)
                alice.refreshes(600)
                idle.maps()
            assert carol.socket.recv(100) == b""  # close_notify: without it ssl would raise
        with relay.client(tls=True) as carol:
            carol.allocates()
            carol.binds(NUMBER, bob.address)
            bob.exchanges(carol)
    assert "this is a bug" not in relay.errors()


def test_where_tcp_is_served_no_more_its_clients_are_told(tmp_path: Path) -> None:
    file, port = tmp_path / "relay.conf", free_tcp_port()
    with client_and_relay(file, f"tcp-port = {port}\n") as (relay, alice), Peer() as bob:
        alice.binds(NUMBER, bob.address)
        address = ("127.0.0.1", port)
        with StreamClient(address, relay.username, relay.password) as carol:
            carol.allocates()
            carol.binds(NUMBER, bob.address)
            file.write_text("")
            upgrades(relay)
            assert carol.socket.recv(100) == b""
        bob.exchanges(alice)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_half_a_message_is_completed_after_an_upgrade(tmp_path: Path) -> None:
    with Streaming(tmp_path) as relay, relay.client() as alice, Peer() as bob:
        alice.allocates()
        alice.binds(NUMBER, bob.address)
        message = NUMBER.to_bytes(2, "big") + (8).to_bytes(2, "big") + b"two half"
        alice.socket.sendall(message[:7])
        alice.socket.sendall(b"")
        upgrades(relay)
        alice.socket.sendall(message[7:])
        assert bob._socket.recv(100) == b"two half"


def test_what_waits_for_a_slow_client_arrives_whole_and_in_order(tmp_path: Path) -> None:
    with Streaming(tmp_path) as relay, relay.client() as alice, Peer() as bob:
        relayed = alice.allocates()
        alice.binds(NUMBER, bob.address)
        upgrades(relay)
        payloads = [number.to_bytes(4, "big") * 250 for number in range(60)]
        for payload in payloads:
            bob._socket.sendto(payload, relayed)
        upgrades(relay)
        for payload in payloads:
            assert alice.receives() == (NUMBER, payload)


def test_a_connection_that_ends_after_an_upgrade_takes_its_allocation_along(
    tmp_path: Path,
) -> None:
    with Streaming(tmp_path) as relay:
        with relay.client() as alice:
            alice.allocates()
            upgrades(relay)
        with relay.client() as bob:
            bob.maps()
        relay.signals(signal.SIGTERM)  # with an allocation left it would drain
        assert relay.wait() == 0
    assert "draining" not in relay.errors()


# --- What is wrong with the new one ----------------------------------------------------------


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """What the program runs first."""
    file = tmp_path / "first.py"
    file.write_text("")
    return file


@pytest.fixture
def changeable(first: Path) -> Iterator[RelayProcess]:
    with RelayProcess(program=CHANGEABLE.format(file=str(first)), port=free_port()) as relay:
        yield relay


# What the new program does, and what is said of it.
BROKEN = {
    "it does not start": ("raise SystemExit(3)", "the new process has ended before it served"),
    "it is no program": ("this is not Python", "the new process has ended before it served"),
    "it crashes": (
        "import os; os.kill(os.getpid(), 11)",
        "the new process has ended before it served",
    ),
    "it is another program": (
        "import os; os.environ.clear()",  # so it knows nothing of an upgrade
        "the new process has ended before it served",
    ),
    "it crashes once it has everything": (
        (
            "import os\nfrom relay.upgrade.incoming import Incoming\n"
            "Incoming.serve = lambda *_: os._exit(9)"
        ),
        "the new process has ended before it served",
    ),
    "it fails as it reads": (
        "from relay.turn.transfer import Transfer\nTransfer.load = lambda _, record: record['x']",
        "the running process says what cannot be read: KeyError: 'x'",
    ),
    "it fails to read the rest": (
        (
            "from relay.turn.transfer import Transfer\n"
            "Transfer.load_rest = lambda self, record: record['x']"
        ),
        "the running process says what cannot be read: KeyError: 'x'",
    ),
    "it is too old": (
        (
            "from relay.turn import records\nrecords.READABLE = (0,)\n"
            "from relay.upgrade import incoming\nincoming.READABLE = (0,)"
        ),
        "cannot read the state of this one",
    ),
    "it hangs when it should serve": (
        (
            "import signal\nfrom relay.upgrade.incoming import Incoming\n"
            "Incoming.serve = lambda *_: signal.pause()"
        ),
        "the new process does not take over: timed out",
    ),
    "it talks nonsense": (
        (
            "from relay.upgrade.channel import Channel\nsend = Channel.send\n"
            "Channel.send = lambda self, *_: send(self, 'what?')"
        ),
        "the new process says 'what?', out of order",
    ),
}


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RelayProcess, Path]]:
    """A relay that no program can bring down, and what the next one runs first."""
    file = tmp_path_factory.mktemp("lasting") / "first.py"
    file.write_text("")
    with RelayProcess(program=CHANGEABLE.format(file=str(file)), port=free_port()) as relay:
        yield relay, file


@pytest.mark.parametrize(("program", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_program_costs_nothing(
    lasting: tuple[RelayProcess, Path], program: str, said: str
) -> None:
    relay, first = lasting
    with client_of(relay) as alice, Peer() as bob:
        alice.allocates()
        alice.binds(NUMBER, bob.address)
        before = relay.lines
        first.write_text(program)
        relay.signals(signal.SIGUSR2)
        assert said in relay.logs("not upgraded, all stays as it was: ", after=before)
        bob.exchanges(alice)
        alice.refreshes(600)

        first.write_text("")
        upgrades(relay)  # and the next one may be good
        bob.exchanges(alice)
        alice.refreshes(0)


def test_a_program_that_hangs_when_it_should_serve_loses_nothing(
    changeable: RelayProcess, first: Path
) -> None:
    """For as long as it is waited for, nobody reads; what comes in waits."""
    program, _ = BROKEN["it hangs when it should serve"]
    steady = Steady(
        *(("127.0.0.1", changeable.port), changeable.username, changeable.password),
        calls=2,
        rate=20,
        idle=2,
        requests=20,
    )
    first.write_text(program)
    changeable.signals(signal.SIGUSR2)
    outcome = steady.runs(lambda: "not upgraded" in changeable.errors())
    steady.close()
    assert (outcome.lost, outcome.odd, outcome.unanswered) == (0, 0, 0)


WRONG = {
    "bad value": ("software = \x07\n", "software"),
    "unknown option": ("no-such-option = 1\n", "no-such-option"),
    "no relay port": ("lowest-port = 50000\nhighest-port = 40000\n", "is above highest-port"),
    "another port to listen at": ("", "listen-port is"),
    "another public address": (
        "public-ip4-addr = 127.0.0.2\n",
        "the public address of IPV4 is 127.0.0.1, and would be 127.0.0.2: that takes a restart",
    ),
    "other relay ports": (
        "lowest-port = 40000\nhighest-port = 40009\n",
        "which is none of the ports 40000-40009",
    ),
    "port in use": ("tcp-port = {used}\n", "cannot listen on"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_costs_nothing(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "relay.conf"
    good = "public-ip4-addr = 127.0.0.1\nallow-peer = 127.0.0.0/8\nlisten-port = {}\n"
    port = free_port()
    file.write_text(good.format(port))
    with socket.create_server(("127.0.0.1", 0)) as used:
        relay = RelayProcess(f"--config={file}", port=port, loopback=False)
        relay._command = [part for part in relay._command if "listen-port" not in part]
        with relay, client_of(relay) as alice, Peer() as bob:
            alice.allocates()
            alice.binds(NUMBER, bob.address)
            before = relay.lines
            base = good.format(port + 1 if "listen-port" in said else port)
            if text.startswith("public"):
                base = base.replace("public-ip4-addr = 127.0.0.1\n", "")
            file.write_text(base + text.format(used=used.getsockname()[1]))
            relay.signals(signal.SIGUSR2)
            assert said in relay.logs("not upgraded, all stays as it was: ", after=before)
            bob.exchanges(alice)
            file.write_text(good.format(port))
            upgrades(relay)
            bob.exchanges(alice)


def test_a_file_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    with client_and_relay(file, "") as (relay, alice):
        before = relay.lines
        file.unlink()
        relay.signals(signal.SIGUSR2)
        assert str(file) in relay.logs("not upgraded, all stays as it was: ", after=before)
        alice.refreshes(600)


# --- One at a time ---------------------------------------------------------------------------


def test_a_second_upgrade_waits_for_nobody(changeable: RelayProcess, first: Path) -> None:
    gate = first.parent / "gate"
    os.mkfifo(gate)
    first.write_text(f"open({str(gate)!r}).read()")
    changeable.signals(signal.SIGUSR2)
    with gate.open("w") as opened:  # the successor reads it
        changeable.signals(signal.SIGUSR2)
        changeable.logs("not upgraded: an upgrade is under way")
        before = changeable.lines
        first.write_text("")
        opened.write("")
    replaced(changeable, before)


def test_a_relay_that_is_to_end_has_no_successor(changeable: RelayProcess, first: Path) -> None:
    gate = first.parent / "gate"
    os.mkfifo(gate)
    first.write_text(f"open({str(gate)!r}).read()")
    with client_of(changeable) as alice:
        alice.allocates()
        changeable.signals(signal.SIGUSR2)
        with gate.open("w"):
            changeable.signals(signal.SIGTERM)
            changeable.logs("draining")
        changeable.logs("not upgraded, all stays as it was: the relay is to stop")
        before = changeable.lines
        changeable.signals(signal.SIGUSR2)
        changeable.logs("not upgraded: draining", after=before)
        alice.refreshes(0)
        assert changeable.wait() == 0


# Opened while it is still root, and both ways, for which nobody has to wait.
AT_A_GATE = """
import os
from relay.upgrade.incoming import Incoming
entered, gate = (os.open(path, os.O_RDWR) for path in {paths!r})
go_on = Incoming.{method}
def waits(*arguments):
    Incoming.{method} = go_on
    os.write(entered, b"x")
    os.read(gate, 1)
    return go_on(*arguments)
Incoming.{method} = waits
"""


class Gate:
    """Where the next process waits, before it does something for the first time."""

    def __init__(self, first: Path, method: str) -> None:
        paths = [str(first.parent / name) for name in ("entered", "gate")]
        for path in paths:
            os.mkfifo(path)
        self._entered, self._gate = (os.open(path, os.O_RDWR) for path in paths)
        first.write_text(AT_A_GATE.format(paths=paths, method=method))

    def is_reached(self) -> None:
        """Wait until it waits."""
        os.read(self._entered, 1)

    def opens(self) -> None:
        """Let it go on."""
        os.write(self._gate, b"x")
        for descriptor in (self._entered, self._gate):
            os.close(descriptor)


def test_signals_that_come_at_the_switch_reach_the_next(
    changeable: RelayProcess, first: Path
) -> None:
    gate = Gate(first, "serve")
    before = changeable.lines
    changeable.signals(signal.SIGUSR2)
    gate.is_reached()  # now nobody serves
    changeable.signals(signal.SIGUSR1)
    changeable.signals(signal.SIGTERM)
    gate.opens()
    changeable.logs("summary: ", after=before)
    assert changeable.wait() == 0
    assert "replaced by process" in changeable.errors()


def test_a_reload_while_the_state_is_copied_is_not_undone(first: Path, tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    file.write_text("")
    program = CHANGEABLE.format(file=str(first))
    with RelayProcess(
        f"--config={file}", "--user=root", port=free_port(), program=program
    ) as relay:
        gate = Gate(first, "copy")
        before = relay.lines
        relay.signals(signal.SIGUSR2)
        gate.is_reached()  # it has read the configuration
        file.write_text("software = reloaded\n")
        relay.signals(signal.SIGHUP)
        relay.logs("reloaded; changed: software", after=before)
        gate.opens()
        replaced(relay, before)
        before = relay.errors().index("replaced by process")
        relay.logs("reloaded; changed: software", after=relay.errors()[:before].count("\n"))


def test_what_changes_while_the_state_is_copied_counts(
    changeable: RelayProcess, first: Path
) -> None:
    with client_of(changeable) as alice, client_of(changeable) as carol, Peer() as bob:
        alice.allocates()
        alice.permits(("127.0.0.2", 9))
        carol.allocates()
        gate = Gate(first, "_enter")
        before = changeable.lines
        changeable.signals(signal.SIGUSR2)
        gate.is_reached()  # it has been told of both
        alice.permits(bob.address)
        alice.binds(NUMBER, bob.address)
        carol.refreshes(0)
        with client_of(changeable) as dave:
            dave.allocates()
            gate.opens()
            replaced(changeable, before)
            dave.refreshes(0)
        bob.exchanges(alice)
        with Peer() as erin:  # at the same host, without a channel
            erin.is_indicated_to(alice)
        with pytest.raises(TurnError, match="437"):
            carol.refreshes(600)
        with Peer() as gone:
            pass
        alice.indicates(gone.address, b"anybody there?")
        assert alice.hears().get(Attr.DATA) is None  # but an ICMP error
        alice.refreshes(0)


# --- Who is asked, and who hears of it -------------------------------------------------------


def upgrade_command(pid: int | str, *others: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", f"--upgrade={pid}", *others],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_the_command_waits_and_tells(relay: RelayProcess) -> None:
    before = relay.lines
    asked = upgrade_command(relay.pid)
    pid = replaced(relay, before)
    assert (asked.returncode, asked.stdout) == (0, f"process {pid} serves\n")
    before = relay.lines  # the one that serves can be asked, and still the one that was started
    assert upgrade_command(pid).returncode == 0
    replaced(relay, before)
    assert upgrade_command(relay.pid).returncode == 0


def test_the_command_tells_what_is_wrong(changeable: RelayProcess, first: Path) -> None:
    first.write_text("raise SystemExit(3)")
    asked = upgrade_command(changeable.pid)
    assert asked.returncode == 69
    assert "firezone-relay: not upgraded: the new process has ended before" in asked.stderr


def test_one_that_would_die_of_the_signal_is_not_asked() -> None:
    """As a relay of a version before there were upgrades."""
    script = "open('/proc/self/comm', 'w').write('firezone-relay'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        asked = upgrade_command(process.pid)
        assert asked.returncode == 69
        assert "does not catch SIGUSR2" in asked.stderr
        process.communicate(b"\n")
    assert process.returncode == 0


def test_only_a_relay_is_asked() -> None:
    asked = upgrade_command(os.getpid())
    assert asked.returncode == 69
    assert f"process {os.getpid()} is " in asked.stderr
    assert "not a relay" in asked.stderr


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ""])
def test_a_process_is_a_number(text: str) -> None:
    asked = upgrade_command(text)
    assert asked.returncode == 64
    assert "is not the number of a process" in asked.stderr


def test_other_options_do_not_go_with_it() -> None:
    asked = upgrade_command(1, "--software=x")
    assert asked.returncode == 64
    assert "--upgrade takes no other option" in asked.stderr


def test_the_process_that_was_started_stays_and_passes_signals_on(relay: RelayProcess) -> None:
    pid = upgrades(relay)
    assert relay.process.poll() is None
    assert pid != relay.pid
    relay.signals(signal.SIGUSR1)
    relay.logs("summary: ")
    relay.signals(signal.SIGTERM)
    assert relay.wait() == 0
    assert "stopped; " in relay.errors()


def test_a_signal_that_all_get_counts_once(relay: RelayProcess) -> None:
    with client_of(relay) as alice:
        alice.allocates()
        pid = upgrades(relay)
        before = relay.lines
        os.kill(pid, signal.SIGTERM)
        relay.logs("draining", after=before)
        first = relay.errors().partition("draining")[0].count("\n")
        relay.signals(signal.SIGTERM)  # which is passed on
        relay.logs("caught SIGTERM", after=first)
        alice.refreshes(600)
        alice.refreshes(0)
        assert relay.wait() == 0


def test_it_ends_as_the_one_ends_that_serves(relay: RelayProcess) -> None:
    pid = upgrades(relay)
    os.kill(pid, signal.SIGKILL)
    assert relay.wait() == -signal.SIGKILL


ALONE = """
import relay.host.supervision
relay.host.supervision.STATUS_INTERVAL = 0.05
from relay.cli import main
raise SystemExit(main())
"""


def test_nobody_is_left_where_the_process_that_was_started_is_killed() -> None:
    with RelayProcess(program=ALONE, port=free_port()) as relay:
        upgrades(relay)
        relay.process.kill()
        relay.wait()  # until nobody has the log open any more
    assert "the process that was started is gone" in relay.errors()


def test_a_service_manager_is_told_who_is_next() -> None:
    with (
        Manager(f"relay-test-{secrets.token_hex(8)}") as manager,
        RelayProcess(port=free_port(), variables=manager.variables) as relay,
    ):
        manager.hears("READY=1")
        pid = upgrades(relay)
        assert relay.process.wait(TIMEOUT) == 0  # it is gone
        assert manager.hears("MAINPID=") == f"MAINPID={pid}"
        manager.heard.clear()
        manager.hears("READY=1")  # after that, by the next one
        os.kill(pid, signal.SIGTERM)
        manager.hears("STOPPING=1")


def test_process_1_of_a_container_stays() -> None:
    needs_programs("unshare")
    if os.geteuid() != 0:
        pytest.skip("it takes root to make a PID namespace")
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with RelayProcess(port=free_port(), prefix=prefix) as relay:
        children = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split()
        (first,) = map(int, children)
        with client_of(relay) as alice, Peer() as bob:
            alice.allocates()
            alice.binds(NUMBER, bob.address)
            for _ in range(2):
                before = relay.lines
                os.kill(first, signal.SIGUSR2)
                replaced(relay, before)
                bob.exchanges(alice)
        os.kill(first, signal.SIGTERM)
        os.kill(first, signal.SIGINT)  # does not wait for who is left
        assert relay.wait() == 0


def test_process_1_speaks_for_the_one_that_serves() -> None:
    """To a service manager outside of the container, as with podman's --sdnotify=container."""
    needs_programs("unshare")
    if os.geteuid() != 0:
        pytest.skip("it takes root to make a PID namespace")
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with (
        Manager(f"relay-test-{secrets.token_hex(8)}") as manager,
        RelayProcess(port=free_port(), prefix=prefix, variables=manager.variables) as relay,
    ):
        manager.hears("READY=1")
        children = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split()
        (first,) = map(int, children)
        before = relay.lines
        os.kill(first, signal.SIGUSR2)
        replaced(relay, before)
        manager.heard.clear()
        manager.hears("READY=1")
        os.kill(first, signal.SIGTERM)
        assert relay.wait() == 0
        manager.hears("STOPPING=1")
        assert not any(message.startswith("MAINPID=") for message in manager.heard)


def test_a_variable_that_only_a_relay_sets_is_no_socket() -> None:
    asked = run(FIREZONE_RELAY_UPGRADE="99")
    assert asked.returncode == 78
    assert "which is no socket: only a relay sets it" in asked.stderr


# --- With a portal ---------------------------------------------------------------------------


@pytest.fixture
def portal() -> Iterator[FakePortal]:
    with FakePortal() as portal:
        yield portal


def relay_of(portal: FakePortal, *arguments: str, **variables: str) -> RelayProcess:
    return RelayProcess(
        f"--api-url={portal.url}",
        *arguments,
        port=free_port(),
        variables={"FIREZONE_TOKEN": "a-token", **variables},
        portal=True,
    )


def test_the_portal_is_joined_before_it_is_left(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        secret = portal.stamp_secret
        with TurnClient(("127.0.0.1", relay.port), *portal.credential()) as alice:
            alice.allocates()
            for joins in (2, 3):
                upgrades(relay)
                assert portal.joins == joins
                assert portal.stamp_secret == secret
                portal.waits_until(lambda: len(portal._open) == 1)
                alice.refreshes(600)
            alice.refreshes(0)


def test_only_one_thread_takes_signals(portal: FakePortal) -> None:
    """Or the process that leaves could not hold them back for the next one."""
    portal.serves()
    with relay_of(portal, f"--http-addr=127.0.0.1:{free_tcp_port()}") as relay:
        relay.logs("relaying: listening on")
        pid = upgrades(relay)
        blocked = {}
        for task in Path(f"/proc/{pid}/task").iterdir():
            (mask,) = re.findall(r"^SigBlk:\t(\w+)$", (task / "status").read_text(), re.MULTILINE)
            blocked[(task / "comm").read_text().strip()] = int(mask, 16)
        caught = sum(1 << number - 1 for number in CAUGHT)
        assert blocked.pop("firezone-relay") & caught == 0
        assert [mask & caught for mask in blocked.values()] == [caught, caught]


def test_a_portal_that_refuses_the_new_one_costs_nothing(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        with TurnClient(("127.0.0.1", relay.port), *portal.credential()) as alice:
            alice.allocates()
            portal.refuses(401, body="not this one")
            before = relay.lines
            relay.signals(signal.SIGUSR2)
            assert "401 not this one" in relay.logs("not upgraded, all stays", after=before)
            alice.refreshes(600)
            alice.refreshes(0)
            assert not portal.is_left


def test_a_new_portal_has_to_take_the_relay_first(portal: FakePortal, tmp_path: Path) -> None:
    token, file = tmp_path / "token", tmp_path / "relay.conf"
    token.write_text("a-token")
    with client_and_relay(file, "") as (relay, alice):
        portal.refuses(401, body="nobody knows you")
        before = relay.lines
        file.write_text(f"token-file = {token}\napi-url = {portal.url}\n")
        relay.signals(signal.SIGUSR2)
        assert "401 nobody knows you" in relay.logs("not upgraded, all stays", after=before)
        alice.refreshes(600)


def test_another_user_takes_a_restart(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    file = tmp_path / "relay.conf"
    with client_and_relay(file, "") as (relay, alice):
        before = relay.lines
        file.write_text("user = daemon\n")
        relay.signals(signal.SIGUSR2)
        assert "that takes a restart" in relay.logs("not upgraded, all stays", after=before)
        alice.refreshes(600)


def test_while_the_portal_is_away_it_is_not_waited_for(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        with TurnClient(("127.0.0.1", relay.port), *portal.credential()) as alice:
            alice.allocates()
            portal.stops()
            relay.logs("relaying meanwhile")
            upgrades(relay)
            alice.refreshes(600)
            before = relay.lines
            portal.starts()
            portal.refuses(401, body="not yet")  # as one does that is being deployed
            relay.logs("401 not yet, next try in", after=before)
            alice.refreshes(600)
            portal.serves()
            portal.waits_until(lambda: portal.joins >= 2)
            alice.refreshes(0)


def test_one_that_waits_for_the_portal_is_replaced_as_well(portal: FakePortal) -> None:
    portal.serves(init=False)
    with relay_of(portal) as relay:
        relay.logs("joined the portal")
        upgrades(relay)
        portal.waits_until(lambda: portal.joins == 2 and len(portal._open) == 1)
        assert "relaying: listening on" not in relay.errors()
        portal.says_init()
        relay.logs("relaying: listening on")


# --- Nothing is left behind ------------------------------------------------------------------


def descriptors_of(pid: int) -> list[str]:
    """What a process has open, by kind."""
    try:
        links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except PermissionError:
        pytest.skip("what another user's process has open is for root to see")
    return sorted(link.partition(":")[0] for link in links)


def test_failures_leave_nothing_open(changeable: RelayProcess, first: Path) -> None:
    with client_of(changeable) as alice:
        alice.allocates()
        before = None  # but for what it keeps once it has tried, to be a keeper one day
        for program in ("raise SystemExit(3)", BROKEN["it crashes once it has everything"][0]) * 3:
            first.write_text(program)
            lines = changeable.lines
            changeable.signals(signal.SIGUSR2)
            changeable.logs("not upgraded", after=lines)
            after = descriptors_of(changeable.pid)
            assert before in (None, after)
            before = after
        children = Path(f"/proc/{changeable.pid}/task/{changeable.pid}/children")
        names = [Path(f"/proc/{c}/comm").read_text() for c in children.read_text().split()]
        assert names in ([], ["relay-starter\n"])


def test_upgrades_leave_nothing_open(relay: RelayProcess) -> None:
    with client_of(relay) as alice, Peer() as bob:
        alice.allocates()
        alice.binds(NUMBER, bob.address)
        serving, opened = upgrades(relay), []
        for _ in range(4):
            with pidfd(serving) as process:
                serving = upgrades(relay)
                select.select([process], [], [])  # it has ended, and said farewell
            alice.refreshes(600)  # which the next one has heard by now
            opened.append(descriptors_of(serving))
        assert opened == opened[:1] * 4


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    """A descriptor that is readable when a process has ended."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_sockets_of_systemd_go_on() -> None:
    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", port))
        relay = RelayProcess(
            port=port,
            descriptors=(udp.fileno(),),
            variables={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "turn"},
        )
        with relay, client_of(relay) as alice, Peer() as bob:
            alice.allocates()
            alice.binds(NUMBER, bob.address)
            for _ in range(2):
                upgrades(relay)
                bob.exchanges(alice)


# --- Users -----------------------------------------------------------------------------------


def test_a_secret_that_is_configured_counts_as_it_is_now(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    with RelayProcess(f"--relay-secret-file={file}", port=free_port()) as relay:
        other = secrets.token_hex(32)
        file.write_text(other)
        upgrades(relay)
        with client_of(relay) as alice, pytest.raises(TurnError, match="401"):
            alice.allocates()
        username, password = mint(2**40, "salt", other)
        with TurnClient(("127.0.0.1", relay.port), username, password) as bob:
            bob.allocates()
