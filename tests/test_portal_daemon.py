"""The real process and a portal on a real socket: nothing before init, everything after."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakeportal import FakePortal, self_signed
from tests.process import RelayProcess, free_port, wait_until_read
from tests.turnclient import TurnClient

TOKEN = "a-token-that-nobody-may-see"


@pytest.fixture
def portal() -> Iterator[FakePortal]:
    with FakePortal() as portal:
        yield portal


def test_from_token_to_relayed_data(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal, "--name=my relay") as relay:
        relay.logs("relaying: listening on")
        with client_of(relay, portal) as alice, client_of(relay, portal) as bob:
            relays_between(alice, bob)


def test_threads_go_by_their_names(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        names = {path.read_text() for path in Path(f"/proc/{relay.pid}/task").glob("*/comm")}
    assert names == {"firezone-relay\n", "portal\n"}


def test_nothing_is_answered_before_init(portal: FakePortal) -> None:
    portal.serves(init=False)
    with relay_of(portal) as relay:
        relay.logs("joined the portal")
        with TurnClient(("127.0.0.1", relay.port), "", "") as alice:
            alice.socket.send(b"\x00\x01\x00\x00\x21\x12\xa4\x42twelve bytes")
            wait_until_read(relay.port)
            portal.says_init()
            relay.logs("relaying: listening on")

            alice.maps()  # with another transaction id; the first request is not answered late
            alice.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                alice.socket.recv(100)
    assert "1 not_serving" in relay.errors()


def test_ports_are_bound_before_the_portal_is_asked(portal: FakePortal) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        port = free_port()
        other.bind(("127.0.0.1", port))
        with relay_of(portal, port=port) as relay:
            assert relay.wait() == 73
    portal.expects_nobody()


def test_it_relays_while_the_portal_is_away_and_keeps_its_secret(portal: FakePortal) -> None:
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        with client_of(relay, portal) as alice, client_of(relay, portal) as bob:
            relays_between(alice, bob)
            secret = portal.stamp_secret
            portal.stops()
            relay.logs("relaying meanwhile")
            relays_between(alice, bob)
            with client_of(relay, portal) as carol:
                carol.allocates()  # newcomers too

            portal.starts()
            portal.serves()
            portal.waits_until(lambda: portal.joins >= 2)
            assert portal.stamp_secret == secret
            relays_between(alice, bob)


def test_a_portal_that_refuses_it_on_a_reconnect_ends_nothing(portal: FakePortal) -> None:
    """As one does that is being deployed."""
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        with client_of(relay, portal) as alice, client_of(relay, portal) as bob:
            relays_between(alice, bob)
            portal.refuses(401, body="not yet")
            portal.drops()
            relay.logs("it refuses this relay: 401 not yet, next try in")
            relays_between(alice, bob)
            with client_of(relay, portal) as carol:
                carol.allocates()
            portal.serves()
            portal.waits_until(lambda: portal.joins >= 2)
            relays_between(alice, bob)


# A relay whose portal may refuse it for no longer than this, and be away for no longer than that.
IMPATIENT = """
from relay.portal import phoenix
phoenix.REFUSED_FOR_GOOD_AFTER, phoenix.GIVE_UP_AFTER = {refused}, {away}
import relay.cli
raise SystemExit(relay.cli.main())
"""


@pytest.mark.parametrize("why", ["refused", "away"])
def test_a_relay_that_must_end_drains_first_and_is_to_be_started_again(
    portal: FakePortal, why: str
) -> None:
    """With 69: if the portal means it, it refuses the next one as well, which is final."""
    portal.serves()
    program = IMPATIENT.format(refused=0, away=3600 if why == "refused" else 2)
    with relay_of(portal, "--drain-timeout=1000", program=program) as relay:
        relay.logs("relaying: listening on")
        with client_of(relay, portal) as alice, client_of(relay, portal) as bob:
            relays_between(alice, bob)
            portal.refuses(401 if why == "refused" else 503, body="revoked")
            portal.drops()
            relay.logs("ERROR")
            relay.logs("draining: 2 allocations left, at most 1000 s")
            relays_between(alice, bob)
            alice.refreshes(0)
            bob.refreshes(0)
        assert relay.wait() == 69
    words = "refuses this relay: 401 revoked" if why == "refused" else "no portal at"
    assert words in relay.errors().splitlines()[-1]


@pytest.mark.slow
def test_a_packet_flood_holds_up_neither_heartbeats_nor_relaying(portal: FakePortal) -> None:
    """The flood lasts until a heartbeat has come, ten seconds after the join."""
    portal.serves()
    with relay_of(portal) as relay:
        relay.logs("relaying: listening on")
        with client_of(relay, portal) as alice, client_of(relay, portal) as bob:
            relays_between(alice, bob)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mallory:
                while not portal.heartbeats:
                    for _ in range(1000):
                        mallory.sendto(b"\x00\x01 not stun", ("127.0.0.1", relay.port))
                    bob.sends(0x4000, b"hi")
                    assert alice.receives() == (0x4000, b"hi")
    assert "waiting for the portal at" not in relay.errors().partition("relaying: listening")[2]


def test_a_refused_token_ends_it_with_the_portals_words(portal: FakePortal) -> None:
    portal.refuses(401, body="token has been revoked")
    with relay_of(portal) as relay:
        assert relay.wait() == 77
    assert (
        relay.errors()
        .splitlines()[-1]
        .endswith(
            "relay.cli: the portal at 127.0.0.1 refuses this relay: 401 token has been revoked"
        )
    )


def test_other_answers_are_waited_out(portal: FakePortal) -> None:
    portal.refuses(503, headers={"Retry-After": "1"})
    with relay_of(portal) as relay:
        line = relay.logs("waiting for the portal at 127.0.0.1: 503")
        assert "next try in 1.0 s" in line
        portal.serves()
        relay.logs("relaying: listening on")


def test_over_tls(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    with FakePortal(certificate) as portal:
        portal.serves()
        with relay_of(portal, SSL_CERT_FILE=str(certificate.certificate)) as relay:
            relay.logs("relaying: listening on")
        with relay_of(portal) as relay:
            relay.logs("self-signed certificate")


@pytest.mark.parametrize("phase", ["accepted", "upgraded", "joined", "backing off"])
def test_sigterm_at_any_moment_is_a_clean_exit(portal: FakePortal, phase: str) -> None:
    if phase == "joined":
        portal.serves()
    elif phase == "backing off":
        portal.refuses(503, headers={"Retry-After": "3600"})
    with relay_of(portal) as relay:
        if phase == "joined":
            relay.logs("relaying: listening on")
        elif phase == "backing off":
            relay.logs("next try in 3600.0 s")
        else:
            connection = portal.expects_connection()
            if phase == "upgraded":
                connection.upgrades()
                connection.receives()
        relay.process.send_signal(signal.SIGTERM)
        assert relay.wait() == 0
    assert "does not end" not in relay.errors()


@pytest.mark.parametrize("source", ["variable", "path", "file", "credential"])
def test_where_the_token_may_be(portal: FakePortal, tmp_path: Path, source: str) -> None:
    (tmp_path / "FIREZONE_TOKEN").write_text(f"  {TOKEN[:5]}\n{TOKEN[5:]}\n")
    path = str(tmp_path / "FIREZONE_TOKEN")
    arguments = [f"--token-file={path}"] if source == "file" else []
    variables = {
        "variable": {"FIREZONE_TOKEN": f" {TOKEN}\n"},
        "path": {"FIREZONE_TOKEN": path},
        "file": {},
        "credential": {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    }[source]
    relay = RelayProcess(
        f"--api-url={portal.url}", *arguments, port=free_port(), variables=variables, portal=True
    )
    with relay:
        headers = portal.expects_connection().headers
        relay.process.send_signal(signal.SIGTERM)
        relay.wait()
    assert headers["x-authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in relay.errors()


def relay_of(
    portal: FakePortal,
    *arguments: str,
    port: int = 0,
    program: str | None = None,
    **variables: str,
) -> RelayProcess:
    return RelayProcess(
        f"--api-url={portal.url}",
        *arguments,
        port=port or free_port(),
        program=program,
        variables={"FIREZONE_TOKEN": TOKEN, **variables},
        portal=True,
    )


def client_of(relay: RelayProcess, portal: FakePortal) -> TurnClient:
    """A client with credentials of its own, made by the portal."""
    return TurnClient(("127.0.0.1", relay.port), *portal.credential(salt=f"{next(_salts)}"))


_salts = iter(range(1000))


def relays_between(alice: TurnClient, bob: TurnClient) -> None:
    """Allocate and bind on both ends, unless that is done, and send one datagram each way."""
    if not hasattr(alice, "is_linked"):
        at_alice, at_bob = alice.allocates(), bob.allocates()
        alice.binds(0x4000, at_bob)
        bob.binds(0x4000, at_alice)
        alice.is_linked = True  # type: ignore[attr-defined]
    alice.sends(0x4000, b"ping")
    assert bob.receives() == (0x4000, b"ping")
    bob.sends(0x4000, b"pong")
    assert alice.receives() == (0x4000, b"pong")
