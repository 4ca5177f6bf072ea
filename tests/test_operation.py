"""The real process as its operator sees it: systemd, probes, signals, reloads."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import pytest

from relay.config.reading import read
from relay.daemon import Daemon
from relay.portal.phoenix import PortalReady
from relay.turn.users import mint
from tests.fakeportal import FakePortal
from tests.probes import ask, scrape
from tests.process import RelayProcess, environment, free_port, free_tcp_port
from tests.turnclient import TIMEOUT, TurnClient, TurnError

TOKEN = "a-token-that-nobody-may-see"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator["Manager"]:
    with Manager(f"relay-{os.getpid()}-{tmp_path.name}") as manager:
        yield manager


# --- Privileges ------------------------------------------------------------------------------


def test_no_thread_keeps_any_privilege() -> None:
    with FakePortal() as portal:
        portal.serves()
        http = free_tcp_port()
        with relay_of(portal, f"--http-addr=127.0.0.1:{http}") as relay:
            line = relay.logs("sandboxed: ")
            relay.logs("relaying: listening on")
            threads = [
                dict(row.split(":\t", 1) for row in path.read_text().splitlines())
                for path in Path(f"/proc/{relay.pid}/task").glob("*/status")
            ]
    assert {thread["Name"] for thread in threads} == {"firezone-relay", "health", "portal"}
    assert "firezone-relay, health, portal" in line
    for thread in threads:
        sets = {thread[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
        assert sets == {"0" * 16}
        assert thread["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert thread["CapBnd"] == "0" * 16


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def users_of(relay: RelayProcess) -> set[tuple[str, ...]]:
    """Return user, group and other groups of each thread, as the kernel tells them."""
    found = set()
    for path in Path(f"/proc/{relay.pid}/task").glob("*/status"):
        fields = dict(row.split(":\t", 1) for row in path.read_text().splitlines())
        found.add(
            tuple(" ".join(sorted({*fields[key].split()})) for key in ("Uid", "Gid", "Groups"))
        )
    return found


@as_root
@pytest.mark.parametrize("harden", ["auto", "require"])
def test_root_becomes_nobody_in_each_thread(harden: str) -> None:
    with FakePortal() as portal:
        portal.serves()
        http = free_tcp_port()
        arguments = (f"--http-addr=127.0.0.1:{http}", f"--harden={harden}")
        with relay_of(portal, *arguments) as relay:
            relay.logs("sandboxed: user nobody, no capabilities, empty bounding set")
            relay.logs("relaying: listening on")
            assert users_of(relay) == {("65534", "65534", "")}
            assert ask(http, "/readyz")[0] == 200


@as_root
@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        pytest.param(["--user=daemon"], ("1", "1", ""), id="a name"),
        pytest.param(["--user=4711"], ("4711", "4711", ""), id="a number without a name"),
        pytest.param(["--user=daemon", "--harden=off"], ("1", "1", ""), id="without hardening"),
        pytest.param(["--harden=off"], ("0", "0", "0"), id="root without hardening"),
    ],
)
def test_root_becomes_whom_it_is_told(arguments: list[str], ids: tuple[str, ...]) -> None:
    with RelayProcess(*arguments, port=free_port(), prefix=("setpriv", "--groups=0")) as relay:
        relay.logs("relaying: listening on")
        assert users_of(relay) == {ids}


@as_root
def test_root_that_stays_root_says_so() -> None:
    with RelayProcess("--user=root", port=free_port(), prefix=("setpriv", "--groups=0")) as relay:
        assert "WARNING" in relay.logs("stays root, as --user says")
        relay.logs("sandboxed: no capabilities")
        assert users_of(relay) == {("0", "0", "0")}


@as_root
def test_only_root_can_become_another_user() -> None:
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with RelayProcess("--user=daemon", port=free_port(), prefix=prefix, portal=True) as relay:
        assert relay.wait() == 78
    assert "user 'daemon': only root can become another user" in relay.errors()
    assert "this process is of uid 65534" in relay.errors()
    with RelayProcess("--user=nobody", port=free_port(), prefix=prefix) as relay:
        relay.logs("sandboxed: no capabilities")


# How a container may be: its root is another user outside, and the only one that there is; or it
# cannot change users.
CONTAINERS = [
    pytest.param(
        ("unshare", "--user", "--map-root-user"), "this user namespace", id="one user is mapped"
    ),
    pytest.param(
        ("setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid"),
        "CAP_SETUID and CAP_SETGID are missing",
        id="no CAP_SETUID",
    ),
]


@as_root
@pytest.mark.parametrize(("prefix", "why"), CONTAINERS)
def test_root_that_cannot_become_anybody_serves_as_root_unless_it_must(
    prefix: tuple[str, ...], why: str
) -> None:
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{prefix[0]} is not possible here, as in a chroot")
    with RelayProcess(port=free_port(), prefix=prefix) as relay:
        line = relay.logs("cannot become user nobody: ")
        assert "WARNING" in line
        assert why in line
        relay.logs("sandboxed: no capabilities")
        relay.logs("relaying: listening on")
    for argument in ("--harden=require", "--user=daemon"):
        with RelayProcess(argument, port=free_port(), prefix=prefix, portal=True) as relay:
            assert relay.wait() == 71
        assert "(--user root stays root)" in relay.errors()
    with RelayProcess("--harden=require", "--user=root", port=free_port(), prefix=prefix):
        pass


@as_root
def test_files_that_a_reload_cannot_read_are_named_at_the_start(tmp_path: Path) -> None:
    """Rather than at the first SIGHUP."""
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "relay.conf").touch()
    directory = f"/tmp/relay-test-{os.getpid()}"
    shutil.copytree(tmp_path, directory)  # whose parents everyone may enter
    try:
        arguments = (f"--config={directory}/relay.conf", f"--relay-secret-file={directory}/secret")
        with RelayProcess(*arguments, port=free_port()) as relay:
            line = relay.logs("a reload will fail: ")
            assert f"{directory}/secret can be read by root, but not by uid 65534" in line
            relay.logs("relaying: listening on")
            relay.signals(signal.SIGHUP)
            relay.logs("Permission denied to uid 65534")
        assert f"{directory}/relay.conf" not in relay.errors()
    finally:
        shutil.rmtree(directory)


def test_with_hardening_off_it_says_so() -> None:
    with RelayProcess("--harden=off", port=free_port()) as relay:
        relay.logs("not sandboxed")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has anything to lose")
def test_root_that_cannot_drop_its_privileges_does_not_serve(tmp_path: Path) -> None:
    """Unless it is told to."""
    (tmp_path / "prctl.py").write_text("raise OSError('built for another libc')\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    with RelayProcess(port=free_port(), portal=True, variables={"PYTHONPATH": path}) as relay:
        assert relay.wait() == 71
    assert "built for another libc" in relay.errors()
    assert "--harden off" in relay.errors()
    with RelayProcess("--harden=off", port=free_port(), variables={"PYTHONPATH": path}):
        pass


# --- systemd ---------------------------------------------------------------------------------


def test_systemd_hears_that_it_is_ready_and_how_it_goes(manager: "Manager") -> None:
    with RelayProcess(port=free_port(), variables=manager.variables) as relay:
        manager.hears("READY=1")
        assert manager.hears("STATUS=relaying") == (
            "STATUS=relaying, 0 allocations, 0 channels, 0.0 Mbit/s"
        )
        relay.signals(signal.SIGTERM)
        manager.hears("STOPPING=1")
        assert relay.wait() == 0


def test_with_a_portal_it_is_ready_after_init_and_not_before(manager: "Manager") -> None:
    with FakePortal() as portal:
        portal.serves(init=False)
        with relay_of(portal, variables=manager.variables) as relay:
            relay.logs("joined the portal")
            manager.hears("STATUS=waiting for the portal")
            relay.signals(signal.SIGHUP)  # ends in no READY either
            relay.logs("reloaded")
            assert not any("READY" in message for message in manager.heard_all())
            portal.says_init()
            manager.hears("READY=1")
            assert "EXTEND_TIMEOUT_USEC=40000000" in manager.heard


def test_systemd_hears_of_a_reload(manager: "Manager", tmp_path: Path) -> None:
    with Configured(tmp_path, "", variables=manager.variables) as relay:
        manager.hears("READY=1")
        manager.heard.clear()
        relay.signals(signal.SIGHUP)
        manager.hears("RELOADING=1\nMONOTONIC_USEC=")
        manager.hears("READY=1")


def test_draining_is_announced_before_it_begins(manager: "Manager") -> None:
    arguments = ("--drain-timeout=1000",)
    with (
        RelayProcess(*arguments, port=free_port(), variables=manager.variables) as relay,
        client_of(relay) as alice,
    ):
        alice.allocates()
        relay.signals(signal.SIGTERM)
        manager.hears("STOPPING=1")
        manager.hears("EXTEND_TIMEOUT_USEC=1030000000")


def test_systemd_hears_of_a_drain_that_the_portal_caused(manager: "Manager") -> None:
    program = (
        "from relay.portal import phoenix; phoenix.REFUSED_FOR_GOOD_AFTER = 0; "
        "import relay.cli; raise SystemExit(relay.cli.main())"
    )
    with FakePortal() as portal:
        portal.serves()
        arguments = ("--drain-timeout=1000",)
        with relay_of(portal, *arguments, variables=manager.variables, program=program) as relay:
            manager.hears("READY=1")
            with client_of(relay, portal.stamp_secret) as alice:
                alice.allocates()
                portal.refuses(401)
                portal.drops()
                manager.hears("STOPPING=1")
                manager.hears("EXTEND_TIMEOUT_USEC=1030000000")
                alice.refreshes(0)
            assert relay.wait() == 69


def test_what_the_portal_said_before_it_was_left_changes_nothing() -> None:
    with FakePortal() as portal:
        arguments = [f"--api-url={portal.url}", f"--listen-port={free_port()}", "--http-addr=off"]
        variables = {"FIREZONE_TOKEN": TOKEN, "PUBLIC_IP4_ADDR": "127.0.0.1"}
        daemon = Daemon(read(["-c", os.devnull, *arguments], variables).config)
        daemon._parts.mailbox.post(PortalReady())
        daemon.stop()
        daemon._parts.mailbox.deliver()
        assert daemon._parts.monitor.not_ready == "draining"
        assert not daemon._parts.monitor.portal_connected
        daemon._parts.close()


def test_the_watchdog_is_fed_by_the_loop_and_by_nobody_else(manager: "Manager") -> None:
    """A loop that is stuck starves it, and its health check fails."""
    variables = {**manager.variables, "WATCHDOG_USEC": "1500000"}
    with Stuck(variables) as relay:
        manager.hears("WATCHDOG=1")
        assert ask(relay.http, "/healthz") == (200, b"ok\n")
        relay.blocks()
        while ask(relay.http, "/healthz")[0] == 200:
            pass
        manager.heard_all()
        manager.heard.clear()
        # Time is read from the relay here: it says for how long it has been stuck.
        while stuck_for(relay.http) < 4:
            pass

        assert manager.heard_all() == []
        status, answer = ask(relay.http, "/readyz")
        assert status == 503
        assert "busy with one iteration" in json.loads(answer)["reason"]

        relay.goes_on()
        manager.hears("WATCHDOG=1")
        assert ask(relay.http, "/healthz")[0] == 200


def test_sockets_from_systemd_stay_open_from_one_relay_to_the_next() -> None:
    """What a client sends while there is no relay is answered by the next one."""
    port = free_port()
    with ExitStack() as stack:
        sockets = [stack.enter_context(bound(family, port)) for family in FAMILIES]
        with TurnClient(("127.0.0.1", port), "", "") as alice, handed_over(port, *sockets) as first:
            first.logs("relaying: listening on 0.0.0.0:")
            assert alice.maps() == alice.address
            first.signals(signal.SIGTERM)
            assert first.wait() == 0
            alice.socket.send(BINDING)
            with handed_over(port, *sockets):
                assert alice.socket.recv(100)[8:20] == BINDING[8:20]
        with TurnClient(("::1", port), "", "") as bob, handed_over(port, *sockets):
            assert bob.maps() == bob.address


def test_a_second_socket_of_a_family_is_not_used() -> None:
    port = free_port()
    with bound(socket.AF_INET, port) as first, bound(socket.AF_INET, 0) as second:
        second_port = second.getsockname()[1]
        with handed_over(second_port, second, first) as relay:
            relay.logs(f"not used: 0.0.0.0:{port} (UDP)")


def test_a_socket_for_another_port_is_not_used() -> None:
    port = free_port()
    with bound(socket.AF_INET, 0) as other, handed_over(port, other) as relay:
        number = other.getsockname()[1]
        relay.logs(f"not used: 0.0.0.0:{number} (UDP), handed over by systemd as 'turn'")
        relay.logs(f"relaying: listening on 0.0.0.0:{port}")


def test_an_ipv6_socket_that_takes_ipv4_too_is_a_wrong_configuration() -> None:
    port = free_port()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as both:
        both.bind(("::", port))
        with handed_over(port, both, waits=False) as relay:
            assert relay.wait() == 78
        assert "BindIPv6Only=ipv6-only" in relay.errors()


# --- HTTP ------------------------------------------------------------------------------------


def test_a_drain_leaves_the_portal_and_goes_on_relaying() -> None:
    with FakePortal() as portal:
        portal.serves()
        with relay_of(portal, "--drain-timeout=1000") as relay:
            relay.logs("relaying: listening on")
            with client_of(relay, portal.stamp_secret) as alice:
                alice.allocates()
                relay.signals(signal.SIGTERM)
                portal.waits_until(lambda: portal.is_left)
                alice.refreshes(600)
                relay.signals(signal.SIGTERM)
            assert relay.wait() == 0


def test_probes_follow_the_portal_and_the_drain() -> None:
    with FakePortal() as portal:
        portal.serves(init=False)
        http = free_tcp_port()
        with relay_of(portal, f"--http-addr=127.0.0.1:{http}", "--drain-timeout=1000") as relay:
            relay.logs("joined the portal")
            assert ask(http, "/healthz")[0] == 200
            assert readiness(http) == (503, "waiting for the portal")
            portal.says_init()
            relay.logs("relaying: listening on")
            assert readiness(http) == (200, None)
            with client_of(relay, portal.stamp_secret) as alice:
                alice.allocates()
                relay.signals(signal.SIGTERM)
                relay.logs("draining")
                assert ask(http, "/healthz")[0] == 200
                assert readiness(http) == (503, "draining")
                alice.refreshes(0)
            assert relay.wait() == 0


def test_metrics_move_while_calls_run() -> None:
    http = free_tcp_port()
    with (
        RelayProcess(f"--http-addr=127.0.0.1:{http}", port=free_port()) as relay,
        client_of(relay) as alice,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bob,
    ):
        bob.bind(("127.0.0.1", 0))
        bob.settimeout(TIMEOUT)
        relayed = alice.allocates()
        alice.binds(0x4000, bob.getsockname())
        alice.sends(0x4000, b"four")
        assert bob.recv(100) == b"four"
        bob.sendto(b"answer", relayed)
        assert alice.receives() == (0x4000, b"answer")
        alice.sends(0x4001, b"unbound")
        alice.maps()

        metrics = scrape(http)
    assert metrics["relay_allocations"] == 1
    assert metrics["relay_channels"] == 1
    assert metrics["relay_responses_total", "allocate", "success"] == 1
    assert metrics["relay_responses_total", "allocate", "401"] == 1
    assert metrics["relay_responses_total", "binding", "success"] == 1
    assert metrics["relay_relayed_bytes_total", "udp", "client_to_peer", "sockets"] == 4
    assert metrics["relay_relayed_bytes_total", "udp", "peer_to_client", "sockets"] == 6
    assert metrics["relay_relayed_packets_total", "udp", "client_to_peer", "sockets"] == 1
    assert metrics["relay_dropped_packets_total", "unbound_channel"] == 1
    assert metrics["relay_dropped_packets_total", "send_enobufs"] == 0
    assert metrics["relay_packet_size_bytes_count", "udp", "sockets"] == 2
    assert metrics["relay_ready"] == 1
    assert "relay_portal_connected" not in metrics


def test_datagrams_that_find_the_queue_full_are_counted() -> None:
    """The process is stopped meanwhile, so that nobody reads."""
    http = free_tcp_port()
    with (
        RelayProcess(f"--http-addr=127.0.0.1:{http}", port=free_port()) as relay,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mallory,
    ):
        assert scrape(http)["relay_dropped_packets_total", "receive_queue_full"] == 0
        relay.signals(signal.SIGSTOP)
        for _ in range(1000):
            mallory.sendto(bytes(60_000), ("127.0.0.1", relay.port))
        relay.signals(signal.SIGCONT)
        while not scrape(http)["relay_dropped_packets_total", "receive_queue_full"]:
            pass


def test_reconnects_of_the_portal_are_counted() -> None:
    http = free_tcp_port()
    with FakePortal() as portal:
        portal.serves()
        with relay_of(portal, f"--http-addr=127.0.0.1:{http}") as relay:
            relay.logs("relaying: listening on")
            assert portal_metrics(http) == (1, 0)
            portal.stops()
            relay.logs("relaying meanwhile")
            while portal_metrics(http) != (0, 0):  # what is said may be a second old
                pass
            assert readiness(http) == (200, None)
            portal.starts()
            portal.serves()
            while portal_metrics(http) != (1, 1):
                pass


@pytest.mark.parametrize("given", [True, False], ids=["asked for", "by default"])
def test_a_busy_http_port_is_fatal_only_if_it_was_asked_for(*, given: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        if given:
            arguments = (f"--http-addr={address}",)
            with RelayProcess(*arguments, port=free_port(), portal=True) as relay:
                assert relay.wait() == 73
        else:
            program = DRIVER_OF_DEFAULT.format(address=address)
            with RelayProcess(port=free_port(), program=program) as relay:
                relay.logs("WARNING")
    assert f"cannot serve HTTP on {address}: Address already in use" in relay.errors()


def test_clients_cannot_reach_the_http_port_through_the_relay() -> None:
    http = free_tcp_port()
    with (
        RelayProcess(f"--http-addr=127.0.0.1:{http}", port=free_port()) as relay,
        client_of(relay) as alice,
    ):
        alice.allocates()
        with pytest.raises(TurnError) as refusal:
            alice.binds(0x4000, ("127.0.0.1", http))
    assert refusal.value.code == 403


# --- Reload ----------------------------------------------------------------------------------


def test_a_reload_changes_peers_limits_and_levels_and_keeps_calls(tmp_path: Path) -> None:
    with (
        Configured(tmp_path, "allow-peer = 127.0.0.0/8\n") as relay,
        client_of(relay) as alice,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bob,
    ):
        bob.bind(("127.0.0.1", 0))
        bob.settimeout(TIMEOUT)
        alice.allocates()
        alice.binds(0x4000, bob.getsockname())

        relay.reloads(
            "allow-peer = 127.0.0.0/8\ndeny-peer = 127.0.0.2/32\n"
            "max-allocations-per-ip = 1\nlog-level = info,relay.turn=debug\n"
        )
        changed = relay.logs("reloaded; changed: ")
        assert changed.endswith("changed: deny-peer, max-allocations-per-ip, log-level\n")
        alice.sends(0x4000, b"still there")
        assert bob.recv(100) == b"still there"
        with pytest.raises(TurnError) as refusal:
            alice.binds(0x4001, ("127.0.0.2", 9))
        assert refusal.value.code == 403
        relay.logs("DEBUG")
        with client_of(relay) as carol, pytest.raises(TurnError) as refusal:
            carol.allocates()
        assert refusal.value.code == 486


def test_what_needs_a_restart_is_named_and_left_alone(tmp_path: Path) -> None:
    with Configured(tmp_path, "") as relay:
        relay.reloads("lowest-port = 50000\nhttp-addr = 127.0.0.1:1\ndrain-timeout = 5\n")
        assert relay.logs("needs a restart").endswith("change: lowest-port\n")
        relay.logs("changed: drain-timeout")
        relay.reloads("")
        relay.logs("reloaded; changed: drain-timeout")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("deny-peer = nonsense\n", "deny-peer 'nonsense'", id="value"),
        pytest.param("drain-timeuot = 5\n", "there is no such option", id="name"),
        pytest.param("max-allocations = 0\n", "line 1", id="place"),
    ],
)
def test_a_wrong_configuration_changes_nothing(tmp_path: Path, text: str, problem: str) -> None:
    with (
        Configured(tmp_path, "allow-peer = 127.0.0.0/8\n") as relay,
        client_of(relay) as alice,
    ):
        relay.reloads(text)
        line = relay.logs("not reloaded, all stays as it was")
        assert problem in line
        assert "ERROR" in line
        alice.allocates()
        alice.binds(0x4000, ("127.0.0.1", 9))  # still allowed


def test_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    with Configured(tmp_path, "") as relay:
        relay.file.unlink()
        relay.signals(signal.SIGHUP)
        assert str(relay.file) in relay.logs("not reloaded, all stays as it was")


@pytest.mark.parametrize("kind", ["config", "token-file", "relay-secret-file"])
def test_what_can_be_read_only_once_is_not_read_again(tmp_path: Path, kind: str) -> None:
    """Otherwise a reload would wait for a writer that never comes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Configured(tmp_path, "") as relay, client_of(relay) as alice:
        if kind == "config":
            pipe.rename(relay.file)
            relay.signals(signal.SIGHUP)
        else:
            relay.reloads(f"{kind} = {pipe}\n")
        relay.logs("is no regular file and cannot be read again")
        alice.allocates()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("closed", ["file", "directory"])
def test_what_only_privileges_could_read_is_not_read_again(tmp_path: Path, closed: str) -> None:
    """They have been given up."""
    directory = tmp_path / "another"
    directory.mkdir(mode=0o700)
    relay = Configured(directory, "allow-peer = 127.0.0.0/8\n")
    relay.file.chmod(0o600)
    os.chown(relay.file if closed == "file" else directory, NOBODY, NOBODY)
    with relay:
        relay.signals(signal.SIGHUP)
        line = relay.logs("without privileges since the start")
        assert f"{relay.file}: cannot be read: Permission denied to uid 0" in line
        with client_of(relay) as alice:
            alice.allocates()
            alice.binds(0x4000, ("127.0.0.1", 9))  # still allowed


def test_a_draining_relay_is_not_reloaded(tmp_path: Path) -> None:
    with Configured(tmp_path, "drain-timeout = 1000\n") as relay:
        with client_of(relay) as alice:
            alice.allocates()
            relay.signals(signal.SIGTERM)
            relay.logs("draining: 1 allocations left")
            relay.reloads("drain-timeout = 0\n")
            relay.logs("not reloaded: draining")
            alice.refreshes(0)
        assert relay.wait() == 0


# --- Summary ---------------------------------------------------------------------------------


def test_sigusr1_says_how_it_goes() -> None:
    with RelayProcess(port=free_port()) as relay, client_of(relay) as alice:
        alice.allocates()
        relay.signals(signal.SIGUSR1)
        summary = relay.logs("summary: relaying, 1 allocations, 0 channels")
        assert "client to peer: 0 datagrams, 0 bytes" in summary
        assert "responses: 1 allocate 401, 1 allocate success" in summary
        assert "bugs: 0" in summary
        alice.refreshes(600)


# --- How it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_the_log_tells_why_it_ended(log_format: str) -> None:
    with bound(socket.AF_INET, 0) as other:
        port = other.getsockname()[1]
        arguments = (f"--log-format={log_format}", "--public-ip4-addr=127.0.0.1")
        with RelayProcess(*arguments, port=port, loopback=False, portal=True) as relay:
            assert relay.wait() == 73
        line = relay.errors().splitlines()[-1]
    if log_format == "json":
        assert json.loads(line)["level"] == "ERROR"
    assert f"cannot listen on 0.0.0.0:{port} (UDP): Address already in use" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing")
def test_a_port_that_takes_a_privilege_is_a_wrong_configuration() -> None:
    """It would be tried every three seconds, for ever."""
    everything = "-all"
    prefix = (
        *("unshare", "--net", "setpriv"),
        *(f"--bounding-set={everything}", f"--inh-caps={everything}"),
    )
    with RelayProcess(port=53, portal=True, prefix=prefix) as relay:
        assert relay.wait() == 78
    line = relay.errors().splitlines()[-1]
    assert "cannot listen on 0.0.0.0:53 (UDP): Permission denied" in line
    for way_out in ("socket unit", "CAP_NET_BIND_SERVICE", "net.ipv4.ip_unprivileged_port_start"):
        assert way_out in line


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        pytest.param(["--listen-port=none"], 78, id="value"),
        pytest.param(["--no-such-option"], 64, id="usage"),
        pytest.param(["--http-addr=127.0.0.1:1", "--listen-port={port}"], 73, id="port in use"),
    ],
)
def test_the_exit_code_tells_even_if_nothing_can_be_written(
    arguments: list[str], exit_code: int
) -> None:
    with bound(socket.AF_INET, 0) as other, Path("/dev/full").open("w") as full:
        port = other.getsockname()[1]
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "relay", "-c", os.devnull, "--public-ip4-addr=127.0.0.1"),
                *(argument.format(port=port) for argument in arguments),
            ],
            env=environment(),
            stdout=full,
            stderr=full,
            timeout=TIMEOUT,
            check=False,
        )
    assert ended.returncode == exit_code


def test_a_credential_that_nobody_reads_keeps_nobody_waiting() -> None:
    """Standard output is a pipe that is full already."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    with RelayProcess(port=free_port(), portal=True, stdout=writer) as relay:
        relay.logs("cannot print the credential")
        relay.logs("relaying: listening on")
        with TurnClient(("127.0.0.1", relay.port), "", "") as alice:
            assert alice.maps() == alice.address
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_nobody_finds_a_credential_in_a_log(log_format: str) -> None:
    """Where standard output is no terminal, somebody may keep what is written there."""
    arguments = ("--no-print-credential", f"--log-format={log_format}")
    for given in (arguments, arguments[1:]):
        with RelayProcess(*given, port=free_port(), portal=True, asks=False) as relay:
            relay.logs("--print-credential prints one at the start")
            relay.logs("relaying: listening on")
            relay.signals(signal.SIGTERM)
            assert relay.process.stdout is not None
            assert relay.process.stdout.read() == ""
            assert relay.wait() == 0


def test_on_a_terminal_a_credential_is_printed() -> None:
    terminal, its_end = pty.openpty()
    with RelayProcess(port=free_port(), portal=True, asks=False, stdout=its_end) as relay:
        os.close(its_end)
        printed = b""
        while b"good until" not in printed:
            printed += os.read(terminal, 4096)
        relay.logs("relaying: listening on")
    os.close(terminal)


def test_without_descriptors_for_a_single_allocation_it_does_not_serve() -> None:
    limited = ("prlimit", "--nofile=33:33")
    with RelayProcess(port=free_port(), prefix=limited, portal=True) as relay:
        assert relay.wait() == 71
    assert "the limit of open files is 33" in relay.errors()


def test_few_descriptors_are_said_to_bound_the_allocations() -> None:
    limited = ("prlimit", "--nofile=96:96")
    with RelayProcess(port=free_port(), prefix=limited) as relay:
        line = relay.logs("allocations of all families")
    assert re.search(r"there is room for \d+ allocations .* the limit of open files is 96 ", line)


def test_the_credential_at_start_is_json_where_the_log_is() -> None:
    """Containers merge the two."""
    with RelayProcess("--log-format=json", port=free_port(), portal=True) as relay:
        relay.logs("relaying: listening on")
        assert relay.process.stdout is not None
        printed = json.loads(relay.process.stdout.readline())
        with TurnClient(
            ("127.0.0.1", relay.port), printed["username"], printed["credential"]
        ) as alice:
            alice.allocates()
            alice.refreshes(0)
    assert printed["urls"][0] == f"turn:127.0.0.1:{relay.port}?transport=udp"


# --- Helpers ---------------------------------------------------------------------------------

FAMILIES = (socket.AF_INET, socket.AF_INET6)
NOBODY = 65534
BINDING = b"\x00\x01\x00\x00\x21\x12\xa4\x42twelve bytes"

DRIVER_OF_DEFAULT = """
from dataclasses import replace
from relay.config.options import OPTIONS
import relay.cli, relay.config.reading
changed = [replace(o, default="{address}") if o.name == "http-addr" else o for o in OPTIONS]
relay.config.reading.OPTIONS = changed
import sys
sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--http-addr"))]
raise SystemExit(relay.cli.main())
"""

# A relay whose loop can be blocked: reading from one pipe makes it wait for another.
STUCK = """
import os, sys
from relay.observe import exposition
from relay.config.reading import read
from relay.daemon import Daemon
exposition.STUCK_AFTER = 0.5
class Pipe:
    def fileno(self): return 0
daemon = Daemon(read(sys.argv[1:], {}).config)
daemon.reactor.register(Pipe(), lambda: (os.read(0, 1), os.read(0, 1)))
daemon.run()
"""


class Stuck(RelayProcess):
    """A relay whose loop gets stuck when it is told so."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.http = free_tcp_port()
        super().__init__(
            f"--http-addr=127.0.0.1:{self.http}",
            port=free_port(),
            variables=variables,
            program=STUCK,
        )

    def blocks(self) -> None:
        self.writes("1")

    def goes_on(self) -> None:
        self.writes("2")


class Configured(RelayProcess):
    """A relay with a configuration file."""

    def __init__(self, directory: Path, text: str, variables: dict[str, str] | None = None) -> None:
        self.file = directory / "relay.conf"
        self.file.write_text(text)
        super().__init__(
            f"--config={self.file}",
            "--public-ip4-addr=127.0.0.1",
            # Only root can read where pytest makes its files.
            *(("--user=root",) if os.geteuid() == 0 else ()),
            port=free_port(),
            loopback=False,
            variables=variables,
        )

    def reloads(self, text: str) -> None:
        self.file.write_text(text)
        self.signals(signal.SIGHUP)


class Manager:
    """systemd's end of the notification socket: an abstract one, which every user can reach."""

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{name}")
        self._socket.settimeout(TIMEOUT)
        self.variables = {"NOTIFY_SOCKET": f"@{name}"}
        self.heard: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._socket.close()

    def hears(self, beginning: str) -> str:
        """Return the first message that begins so, heard already or to come."""
        for message in self.heard:
            if message.startswith(beginning):
                return message
        while True:
            message = self._socket.recv(4096).decode()
            self.heard.append(message)
            if message.startswith(beginning):
                return message

    def heard_all(self) -> list[str]:
        """Return everything heard so far, without waiting."""
        self._socket.setblocking(False)
        try:
            while True:
                self.heard.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return self.heard
        finally:
            self._socket.settimeout(TIMEOUT)


def relay_of(
    portal: FakePortal,
    *arguments: str,
    variables: dict[str, str] | None = None,
    program: str | None = None,
) -> RelayProcess:
    return RelayProcess(
        f"--api-url={portal.url}",
        *arguments,
        port=free_port(),
        portal=True,
        program=program,
        variables={"FIREZONE_TOKEN": TOKEN, **(variables or {})},
    )


def client_of(relay: RelayProcess, secret: str | None = None) -> TurnClient:
    username, password = relay.username, relay.password
    if secret is not None:
        username, password = mint(2**40, "salt", secret)
    return TurnClient(("127.0.0.1", relay.port), username, password)


def bound(family: socket.AddressFamily, port: int) -> socket.socket:
    """Return what a .socket unit would bind."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    return sock


def handed_over(port: int, *sockets: socket.socket, waits: bool = True) -> RelayProcess:
    """Start a relay that is given *sockets* as systemd gives them."""
    return RelayProcess(
        port=port,
        portal=not waits,
        descriptors=tuple(sock.fileno() for sock in sockets),
        variables={
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": ":".join("turn" for _ in sockets),
        },
    )


def readiness(port: int) -> tuple[int, str | None]:
    status, answer = ask(port, "/readyz")
    return status, json.loads(answer)["reason"]


def portal_metrics(port: int) -> tuple[float, float]:
    metrics = scrape(port)
    return metrics["relay_portal_connected"], metrics["relay_portal_reconnects_total"]


def stuck_for(port: int) -> float:
    return scrape(port)["relay_loop_lag_seconds"]
