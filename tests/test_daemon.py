"""The running relay on loopback, with real sockets, signals and shortages."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from relay.stun.const import Family
from tests.process import RelayProcess, Stopped, free_port
from tests.turnclient import Peer, TurnClient, TurnError


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    with RelayProcess(port=free_port()) as process:
        yield process


@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("family", Family)
def test_data_flows_both_ways(relay: RelayProcess, server: str, family: Family) -> None:
    with client_of(relay, server) as alice, Peer(family) as bob:
        assert alice.maps() == alice.address
        relayed_address = alice.allocates(family)
        alice.binds(0x4000, bob.address)

        alice.sends(0x4000, b"ping")
        assert bob.receives() == (b"ping", relayed_address)
        bob.sends(b"pong", relayed_address)
        assert alice.receives() == (0x4000, b"pong")
        alice.sends(0x4000, b"")
        assert bob.receives() == (b"", relayed_address)
        bob.sends(b"", relayed_address)
        assert alice.receives() == (0x4000, b"")


def test_two_clients_of_one_relay_reach_each_other(relay: RelayProcess) -> None:
    with client_of(relay) as alice, client_of(relay, "::1") as bob:
        at_alice, at_bob = alice.allocates(), bob.allocates()
        alice.binds(0x4000, at_bob)
        bob.binds(0x4001, at_alice)

        alice.sends(0x4000, b"ping")
        assert bob.receives() == (0x4001, b"ping")
        bob.sends(0x4001, b"pong")
        assert alice.receives() == (0x4000, b"pong")


@pytest.mark.parametrize("size", [60, 1200])
def test_a_burst_of_200_datagrams_waits_in_the_queues(relay: RelayProcess, size: int) -> None:
    """The process is stopped meanwhile, so each queue must hold the whole burst."""
    with client_of(relay) as alice, Peer() as bob:
        relayed_address = alice.allocates()
        alice.binds(0x4000, bob.address)
        burst = [number.to_bytes(4, "big") + bytes(size) for number in range(200)]
        with Stopped(relay):
            for payload in burst:
                alice.sends(0x4000, payload)
                bob.sends(payload, relayed_address)

        assert [bob.receives()[0] for _ in burst] == burst
        assert [alice.receives()[1] for _ in burst] == burst


def test_it_goes_on_where_it_was_stopped(relay: RelayProcess) -> None:
    with client_of(relay) as alice, Peer() as bob:
        relayed_address = alice.allocates()
        alice.binds(0x4000, bob.address)
        for _ in range(3):
            with Stopped(relay):
                bob.sends(b"hi", relayed_address)
            assert alice.receives() == (0x4000, b"hi")


def test_under_a_flood_of_unauthenticated_datagrams_everyone_else_is_served(
    relay: RelayProcess,
) -> None:
    with client_of(relay) as alice, Peer() as bob, Peer(host="127.0.0.2") as mallory:
        relayed_address = alice.allocates()
        alice.binds(0x4000, bob.address)
        for number in range(50):
            for _ in range(100):
                mallory.sends(b"\x00\x01 not stun", ("127.0.0.1", relay.port))
                mallory.sends(b"unasked for", relayed_address)
            payload = b"%d" % number
            bob.sends(payload, relayed_address)
            assert alice.receives() == (0x4000, payload)
            alice.refreshes(600)


def test_an_allocation_ends_without_any_traffic_and_its_port_is_free() -> None:
    """The only sign of its end is that another client gets the only port."""
    arguments = ("--lowest-port=30001", "--highest-port=30001")
    with RelayProcess(*arguments, port=free_port()) as relay, client_of(relay) as alice:
        assert alice.allocates(lifetime=1) == ("127.0.0.1", 30001)
        with client_of(relay) as bob:
            assert error_of(bob) == 508
            wait_until_bindable("127.0.0.1", 30001)
            assert bob.allocates() == ("127.0.0.1", 30001)


def test_a_port_that_is_given_back_can_be_lent_in_the_same_moment() -> None:
    arguments = ("--lowest-port=30002", "--highest-port=30002")
    with RelayProcess(*arguments, port=free_port()) as relay, ExitStack() as stack:
        alice = stack.enter_context(client_of(relay))
        bob = stack.enter_context(client_of(relay))
        for _ in range(20):
            alice.allocates()
            assert error_of(bob) == 508
            alice.refreshes(0)
            bob.allocates()
            bob.refreshes(0)


def test_a_port_held_by_another_process_is_passed_over() -> None:
    arguments = ("--lowest-port=30010", "--highest-port=30013")
    with RelayProcess(*arguments, port=free_port()) as relay, ExitStack() as stack:
        for port in (30010, 30012, 30013):
            stack.enter_context(Peer(port=port))
        assert stack.enter_context(client_of(relay)).allocates() == ("127.0.0.1", 30011)
        assert error_of(stack.enter_context(client_of(relay))) == 508


def test_out_of_descriptors_it_refuses_newcomers_and_serves_the_rest() -> None:
    limited = ("prlimit", "--nofile=96:96")
    relay = RelayProcess("--max-allocations=1000", port=free_port(), prefix=limited)
    with relay, Peer() as bob, ExitStack() as stack:
        served: list[tuple[TurnClient, tuple[str, int]]] = []
        code = 0
        while not code:
            client = stack.enter_context(client_of(relay))
            try:
                served.append((client, client.allocates()))
            except TurnError as error:
                code = error.code
        assert code == 508
        assert 10 < len(served) < 96
        for alice, relayed_address in served:
            alice.binds(0x4000, bob.address)
            bob.sends(b"hi", relayed_address)
            assert alice.receives() == (0x4000, b"hi")
        served[0][0].refreshes(0)
        client.allocates()
    assert relay.process.returncode == 0
    assert "Traceback" not in relay.errors()


def test_an_unreachable_peer_costs_one_datagram(relay: RelayProcess) -> None:
    """Sending from 127.0.0.1 to the internet is EINVAL; everything else goes on."""
    with client_of(relay) as alice, Peer() as bob:
        alice.allocates()
        alice.binds(0x4000, ("8.8.8.8", 53))
        alice.binds(0x4001, bob.address)
        alice.sends(0x4000, b"lost")
        alice.sends(0x4001, b"hi")
        assert bob.receives()[0] == b"hi"


def test_left_alone_it_does_not_wake_up() -> None:
    with RelayProcess(port=free_port()) as relay, client_of(relay) as alice:
        alice.allocates(lifetime=3600)
        alice.binds(0x4000, ("127.0.0.1", 9))
        wait_until_asleep(relay.pid)
        before = wake_ups(relay.pid)
        with pytest.raises(subprocess.TimeoutExpired):  # for a second it has nothing to do
            relay.process.wait(timeout=1)

        assert wake_ups(relay.pid) == before


def test_clients_on_any_local_address_hear_from_that_address(relay: RelayProcess) -> None:
    with client_of(relay, "127.0.0.5") as alice, Peer() as bob:
        relayed_address = alice.allocates()
        alice.binds(0x4000, bob.address)
        bob.sends(b"hi", relayed_address)
        assert alice.receives() == (0x4000, b"hi")


def test_peers_hear_from_the_public_address() -> None:
    """Also where the route to them prefers another one: 127.0.0.1 here."""
    arguments = ("--public-ip4-addr=127.0.0.7", "--allow-peer=127.0.0.0/8")
    relay = RelayProcess(*arguments, port=free_port(), loopback=False)
    with relay, client_of(relay) as alice, Peer() as bob:
        relayed_address = alice.allocates()
        assert relayed_address[0] == "127.0.0.7"
        alice.binds(0x4000, bob.address)
        alice.sends(0x4000, b"hi")
        assert bob.receives() == (b"hi", relayed_address)


def test_behind_nat_the_public_address_is_not_ours_to_bind() -> None:
    arguments = ("--public-ip4-addr=192.0.2.254", "--allow-peer=127.0.0.0/8")
    relay = RelayProcess(*arguments, port=free_port(), loopback=False)
    with relay, client_of(relay) as alice, Peer() as bob:
        host, port = alice.allocates()
        assert host == "192.0.2.254"
        alice.binds(0x4000, bob.address)
        alice.sends(0x4000, b"hi")
        assert bob.receives() == (b"hi", ("127.0.0.1", port))


def test_two_relays_cannot_share_a_port(relay: RelayProcess) -> None:
    with pytest.raises(AssertionError, match="Address already in use"):
        RelayProcess(port=relay.port).__enter__()


def client_of(relay: RelayProcess, server: str = "127.0.0.1") -> TurnClient:
    return TurnClient((server, relay.port), relay.username, relay.password)


def error_of(client: TurnClient) -> int:
    with pytest.raises(TurnError) as caught:
        client.allocates()
    return caught.value.code


def wait_until_bindable(host: str, port: int) -> None:
    """Try until the kernel says that nobody holds the port."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return


def wait_until_asleep(pid: int) -> None:
    """Look until the main thread has nothing left to do."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "S":
        pass


def wake_ups(pid: int) -> int:
    """How often the main thread has gone to sleep so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
