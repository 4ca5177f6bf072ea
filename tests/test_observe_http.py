"""Health checks and metrics, over HTTP on loopback, with clients of every kind."""

import errno
import json
import logging
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from waitress.adjustments import Adjustments

from relay.observe import http as health
from relay.observe.counters import Counters
from relay.observe.exposition import STUCK_AFTER, Status
from relay.observe.http import MAX_CONNECTIONS, HealthServer
from tests.probes import QUIET

WAIT = 10.0  # seconds; only a failing test waits for so long
PAGES = ("/healthz", "/readyz", "/metrics")
HEADER = b"GET /healthz HTTP/1.1\r\nHost: relay\r\n"


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: str


class Relay:
    """A relay that is whatever the test says, and its server."""

    def __init__(self, host: str, request_timeout: float, metrics_age: float) -> None:
        self.counters = Counters()
        self.status = replace(QUIET, counters=self.counters)
        self.bug: Exception | None = None
        self.started_in: list[str] = []
        self.server = HealthServer(
            host,
            0,
            self._status,
            version="1.2.3",
            on_start=lambda: self.started_in.append(threading.current_thread().name),
            request_timeout=request_timeout,
            metrics_age=metrics_age,
        )
        self.server.start()

    def _status(self) -> Status:
        if self.bug is not None:
            raise self.bug
        return self.status

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.address, WAIT)

    def answers(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask, and return the answer."""
        connection = HTTPConnection(*self.server.address, WAIT)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def replies(self, request: bytes) -> bytes:
        """Send these bytes, and return all that comes until the server ends the connection."""
        with self.connect() as client:
            client.sendall(request)
            return read_to_the_end(client)


class Start(Protocol):
    def __call__(
        self, host: str = ..., *, request_timeout: float = ..., metrics_age: float = ...
    ) -> Relay: ...


@pytest.fixture(autouse=True)
def _haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work without a rest, which has a test of its own."""
    monkeypatch.setattr(health, "REST", 0.0)
    monkeypatch.setattr(health, "MAKING_REST", 0.0)


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[Start]:
    """Start servers; after the test no thread is left, and no client made us log anything."""
    threads = threading.active_count()
    caplog.set_level(logging.INFO)
    relays: list[Relay] = []

    def start(
        host: str = "127.0.0.1", *, request_timeout: float = 6 * WAIT, metrics_age: float = 0.0
    ) -> Relay:
        relays.append(Relay(host, request_timeout, metrics_age))
        return relays[-1]

    yield start
    for relay in relays:
        relay.server.stop()
    assert threading.active_count() == threads
    assert [record.getMessage() for record in caplog.get_records("call")] == []


@pytest.fixture
def stepped() -> Iterator[HealthServer]:
    """Make a server without its thread: the test calls serve_some()."""
    server = HealthServer("127.0.0.1", 0, lambda: QUIET, version="1.2.3")
    yield server
    server.stop()


@pytest.fixture
def relay(start: Start) -> Relay:
    return start()


# --- What is answered -----------------------------------------------------------------------


def test_relay_is_healthy_while_its_loop_runs(relay: Relay) -> None:
    """It need not be ready: a restart would not help."""
    relay.status = replace(relay.status, not_ready="waiting for the portal", stuck_for=STUCK_AFTER)

    answer = relay.answers("/healthz")

    assert (answer.status, answer.body) == (200, "ok\n")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_stuck_loop_is_neither_healthy_nor_ready(relay: Relay) -> None:
    relay.status = replace(relay.status, stuck_for=STUCK_AFTER + 1.5)

    health, ready = relay.answers("/healthz"), relay.answers("/readyz")

    assert (health.status, ready.status) == (503, 503)
    assert health.body == "the loop has been busy with one iteration for 6.5 s\n"
    assert json.loads(ready.body)["reason"] == health.body.rstrip()


@pytest.mark.parametrize(
    ("reason", "status"), [(None, 200), ("waiting for the portal", 503), ("draining", 503)]
)
def test_readiness_comes_with_the_reason_and_the_version(
    relay: Relay, reason: str | None, status: int
) -> None:
    relay.status = replace(relay.status, not_ready=reason)

    answer = relay.answers("/readyz")

    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert json.loads(answer.body) == {
        "ready": reason is None,
        "reason": reason,
        "version": "1.2.3",
    }


def test_metrics_move_with_the_counters(relay: Relay) -> None:
    before = samples(relay.answers("/metrics").body)
    relay.counters.to_peer[100] += 3
    relay.status = replace(relay.status, allocations=2)
    after = samples(relay.answers("/metrics").body)

    assert before["relay_packet_size_bytes_count"] == 0
    assert after["relay_packet_size_bytes_count"] == 3
    assert (before["relay_allocations"], after["relay_allocations"]) == (0, 2)


def test_metrics_are_in_the_text_format_whatever_is_asked_for(relay: Relay) -> None:
    """Every client reads that format, and the server need not parse Accept."""
    accept = "application/openmetrics-text; version=what"

    answer = relay.answers("/metrics?name[]=relay_ready", Accept=accept, Accept_Encoding="gzip")

    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "Content-Encoding" not in answer.headers
    assert "relay_allocations" in samples(answer.body)


def test_metrics_are_made_once_for_all_who_ask_at_about_the_same_time(start: Start) -> None:
    relay = start(metrics_age=3600)

    first = relay.answers("/metrics")
    relay.counters.bugs += 1

    assert relay.answers("/metrics").body == first.body


def test_metrics_are_made_the_more_rarely_the_more_time_that_takes(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAKING_REST", 1e9)

    first = relay.answers("/metrics")
    relay.counters.bugs += 1

    assert relay.answers("/metrics").body == first.body


def test_process_has_metrics_too(relay: Relay) -> None:
    found = samples(relay.answers("/metrics").body)

    assert found["process_resident_memory_bytes"] > 0
    assert found["process_open_fds"] > 0


def test_process_metrics_need_no_other_part_of_proc(tmp_path: Path) -> None:
    """As with systemd's ProcSubset=pid."""
    (tmp_path / "self").symlink_to("/proc/self")
    restricted, usual = CollectorRegistry(), CollectorRegistry()
    health._ProcessCollector(proc=str(tmp_path), registry=restricted)
    ProcessCollector(registry=usual)

    found, expected = (samples(generate_latest(one).decode()) for one in (restricted, usual))

    assert found.keys() == expected.keys()
    started = "process_start_time_seconds"
    assert found[started] == pytest.approx(expected[started], abs=2)  # btime has no fractions


@pytest.mark.parametrize("path", PAGES)
def test_head_is_get_without_a_body(relay: Relay, path: str) -> None:
    get = relay.answers(path)
    head, _, body = relay.replies(f"HEAD {path} HTTP/1.1\r\n\r\n".encode()).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b""
    assert f"Content-Type: {get.headers['Content-Type']}".encode() in head
    assert re.search(rb"\r\nContent-Length: [1-9]", head)


@pytest.mark.parametrize(
    "path", ["/metric", "/metrics/", "/index.html", "//metrics/x", "/favicon.ico"]
)
def test_any_other_page_is_404(relay: Relay, path: str) -> None:
    assert relay.answers(path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_any_other_method_is_405(relay: Relay, method: str) -> None:
    answer = relay.answers("/metrics", method)

    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_nothing_is_said_of_the_software(relay: Relay) -> None:
    answers = [relay.replies(request) for request in (HEADER + b"\r\n", b"nonsense\r\n\r\n")]

    assert not any(b"Server:" in answer or b"waitress" in answer for answer in answers)


def test_bug_of_ours_is_500_and_ends_nothing(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.bug = ZeroDivisionError("a bug")
    answers = [relay.answers(path).status for path in PAGES]
    relay.bug = None
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    caplog.clear()

    assert answers == [500, 500, 500]
    assert logged == [ZeroDivisionError] * 3
    assert [relay.answers(path).status for path in PAGES] == [200, 200, 200]


# --- Slow and hostile clients ---------------------------------------------------------------


def test_idle_and_slow_clients_keep_nobody_out(relay: Relay) -> None:
    with ExitStack() as clients:
        idle = [clients.enter_context(relay.connect()) for _ in range(MAX_CONNECTIONS)]
        slow = [clients.enter_context(relay.connect()) for _ in range(20)]
        for client in slow:
            client.sendall(b"GET /metrics HTT")

        assert [relay.answers(path).status for path in PAGES] == [200, 200, 200]
        assert read_to_the_end(idle[0]) == b""  # the oldest had to go
        for client in slow:
            client.sendall(b"P/1.1\r\n\r\n")
        assert all(read_to_the_end(client).startswith(b"HTTP/1.1 200 ") for client in slow)


def test_answer_that_cannot_be_sent_at_once_is_sent_bit_by_bit(relay: Relay) -> None:
    relay.status = replace(relay.status, responses={("x", str(n)): n for n in range(5000)})
    relay.server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    with relay.connect() as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        head, _, body = read_to_the_end(client).partition(b"\r\n\r\n")

    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert len(body) > 100_000


def test_request_has_to_be_complete_in_time_however_busy_its_sender_is(start: Start) -> None:
    relay = start(request_timeout=0.05)

    with relay.connect() as client:
        client.sendall(HEADER + b"X-Slow: ")
        while not select.select([client], [], [], 0.001)[0]:
            client.sendall(b"a")
        assert read_to_the_end(client) == b""


def test_idle_client_is_sent_away_in_time(start: Start) -> None:
    relay = start(request_timeout=0.05)

    assert relay.replies(b"") == b""


def test_connection_is_good_for_one_request(relay: Relay) -> None:
    answer = relay.replies((HEADER + b"Connection: keep-alive\r\n\r\n") * 3)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_what_follows_a_request_is_not_even_parsed() -> None:
    """Otherwise a kilobyte of small requests would be a long piece of work."""
    parser = health._Parser(Adjustments())
    requests = (HEADER + b"\r\n") * 3

    assert parser.received(requests) == len(requests)
    assert parser.completed


REFUSED = [
    pytest.param(HEADER.ljust(health.LARGEST_HEADER, b"x"), 431, id="header too large"),
    pytest.param(HEADER + b"Content-Length: 1025\r\n\r\n", 413, id="body too large"),
    pytest.param(HEADER + b"Content-Length: " + b"9" * 3000 + b"\r\n\r\n", 413, id="far too large"),
    pytest.param(HEADER + b"Content-Length: -1\r\n\r\n", 400, id="body of negative size"),
    pytest.param(HEADER + b"Transfer-Encoding: gzip\r\n\r\n", 501, id="unknown encoding"),
    pytest.param(HEADER + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400, id="wrong chunk"),
    pytest.param(b"GET http://[ HTTP/1.1\r\n\r\n", 400, id="address that urllib does not take"),
    pytest.param(b"POST" + HEADER[3:] + b"Content-Length: 4\r\n\r\nbody", 405, id="small body"),
    pytest.param(b"get /healthz HTTP/1.1\r\n\r\n", 400, id="method in small letters"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, id="TLS"),
    pytest.param(bytes(64) + b"\r\n\r\n", 400, id="zeros"),
    pytest.param(HEADER + b"No colon\r\n\r\n", 400, id="wrong header"),
]


@pytest.mark.parametrize(("request_", "status"), REFUSED)
def test_what_is_no_proper_request_is_refused_and_that_is_all(
    relay: Relay, request_: bytes, status: int
) -> None:
    answer = relay.replies(request_)

    assert answer.split()[1] == str(status).encode()
    assert relay.answers("/healthz").status == 200


def test_client_that_resets_its_connection_is_forgotten(relay: Relay) -> None:
    for request in (b"", b"GET", HEADER + b"\r\n"):
        with relay.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0)) * 2)
            client.sendall(request)

    assert relay.answers("/healthz").status == 200


def test_probes_are_answered_before_everything_else(
    stepped: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come while others wait: an unanswered probe may restart the relay."""
    monkeypatch.setattr(health, "SLICE", 0.0)  # it is time to rest after each answer
    with ExitStack() as clients:
        scrapers = [clients.enter_context(asks(stepped, "/metrics")) for _ in range(5)]
        first = clients.enter_context(asks(stepped, "/healthz"))
        stepped._server.serve_some(WAIT)  # accepts them
        stepped._server.serve_some(WAIT)
        assert answered([first, *scrapers]) == [first, scrapers[0]]

        second = clients.enter_context(asks(stepped, "/readyz"))
        stepped._server.serve_some(WAIT)
        stepped._server.serve_some(WAIT)
        assert answered([second, *scrapers]) == [second, *scrapers[:3]]


def test_client_that_has_to_go_while_it_waits_for_its_answer_gets_none(
    stepped: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SLICE", 0.0)
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 2)
    with ExitStack() as clients:
        scrapers = [clients.enter_context(asks(stepped, "/metrics")) for _ in range(2)]
        stepped._server.serve_some(WAIT)
        stepped._server.serve_some(WAIT)
        newcomers = [clients.enter_context(asks(stepped, "/metrics")) for _ in range(2)]
        stepped._server.serve_some(WAIT)
        stepped._server.serve_some(WAIT)

        assert read_to_the_end(scrapers[0]).startswith(b"HTTP/1.1 200 ")
        assert read_to_the_end(scrapers[1]) == b""
        assert answered(newcomers) == newcomers[:1]


def test_work_is_followed_by_a_rest_of_many_times_its_length(
    stepped: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood gets a few per cent of the interpreter's time at most."""
    monkeypatch.undo()
    rests: list[float] = []
    monkeypatch.setattr(stepped._stopping, "wait", rests.append)

    stepped._used = time.thread_time() - 2.0
    assert stepped._rest()
    assert not stepped._rest()  # after next to no work

    assert len(rests) == 1
    assert rests[0] >= health.REST * 2.0


def test_no_rest_follows_the_making_of_what_is_kept(
    stepped: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a probe would have to wait for the rest to end; instead metrics are made rarely."""
    monkeypatch.setattr(stepped._stopping, "wait", lambda _: pytest.fail("it rests"))

    stepped._used = time.thread_time() - 2.0
    stepped._pages._metrics.making = 2.0

    assert not stepped._rest()


def test_time_to_make_metrics_is_known(stepped: HealthServer) -> None:
    with asks(stepped, "/metrics") as client:
        stepped._server.serve_some(WAIT)
        stepped._server.serve_some(WAIT)

        assert b"relay_build_info" in read_to_the_end(client)
    assert 0.0 < stepped._pages.making <= time.thread_time()


# --- Start and stop -------------------------------------------------------------------------


def test_stop_ends_the_thread_and_every_connection(start: Start) -> None:
    relay = start()
    with relay.connect() as idle, relay.connect() as slow:
        slow.sendall(b"GET ")
        assert relay.answers("/healthz").status == 200  # both have been accepted

        relay.server.stop()
        relay.server.stop()

        assert read_to_the_end(idle) == b""
        assert read_to_the_end(slow) == b""
    with pytest.raises(ConnectionRefusedError):
        relay.connect()


def test_stop_does_not_wait_for_the_end_of_a_rest(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SLICE", 0.0)
    monkeypatch.setattr(health, "REST", 1e9)
    relay, resting = start(), threading.Event()
    wait = relay.server._stopping.wait

    def rest(seconds: float) -> bool:
        resting.set()
        return wait(seconds)

    monkeypatch.setattr(relay.server._stopping, "wait", rest)
    with relay.connect():
        assert resting.wait(WAIT)
        relay.server.stop()


def test_server_that_was_never_started_can_be_stopped() -> None:
    server = HealthServer("127.0.0.1", 0, lambda: pytest.fail("nobody asked"), version="1.2.3")
    server.stop()

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address, WAIT)


def test_its_thread_calls_back_before_anything_else(relay: Relay) -> None:
    assert relay.answers("/healthz").status == 200

    assert relay.started_in == ["health"]


def test_port_that_is_taken_raises(relay: Relay) -> None:
    host, port = relay.server.address

    with pytest.raises(OSError, match="in use") as caught:
        HealthServer(host, port, lambda: relay.status, version="1.2.3")

    assert caught.value.errno == errno.EADDRINUSE


def test_port_can_be_taken_again_at_once(relay: Relay) -> None:
    """Though connections that the server ended linger."""
    assert relay.replies(HEADER + b"\r\n").startswith(b"HTTP/1.1 200 ")
    relay.server.stop()

    HealthServer(*relay.server.address, lambda: relay.status, version="1.2.3").stop()


def test_serves_ipv6(start: Start) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6")
    relay = start("::1")

    assert relay.server.address[0] == "::1"
    assert [relay.answers(path).status for path in PAGES] == [200, 200, 200]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a network namespace: root")
def test_wildcard_of_ipv6_is_reached_by_ipv4_whatever_the_default_is() -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6")
    script = 'echo 1 > /proc/sys/net/ipv6/bindv6only && exec $0 -c "$1"'
    command = ["unshare", "--net", "sh", "-c", script, sys.executable, REACH_BY_IPV4]

    subprocess.run(command, timeout=WAIT, check=True)


REACH_BY_IPV4 = """
import fcntl, socket, struct
from relay.observe.http import HealthServer

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))

server = HealthServer("::", 0, lambda: None, version="1.2.3")
for host in "127.0.0.1", "::1":
    socket.create_connection((host, server.address[1]), 10).close()
server.stop()
"""


def asks(server: HealthServer, path: str) -> socket.socket:
    """Connect, and send a request."""
    client = socket.create_connection(server.address, WAIT)
    client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    return client


def answered(clients: list[socket.socket]) -> list[socket.socket]:
    """Return those for whom there is something to read."""
    return select.select(clients, [], [], 0)[0]


def samples(text: str) -> dict[str, float]:
    """Return the last value of each name."""
    families = text_string_to_metric_families(text)
    return {one.name: one.value for family in families for one in family.samples}


def read_to_the_end(client: socket.socket) -> bytes:
    """Read until the server ends the connection, be it gracefully or not."""
    answer = b""
    try:
        while received := client.recv(65536):
            answer += received
    except ConnectionResetError:  # it has not read all that was sent
        pass
    return answer
