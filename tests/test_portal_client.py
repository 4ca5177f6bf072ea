"""The portal's thread against a portal on loopback: what goes over the wire, and what may go wrong.

A test says what the portal does, and waits for what the relay is told. Nothing is timed; where
the client must not wait for long, its constants are made small.
"""

import logging
import os
import queue
import re
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import pytest

from relay.portal import client as client_module
from relay.portal import phoenix as phoenix_module
from relay.portal import stream as stream_module
from relay.portal.client import PortalClient
from relay.portal.endpoint import Endpoint, endpoint
from relay.portal.phoenix import (
    PortalEvent,
    PortalLost,
    PortalReady,
    PortalRefused,
    PortalUnavailable,
)
from relay.turn.users import password
from tests import fakeportal
from tests.fakeportal import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    WAIT,
    Certificate,
    Connection,
    FakePortal,
    Frame,
    self_signed,
)

E = TypeVar("E", bound=PortalEvent)

TOKEN = "token-of-the-relay-which-nobody-may-see"
SECRET = "7fb2ba5c5a9d1fd8c59c1d5fba40a284"
AGENT = "relay/1.2.3 (test)"
PARAMETERS: Mapping[str, str | int | None] = {
    "name": "my relay",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "port": 3478,
}
LARGEST_RECORD = 16384  # bytes, of TLS
NOBODY_SAYS_SO = "portal.example"  # the resolver is not asked, or is a fake


class Relay:
    """What a portal client tells its relay."""

    def __init__(self, portal: Endpoint) -> None:
        self.told: queue.Queue[PortalEvent] = queue.Queue()
        self.history: list[PortalEvent] = []
        self.client = PortalClient(
            portal, token=TOKEN, secret=SECRET, user_agent=AGENT, post=self._take
        )
        self.thread = self.client._thread
        self._is_running = True
        self.client.start()

    def _take(self, event: PortalEvent) -> None:
        self.history.append(event)
        self.told.put(event)

    def hears(self, kind: type[E]) -> E:
        """Wait for the next event, which is of this kind."""
        event = self.told.get(timeout=WAIT)
        assert isinstance(event, kind), event
        return event

    def hears_nothing(self) -> None:
        assert self.told.empty(), self.told.get()

    def stops(self) -> None:
        if self._is_running:
            self._is_running = False
            self.client.close()
        assert not self.thread.is_alive()


class Dial(Protocol):
    def __call__(
        self, to: FakePortal | str, parameters: Mapping[str, str | int | None] = ...
    ) -> Relay: ...


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry soon, and give close() longer than the 100 ms that a busy machine may exceed."""
    monkeypatch.setattr(phoenix_module, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(client_module, "STOP_TIMEOUT", WAIT / 2)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def dial(caplog: pytest.LogCaptureFixture) -> Iterator[Dial]:
    """Start clients; after the test, each thread has ended, and nobody has seen the secrets."""
    caplog.set_level(logging.DEBUG)
    relays: list[Relay] = []

    def start(
        to: FakePortal | str, parameters: Mapping[str, str | int | None] = PARAMETERS
    ) -> Relay:
        relays.append(Relay(endpoint(to if isinstance(to, str) else to.url, parameters)))
        return relays[-1]

    yield start
    for relay in relays:
        relay.stops()
        assert_unseen(repr([relay.client, relay.thread, relay.history]))
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert_unseen("\n".join(map(logging.Formatter().format, records)))
    assert [record for record in records if record.levelno >= logging.ERROR] == []


def assert_unseen(text: str) -> None:
    for secret in (TOKEN, SECRET):
        assert secret not in text
        assert b64encode(secret.encode()).decode() not in text


@pytest.fixture
def portal() -> Iterator[FakePortal]:
    with FakePortal() as portal:
        yield portal


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def secure_portal(certificate: Certificate) -> Iterator[FakePortal]:
    with FakePortal(certificate) as portal:
        yield portal


@pytest.fixture
def trusted_portal(
    secure_portal: FakePortal, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> FakePortal:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    return secure_portal


@pytest.fixture(params=["plain", "TLS"])
def any_portal(request: pytest.FixtureRequest) -> FakePortal:
    name = {"plain": "portal", "TLS": "trusted_portal"}[request.param]
    portal: FakePortal = request.getfixturevalue(name)
    return portal


# --- The contract ---------------------------------------------------------------------------


def test_joins_as_the_contract_says(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    connection = any_portal.expects_connection()

    assert connection.method == "GET"
    assert connection.path == (
        "/relay/websocket?name=my+relay&ipv4=192.0.2.1&ipv6=2001%3Adb8%3A%3A1&port=3478"
    )
    assert connection.headers == {
        "sec-websocket-key": connection.headers["sec-websocket-key"],
        "host": f"127.0.0.1:{any_portal.port}",
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-version": "13",
        "x-authorization": f"Bearer {TOKEN}",
        "user-agent": AGENT,
    }

    connection.upgrades()
    assert connection.receives_text() == (
        f'{{"topic":"relay","event":"phx_join","payload":{{"stamp_secret":"{SECRET}"}},"ref":0}}'
    )
    connection.replies_ok(0)
    connection.says_init()
    assert relay.hears(PortalReady) == PortalReady()


def test_ready_comes_with_init_and_not_with_the_join(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    connection = portal.expects_join()
    connection.pings(b"was the reply read?")
    connection.receives_frame()
    relay.hears_nothing()

    connection.says_init()
    relay.hears(PortalReady)


URLS = [
    pytest.param("wss://api.firezone.dev", "wss://api.firezone.dev/relay/websocket", id="plain"),
    pytest.param("https://h", "wss://h/relay/websocket", id="https"),
    pytest.param("http://h:4000/", "ws://h:4000/relay/websocket", id="http, port and slash"),
    pytest.param("ws://[2001:db8::1]:80/a/b/", "ws://[2001:db8::1]:80/a/b/relay/websocket", id="6"),
]


@pytest.mark.parametrize(("api_url", "url"), URLS)
def test_endpoint(api_url: str, url: str) -> None:
    assert endpoint(api_url, {}).url == url
    assert endpoint(api_url, {"name": None, "port": 3478}).url == f"{url}?port=3478"


BAD_URLS = [
    pytest.param("ftp://h", id="scheme"),
    pytest.param("h:80", id="no scheme"),
    pytest.param("wss://", id="no host"),
    pytest.param("wss://user@h", id="user"),
    pytest.param("wss://h?x=1", id="query"),
    pytest.param("wss://h#x", id="fragment"),
    pytest.param("wss://h:99999", id="port too large"),
    pytest.param("wss://h:0", id="port 0"),
    pytest.param("wss://h:x", id="port no number"),
    pytest.param("wss://[::1", id="bracket"),
]


@pytest.mark.parametrize("api_url", BAD_URLS)
def test_endpoint_refuses(api_url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        endpoint(api_url, {})


def test_heartbeats_flow(
    any_portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "HEARTBEAT_INTERVAL", 0.01)
    dial(any_portal)
    connection = any_portal.expects_join()

    for ref in (1, 2, 3, 4, 5):
        assert connection.receives_text() == (
            f'{{"topic":"phoenix","event":"heartbeat","payload":{{}},"ref":{ref}}}'
        )
        connection.replies_ok(ref, topic="phoenix")


def test_unanswered_heartbeats_end_the_connection(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "HEARTBEAT_INTERVAL", 0.01)
    relay = dial(portal)
    connection = portal.expects_join()

    *beats, close = connection.receives_end()
    assert [frame.opcode for frame in beats] == [TEXT] * 3
    assert close == Frame(CLOSE, b"\x03\xe8")  # 1000
    assert "heartbeats are unanswered" in relay.hears(PortalLost).detail


def test_refs_begin_at_zero_and_the_secret_stays_on_each_connection(
    portal: FakePortal, dial: Dial
) -> None:
    relay = dial(portal)
    joins = []
    for _ in range(3):
        connection = portal.expects_connection()
        connection.upgrades()
        joins.append(connection.receives())
        connection.replies_ok(0)
        connection.closes()
        relay.hears(PortalLost)

    assert [join["ref"] for join in joins] == [0, 0, 0]
    assert {join["payload"]["stamp_secret"] for join in joins} == {SECRET}


def test_joins_again_on_the_same_connection(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "REJOIN_INTERVAL", 0.01)
    relay = dial(portal)
    connection = portal.expects_join()

    connection.replies_error(0, {"reason": "unmatched topic"})
    again = connection.receives()
    connection.replies_ok(again["ref"])
    connection.says_init()

    assert (again["event"], again["ref"]) == ("phx_join", 1)
    relay.hears(PortalReady)
    portal.expects_nobody()


def test_unanswered_join_ends_the_connection(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "JOIN_TIMEOUT", 0.01)
    relay = dial(portal)
    connection = portal.expects_connection()
    connection.upgrades()

    join, close = connection.receives_end()
    assert (join.opcode, close.opcode) == (TEXT, CLOSE)
    assert "does not answer the join" in relay.hears(PortalLost).detail


def test_says_goodbye_when_it_stops(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    connection = any_portal.expects_join()

    relay.stops()

    assert connection.receives_end() == [Frame(CLOSE, b"\x03\xe8")]  # 1000
    relay.hears_nothing()


def test_gives_up_after_a_day_without_a_join(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "GIVE_UP_AFTER", 0.0)
    relay = dial(portal)
    portal.expects_connection().answers_status(503)

    relay.hears(PortalLost)
    assert "no portal at 127.0.0.1" in relay.hears(PortalUnavailable).detail
    relay.thread.join(WAIT)
    relay.stops()


# --- A portal that serves by itself ---------------------------------------------------------


def test_portal_that_serves_takes_a_relay_in(
    any_portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "HEARTBEAT_INTERVAL", 0.01)
    any_portal.serves()
    relay = dial(any_portal)

    relay.hears(PortalReady)
    any_portal.waits_until(lambda: any_portal.heartbeats >= 4)  # so the answers count
    expiry, salt = any_portal.credential()[0].split(":")
    assert any_portal.stamp_secret == SECRET
    assert any_portal.credential()[1] == password(expiry, salt, SECRET)
    assert (any_portal.connections, any_portal.joins) == (1, 1)
    relay.hears_nothing()


def test_portal_that_serves_may_keep_its_init_for_later(portal: FakePortal, dial: Dial) -> None:
    portal.serves(init=False)
    relay = dial(portal)
    portal.waits_until(lambda: portal.joins == 1)
    relay.hears_nothing()

    portal.says_init()
    relay.hears(PortalReady)


def test_portal_restarts_on_the_same_port(any_portal: FakePortal, dial: Dial) -> None:
    any_portal.serves()
    relay = dial(any_portal)
    relay.hears(PortalReady)

    any_portal.stops()
    relay.hears(PortalLost)
    any_portal.starts()
    any_portal.serves()

    any_portal.waits_until(lambda: any_portal.joins == 2)
    while not isinstance(event := relay.told.get(timeout=WAIT), PortalReady):
        assert isinstance(event, PortalLost)


def test_portal_drops_its_connections(any_portal: FakePortal, dial: Dial) -> None:
    any_portal.serves()
    relay = dial(any_portal)
    for _ in range(3):
        relay.hears(PortalReady)
        any_portal.drops()
        assert "closed the connection" in relay.hears(PortalLost).detail
    relay.hears(PortalReady)
    assert any_portal.joins == 4


def test_portal_refuses_everyone(portal: FakePortal, dial: Dial) -> None:
    portal.refuses(503, "busy", {"Retry-After": "0"})
    relay = dial(portal)

    assert "503 busy" in relay.hears(PortalLost).detail
    assert "503 busy" in relay.hears(PortalLost).detail


# --- Answers other than a websocket ---------------------------------------------------------


def test_401_is_final(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    any_portal.expects_connection().answers_status(401, body="Invalid\ntoken\x1b[31m!")

    detail = relay.hears(PortalRefused).detail
    assert "127.0.0.1" in detail
    assert detail.endswith("401 Invalid token [31m!")
    relay.thread.join(WAIT)
    any_portal.expects_nobody()


def test_401_without_a_body_is_final(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    portal.expects_connection().answers_status(401, body=None)

    assert relay.hears(PortalRefused).detail.endswith("401")


@pytest.mark.parametrize("status", [200, 204, 400, 403, 404, 426, 429, 500, 502, 503, 599])
def test_other_status_is_retried(portal: FakePortal, dial: Dial, status: int) -> None:
    relay = dial(portal)
    portal.expects_connection().answers_status(status, body="come back later")

    assert f"{status} come back later" in relay.hears(PortalLost).detail
    portal.expects_join().says_init()
    relay.hears(PortalReady)


RETRY_AFTER = [
    pytest.param("4321", "4321.0", id="seconds"),
    pytest.param("86401", "86400.0", id="more than a day"),
    pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", "86400.0", id="date"),
]


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER)
def test_retry_after(portal: FakePortal, dial: Dial, value: str, seconds: str) -> None:
    relay = dial(portal)
    portal.expects_connection().answers_status(503, headers={"Retry-After": value})

    assert relay.hears(PortalLost).detail.endswith(f": 503, next try in {seconds} s")


@pytest.mark.parametrize("value", ["-1", "soon", "", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_retry_after_without_sense(portal: FakePortal, dial: Dial, value: str) -> None:
    relay = dial(portal)
    portal.expects_connection().answers_status(503, headers={"retry-AFTER": value})

    assert relay.hears(PortalLost).detail.endswith(": 503, next try in 0.0 s")
    portal.expects_connection()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(any_portal: FakePortal, dial: Dial, status: int) -> None:
    with FakePortal() as elsewhere:
        relay = dial(any_portal)
        location = f"{elsewhere.url}/relay/websocket"
        any_portal.expects_connection().answers_status(status, headers={"Location": location})

        assert str(status) in relay.hears(PortalLost).detail
        any_portal.expects_join().says_init()  # the first host is asked again
        relay.hears(PortalReady)
        elsewhere.expects_nobody()


def test_redirect_that_looks_like_an_upgrade_is_not_one(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    connection = portal.expects_connection()
    connection.answers_status(302, {"Upgrade": "websocket", "Connection": "Upgrade"})

    assert "302" in relay.hears(PortalLost).detail
    assert connection.receives_end() == []


BAD_ANSWERS = [
    pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "too large", id="many headers"),
    pytest.param(b"HTTP/1.1 200 " + b"x" * 100_000, "too large", id="long status line"),
    pytest.param(b"HTTP/1.1 500 E\r\nContent-Length: 9\r\n\r\n", "closed", id="cut body"),
    pytest.param(b"HTTP/1.1 500 E\r\nContent-Length: x\r\n\r\n", "length", id="length no number"),
    pytest.param(b"HTTP/1.1 500 E\r\nContent-Length: -1\r\n\r\n", "500", id="length negative"),
    pytest.param(b"HTTP/1.1 101 Yes\r\n\r\n", "Header", id="101 without more"),
    pytest.param(
        b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        "Header",
        id="101 for somebody else",
    ),
    pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", "SSH", id="ssh"),
    pytest.param(b"\xff\xfe\xfd\r\n", "UTF-8", id="no text"),
    pytest.param(b"\r\n", "", id="nothing"),
    pytest.param(b"HTTP/1.1 2\xd9\xa30 x\r\n\r\n", "", id="digits of another script"),
    pytest.param(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "header", id="no colon"),
    pytest.param(b"", "closed", id="end"),
    pytest.param(
        b"HTTP/1.1 302 Found\r\nSet-Cookie: a@b=c\r\nLocation: /\r\n\r\n", "", id="odd cookie"
    ),
]


@pytest.mark.parametrize(("answer", "reason"), BAD_ANSWERS)
def test_bad_answer_is_retried(portal: FakePortal, dial: Dial, answer: bytes, reason: str) -> None:
    relay = dial(portal)
    connection = portal.expects_connection()
    with suppress(ConnectionError):  # it need not be read to the end
        connection.sends_raw(answer)
    connection.ends()

    detail = relay.hears(PortalLost).detail
    assert reason in detail
    assert len(detail) < 1000
    portal.expects_join().says_init()
    relay.hears(PortalReady)


def test_odd_cookie_with_the_upgrade_is_retried(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    portal.expects_connection().upgrades({"Set-Cookie": "a@b=c"})

    relay.hears(PortalLost)
    portal.expects_join().says_init()
    relay.hears(PortalReady)


def test_long_line_of_nonsense_is_not_repeated_at_length(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    portal.expects_connection().sends_raw(b"x" * 50_000 + b"\r\n")

    assert len(relay.hears(PortalLost).detail) < 1000


# --- TLS ------------------------------------------------------------------------------------


def test_untrusted_certificate(secure_portal: FakePortal, dial: Dial) -> None:
    relay = dial(secure_portal)
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        secure_portal.expects_connection()

    detail = relay.hears(PortalLost).detail
    assert re.search(r": TLS failed: self-signed certificate, next try in", detail), detail


def test_certificate_of_another_host(
    trusted_portal: FakePortal, dial: Dial, resolver: "Resolver"
) -> None:
    resolver.answers(("127.0.0.1", trusted_portal.port))
    relay = dial(f"wss://{NOBODY_SAYS_SO}:{trusted_portal.port}")
    with pytest.raises(ssl.SSLError):
        trusted_portal.expects_connection()

    detail = relay.hears(PortalLost).detail
    assert "TLS failed: Hostname mismatch" in detail
    assert NOBODY_SAYS_SO in detail


def test_portal_without_tls_where_tls_is_expected(portal: FakePortal, dial: Dial) -> None:
    relay = dial(f"wss://127.0.0.1:{portal.port}")
    connection = portal.accepts()
    connection.sends_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    assert "TLS failed: " in relay.hears(PortalLost).detail


def test_secure_frames_in_one_record_are_all_read(trusted_portal: FakePortal, dial: Dial) -> None:
    """What OpenSSL has read already is not in the socket, so that a poll does not see it."""
    relay = dial(trusted_portal)
    connection = trusted_portal.expects_join()

    init = b'{"topic":"relay","event":"init","payload":{},"ref":null}'
    connection.sends_raw(fakeportal.frame(TEXT, init) * 3)

    for _ in range(3):
        relay.hears(PortalReady)


# --- The connection fails -------------------------------------------------------------------


def after_tcp(portal: FakePortal) -> Connection:
    return portal.accepts()


def after_the_request(portal: FakePortal) -> Connection:
    return portal.expects_connection()


def after_the_upgrade(portal: FakePortal) -> Connection:
    connection = portal.expects_connection()
    connection.upgrades()
    connection.receives()  # the join
    return connection


def after_the_join(portal: FakePortal) -> Connection:
    return portal.expects_join()


def in_mid_message(portal: FakePortal) -> Connection:
    connection = portal.expects_join()
    connection.sends_raw(fakeportal.frame(TEXT, b"x" * 100)[:50])
    return connection


Phase = Callable[[FakePortal], Connection]
CONNECTED: list[Phase] = [after_the_request, after_the_upgrade, after_the_join, in_mid_message]


@pytest.mark.parametrize("phase", CONNECTED)
def test_reset(any_portal: FakePortal, dial: Dial, phase: Phase) -> None:
    relay = dial(any_portal)
    phase(any_portal).resets()

    # With TLS, OpenSSL may take it for an end.
    told = relay.hears(PortalLost).detail
    assert re.search("closed|reset" if any_portal.is_secure else "reset", told), told
    after_the_join(any_portal).says_init()
    relay.hears(PortalReady)


@pytest.mark.parametrize("phase", CONNECTED)
def test_end_without_a_word(any_portal: FakePortal, dial: Dial, phase: Phase) -> None:
    relay = dial(any_portal)
    phase(any_portal).ends()

    assert "closed the connection" in relay.hears(PortalLost).detail
    after_the_join(any_portal).says_init()
    relay.hears(PortalReady)


CLOSES = [
    pytest.param(1000, "", "closed the connection 1000,", id="normal"),
    pytest.param(1001, "going away", "closed the connection 1001 going away,", id="with a reason"),
    pytest.param(4000, "a\nb\x1b[31m", "closed the connection 4000 ab[31m,", id="unprintable"),
    pytest.param(None, "", "closed the connection,", id="without a code"),
    pytest.param(1006, "", "1006", id="not allowed on the wire"),
    pytest.param(1000, "x" * 124, "close frame", id="too long"),
]


@pytest.mark.parametrize(("code", "reason", "told"), CLOSES)
def test_close_frame(
    any_portal: FakePortal, dial: Dial, code: int | None, reason: str, told: str
) -> None:
    relay = dial(any_portal)
    after_the_join(any_portal).closes(code, reason)

    assert told in relay.hears(PortalLost).detail
    after_the_join(any_portal).says_init()
    relay.hears(PortalReady)


def test_close_frame_is_answered_once(any_portal: FakePortal, dial: Dial) -> None:
    dial(any_portal)
    connection = after_the_join(any_portal)
    connection.sends_frame(CLOSE, b"\x03\xe8")

    assert [frame.opcode for frame in connection.receives_end()] == [CLOSE]


@pytest.mark.parametrize("phase", [after_tcp, after_the_request])
def test_portal_accepts_and_hangs(
    any_portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    monkeypatch.setattr(client_module, "HANDSHAKE_TIMEOUT", 0.3)
    relay = dial(any_portal)
    phase(any_portal).hangs()

    assert "timed out" in relay.hears(PortalLost).detail


def test_portal_drips_its_answer(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "HANDSHAKE_TIMEOUT", 0.3)
    relay = dial(portal)
    portal.expects_connection().drips(b"HTTP/1.1 200 " + b"x" * 50_000)

    assert "timed out" in relay.hears(PortalLost).detail


def test_message_drips_beyond_its_deadline(
    any_portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MESSAGE_TIMEOUT", 0.1)
    relay = dial(any_portal)
    after_the_join(any_portal).drips(fakeportal.frame(TEXT, b"x" * 50_000))

    assert "timed out" in relay.hears(PortalLost).detail


def test_message_in_dripping_fragments_beyond_its_deadline(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MESSAGE_TIMEOUT", 0.1)
    relay = dial(portal)
    first = fakeportal.frame(TEXT, b"x", is_last=False)
    more = fakeportal.frame(CONTINUATION, b"x", is_last=False)
    after_the_join(portal).drips(first + more * 20_000)

    assert "timed out" in relay.hears(PortalLost).detail


def test_message_that_drips_within_its_deadline(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    after_the_join(any_portal).drips(
        fakeportal.frame(TEXT, b'{"topic":"relay","event":"init","payload":{}}')
    )

    relay.hears(PortalReady)


def test_largest_message_is_read(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    text = '{"topic":"relay","event":"init","payload":{}}'
    connection.sends(text + " " * (client_module.LARGEST_MESSAGE - len(text) - 10))

    relay.hears(PortalReady)


def test_huge_frame_is_refused(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    with suppress(ConnectionError):
        connection.sends("x" * (client_module.LARGEST_MESSAGE + 1))

    assert "too large" in relay.hears(PortalLost).detail


def test_huge_message_in_fragments_is_refused(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    connection = after_the_join(portal)
    connection.sends_frame(TEXT, b"x", is_last=False)
    connection.floods(fakeportal.frame(CONTINUATION, b"x" * 60_000, is_last=False))

    assert "too large" in relay.hears(PortalLost).detail


def test_huge_message_in_fragments_between_pings_is_refused(portal: FakePortal, dial: Dial) -> None:
    """A ping may come between fragments, and does not make another message of them."""
    relay = dial(portal)
    connection = after_the_join(portal)
    connection.sends_frame(TEXT, b"x", is_last=False)
    fragment = fakeportal.frame(CONTINUATION, b"x" * 60_000, is_last=False)
    with suppress(ConnectionError):
        for _ in range(3 * client_module.LARGEST_MESSAGE // 60_000):
            connection.sends_raw(fragment + fakeportal.frame(PING, b""))
        connection.sends_frame(CONTINUATION, b"", is_last=True)
        connection.closes()

    assert "too large" in relay.hears(PortalLost).detail


# --- Frames of all kinds --------------------------------------------------------------------


def test_ping_is_answered(any_portal: FakePortal, dial: Dial) -> None:
    dial(any_portal)
    connection = after_the_join(any_portal)
    connection.pings(b"are you there?")

    assert connection.receives_frame() == Frame(PONG, b"are you there?")


IGNORED = [
    pytest.param([fakeportal.frame(fakeportal.BINARY, b"\x00\x01\xff")], id="binary"),
    pytest.param([fakeportal.frame(TEXT, b"")], id="empty text"),
    pytest.param([fakeportal.frame(TEXT, b"{")], id="garbage"),
    pytest.param([fakeportal.frame(TEXT, b"null")], id="null"),
    pytest.param([fakeportal.frame(TEXT, b"[]")], id="V2 of Phoenix"),
    pytest.param([fakeportal.frame(TEXT, b"[" * 100_000)], id="deep"),
    pytest.param([fakeportal.frame(TEXT, b'{"topic":"x"}')], id="half a frame"),
    pytest.param([fakeportal.frame(PONG, b"unasked")], id="pong"),
    pytest.param(
        [
            fakeportal.frame(fakeportal.BINARY, b"\x00", is_last=False),
            fakeportal.frame(CONTINUATION, b"\x01"),
        ],
        id="binary in fragments",
    ),
]


@pytest.mark.parametrize("frames", IGNORED)
def test_ignored(any_portal: FakePortal, dial: Dial, frames: list[bytes]) -> None:
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    for frame in frames:
        connection.sends_raw(frame)
    connection.says_init()

    relay.hears(PortalReady)
    any_portal.expects_nobody()


def test_fragmented_text_around_a_ping(any_portal: FakePortal, dial: Dial) -> None:
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    connection.sends_frame(TEXT, b'{"topic":"relay",', is_last=False)
    connection.sends_frame(CONTINUATION, b'"event":"in', is_last=False)
    connection.pings(b"")
    connection.sends_frame(CONTINUATION, b'it","payload":{}}')

    assert connection.receives_frame() == Frame(PONG, b"")
    relay.hears(PortalReady)


def test_fragmented_text_around_a_heartbeat(
    any_portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client says amid a message has no influence on how it is read."""
    monkeypatch.setattr(phoenix_module, "HEARTBEAT_INTERVAL", 0.2)
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    connection.sends_frame(TEXT, b'{"topic":"relay","event":"init",', is_last=False)
    connection.pings(b"")
    while connection.receives_frame().opcode != PONG:
        pass
    assert connection.receives()["event"] == "heartbeat"
    connection.sends_frame(CONTINUATION, b'"payload":{}}')

    relay.hears(PortalReady)


NO_FRAMES = [
    pytest.param(fakeportal.frame(TEXT, b"\xff\xfe" * 50_000), id="no UTF-8"),
    pytest.param(fakeportal.frame(CONTINUATION, b"x"), id="continuation of nothing"),
    pytest.param(fakeportal.frame(0x3, b"x"), id="reserved opcode"),
    pytest.param(b"\xc1\x00", id="reserved bit"),
    pytest.param(fakeportal.frame(PING, b"x" * 126), id="long ping"),
    pytest.param(
        fakeportal.frame(TEXT, b"x", is_last=False) + fakeportal.frame(TEXT, b"x"), id="two texts"
    ),
]


@pytest.mark.parametrize("data", NO_FRAMES)
def test_breach_of_the_protocol_ends_the_connection(
    portal: FakePortal, dial: Dial, data: bytes
) -> None:
    relay = dial(portal)
    after_the_join(portal).sends_raw(data)

    assert len(relay.hears(PortalLost).detail) < 1000
    after_the_join(portal).says_init()
    relay.hears(PortalReady)


# --- Looking up and connecting --------------------------------------------------------------


class Resolver:
    """Stands in for the system's: a name has the addresses that the test gives."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._addresses: list[tuple[str, int]] = []
        self._failure: OSError | None = None

    def answers(self, *addresses: tuple[str, int]) -> None:
        self._addresses = list(addresses)

    def fails(self, failure: OSError) -> None:
        self._failure = failure

    def look_up(self, host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        self.is_asked.set()
        self.may_answer.wait(WAIT)
        if self._failure is not None:
            raise self._failure
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, address) for address in self._addresses]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.look_up)
    yield resolver
    resolver.may_answer.set()
    joins_resolvers()


def joins_resolvers() -> None:
    for thread in threading.enumerate():
        if thread.name == "portal-resolver":
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.fixture
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that never answers a SYN: its backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address: tuple[str, int] = listener.getsockname()
        waiting = []
        for _ in range(8):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            waiting.append(client)
        yield address
        for client in waiting:
            client.close()


@pytest.fixture
def closed_port() -> Iterator[tuple[str, int]]:
    """An address that refuses: its port is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()


def test_second_address_where_the_first_never_answers(
    portal: FakePortal,
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    resolver: Resolver,
    black_hole: tuple[str, int],
) -> None:
    monkeypatch.setattr(stream_module, "ADDRESS_TIMEOUT", 0.05)
    resolver.answers(black_hole, ("127.0.0.1", portal.port))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    connection = portal.expects_join()
    connection.says_init()

    assert connection.headers["host"] == NOBODY_SAYS_SO
    relay.hears(PortalReady)  # and nothing was lost before


def test_second_address_where_the_first_refuses(
    portal: FakePortal, dial: Dial, resolver: Resolver, closed_port: tuple[str, int]
) -> None:
    resolver.answers(closed_port, ("127.0.0.1", portal.port))
    relay = dial(f"ws://{NOBODY_SAYS_SO}:8080")
    portal.expects_join().says_init()

    relay.hears(PortalReady)


def test_all_addresses_fail(
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    resolver: Resolver,
    black_hole: tuple[str, int],
    closed_port: tuple[str, int],
) -> None:
    monkeypatch.setattr(stream_module, "ADDRESS_TIMEOUT", 0.05)
    resolver.answers(black_hole, closed_port, closed_port)
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    assert "127.0.0.1: Connection refused" in relay.hears(PortalLost).detail
    assert "127.0.0.1: Connection refused" in relay.hears(PortalLost).detail


def test_last_address_never_answers(
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    resolver: Resolver,
    black_hole: tuple[str, int],
    closed_port: tuple[str, int],
) -> None:
    monkeypatch.setattr(client_module, "DIAL_TIMEOUT", 0.1)
    resolver.answers(closed_port, black_hole)
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    assert "127.0.0.1: timed out" in relay.hears(PortalLost).detail


def test_name_without_addresses(dial: Dial, resolver: Resolver) -> None:
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    assert "no address" in relay.hears(PortalLost).detail
    assert resolver.asked[0] == NOBODY_SAYS_SO


def test_name_is_not_found(dial: Dial, resolver: Resolver) -> None:
    resolver.fails(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    told = f"cannot look up {NOBODY_SAYS_SO}: Name or service not known"
    assert told in relay.hears(PortalLost).detail
    assert told in relay.hears(PortalLost).detail


def test_resolver_takes_too_long(
    dial: Dial, monkeypatch: pytest.MonkeyPatch, resolver: Resolver
) -> None:
    monkeypatch.setattr(client_module, "DIAL_TIMEOUT", 0.05)
    resolver.may_answer.clear()
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    assert f"cannot look up {NOBODY_SAYS_SO}: timed out" in relay.hears(PortalLost).detail
    relay.stops()


def test_name_that_is_none(dial: Dial) -> None:
    relay = dial(f"ws://{'x' * 64}.example")

    assert "cannot look up" in relay.hears(PortalLost).detail


# --- Proxies --------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_proxy(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, portal.url.replace("ws:", "http:"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}:8080")
    connection = portal.expects_connection()

    assert (connection.method, connection.path) == ("CONNECT", f"{NOBODY_SAYS_SO}:8080")
    assert connection.headers == {"host": f"{NOBODY_SAYS_SO}:8080"}

    connection.tunnels()
    connection.reads_request()
    assert connection.headers["x-authorization"] == f"Bearer {TOKEN}"
    connection.upgrades()
    connection.replies_ok(connection.receives()["ref"])
    connection.says_init()
    relay.hears(PortalReady)


def test_proxy_sees_nothing_of_what_is_secure(
    portal: FakePortal, certificate: Certificate, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    monkeypatch.setenv("HTTPS_PROXY", f"http://us%40er:pass%3Aword@127.0.0.1:{portal.port}")
    relay = dial("wss://localhost")
    connection = portal.expects_connection()

    assert (connection.method, connection.path) == ("CONNECT", "localhost:443")
    login = b64encode(b"us@er:pass:word").decode()
    assert connection.headers == {
        "host": "localhost:443",
        "proxy-authorization": f"Basic {login}",
    }

    connection.tunnels()
    connection.secures(certificate.context())
    connection.reads_request()
    assert connection.headers["x-authorization"] == f"Bearer {TOKEN}"
    connection.upgrades()
    connection.replies_ok(connection.receives()["ref"])
    connection.says_init()
    relay.hears(PortalReady)


def test_proxy_is_told_an_ipv6_address_in_brackets(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{portal.port}")  # without a scheme, too
    dial("ws://[2001:db8::1]")

    assert portal.expects_connection().path == "[2001:db8::1]:80"


@pytest.mark.parametrize("exception", ["127.0.0.1", "*", "other.example,127.0.0.1"])
def test_no_proxy(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch, exception: str
) -> None:
    with FakePortal() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("ws:", "http:"))
        monkeypatch.setenv("NO_PROXY", exception)
        relay = dial(portal)
        portal.expects_join().says_init()

        relay.hears(PortalReady)
        proxy.expects_nobody()


def test_proxy_for_the_other_scheme_is_not_asked(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakePortal() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("ws:", "http:"))
        relay = dial(portal)
        portal.expects_join().says_init()

        relay.hears(PortalReady)
        proxy.expects_nobody()


@pytest.mark.parametrize("status", [302, 401, 403, 407, 502])
def test_proxy_refuses(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """That is never final: a 401 of a proxy says nothing about our token."""
    monkeypatch.setenv("HTTP_PROXY", f"http://user:hush@127.0.0.1:{portal.port}")
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    portal.expects_connection().answers_status(status, {"Location": portal.url})

    detail = relay.hears(PortalLost).detail
    assert "the proxy says" in detail
    assert str(status) in detail
    assert "hush" not in detail
    assert portal.expects_connection().method == "CONNECT"


def test_proxy_closes(portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", portal.url.replace("ws:", "http:"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    portal.expects_connection().ends()

    assert "the proxy closed the connection" in relay.hears(PortalLost).detail


def test_proxy_hangs(portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "HANDSHAKE_TIMEOUT", 0.3)
    monkeypatch.setenv("HTTP_PROXY", portal.url.replace("ws:", "http:"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    portal.expects_connection().hangs()

    assert "timed out" in relay.hears(PortalLost).detail


def test_proxy_says_too_much(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", portal.url.replace("ws:", "http:"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    portal.expects_connection().floods(b"HTTP/1.1 200 OK, and also: " * 1000)

    assert "too large" in relay.hears(PortalLost).detail


BAD_PROXIES = [
    pytest.param("socks5://127.0.0.1:1080", id="scheme"),
    pytest.param("https://127.0.0.1:1080", id="https"),
    pytest.param("http://:8080", id="no host"),
    pytest.param("http://user:hush@127.0.0.1:many", id="port no number"),
    pytest.param("http://127.0.0.1:99999", id="port too large"),
    pytest.param("http://[::1", id="bracket"),
]


@pytest.mark.parametrize("proxy", BAD_PROXIES)
def test_proxy_that_is_none(dial: Dial, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    relay = dial(f"ws://{NOBODY_SAYS_SO}")

    detail = relay.hears(PortalLost).detail
    assert "proxy in the environment" in detail
    assert "hush" not in detail


# --- Stopping -------------------------------------------------------------------------------


def test_stops_while_looking_up(dial: Dial, resolver: Resolver) -> None:
    resolver.may_answer.clear()
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    assert resolver.is_asked.wait(WAIT)

    relay.stops()
    relay.hears_nothing()


def test_stops_while_connecting(
    dial: Dial, resolver: Resolver, black_hole: tuple[str, int]
) -> None:
    resolver.answers(black_hole)
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    assert resolver.is_asked.wait(WAIT)

    relay.stops()
    relay.hears_nothing()


PHASES: list[Phase] = [after_tcp, *CONNECTED]


@pytest.mark.parametrize("phase", PHASES)
def test_stops(any_portal: FakePortal, dial: Dial, phase: Phase) -> None:
    """While it waits for TLS or HTTP, for the reply, for a message, and for the rest of one."""
    relay = dial(any_portal)
    connection = phase(any_portal)

    relay.stops()
    connection.is_gone()
    relay.hears_nothing()


def test_stops_while_a_proxy_hangs(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", portal.url.replace("ws:", "http:"))
    relay = dial(f"ws://{NOBODY_SAYS_SO}")
    connection = portal.expects_connection()

    relay.stops()
    connection.is_gone()


def test_stops_while_backing_off(
    portal: FakePortal, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phoenix_module, "FIRST_BACKOFF", 3600.0)
    monkeypatch.setattr(phoenix_module, "MAX_BACKOFF", 3600.0)
    relay = dial(portal)
    portal.expects_connection().ends()
    relay.hears(PortalLost)

    relay.stops()


def test_stops_in_a_flood(any_portal: FakePortal, dial: Dial) -> None:
    """Each TLS record ends in mid-message, so that there is always something to read."""
    relay = dial(any_portal)
    connection = after_the_join(any_portal)
    text = b'{"topic":"phoenix","event":"phx_reply","payload":{},"ref":9}'
    record = fakeportal.frame(TEXT, text.ljust(62)) * 256
    assert len(record) == LARGEST_RECORD
    connection.sends_raw(record[:32])
    connection.floods((record[32:] + record[:32]) * 64)

    relay.stops()


def test_stops_after_the_end(portal: FakePortal, dial: Dial) -> None:
    relay = dial(portal)
    portal.expects_connection().answers_status(401)
    relay.hears(PortalRefused)

    relay.thread.join(WAIT)
    relay.stops()


# --- What nobody may see, and what may not pile up ------------------------------------------


def test_token_is_in_no_log_event_or_exception(
    any_portal: FakePortal, dial: Dial, caplog: pytest.LogCaptureFixture
) -> None:
    """The fixture looks for it; this test makes everything log, report or raise."""
    relay = dial(any_portal)
    any_portal.expects_connection().resets()
    any_portal.expects_connection().answers_status(503, {"Retry-After": "0"}, "busy")
    any_portal.expects_connection().sends_raw(b"nonsense\r\n\r\n")
    any_portal.expects_connection().answers_status(302, {"Location": "ws://192.0.2.1"})
    connection = after_the_join(any_portal)
    connection.sends("nonsense")
    connection.says("nonsense", {})
    connection.closes(1011, "tired")
    any_portal.expects_connection().answers_status(401, body="no")

    for _ in range(6):
        relay.hears(PortalLost)
    assert "nonsense" in caplog.text  # so it was listened to
    assert_unseen(caplog.text)


def closes_after_the_upgrade(connection: Connection) -> None:
    connection.upgrades()
    connection.closes()


def ends_before_the_answer(connection: Connection) -> None:
    connection.ends()


def says_503(connection: Connection) -> None:
    connection.answers_status(503)
    connection.is_gone()


def redirects(connection: Connection) -> None:
    connection.answers_status(302, {"Location": "ws://192.0.2.1"})
    connection.is_gone()


ENDINGS = [
    pytest.param(closes_after_the_upgrade, 200, id="closed"),
    pytest.param(ends_before_the_answer, 50, id="ended"),
    pytest.param(says_503, 50, id="503"),
    pytest.param(redirects, 50, id="redirected"),
]


@pytest.mark.parametrize(("ending", "times"), ENDINGS)
def test_nothing_piles_up(
    any_portal: FakePortal,
    dial: Dial,
    monkeypatch: pytest.MonkeyPatch,
    ending: Callable[[Connection], None],
    times: int,
) -> None:
    monkeypatch.setattr(phoenix_module, "FIRST_BACKOFF", 0.0)
    descriptors, threads = open_descriptors(), threading.active_count()
    relay = dial(any_portal)
    for _ in range(times):
        connection = any_portal.expects_connection()
        ending(connection)
        connection.ends()
        relay.hears(PortalLost)
    waiting = any_portal.expects_connection()
    joins_resolvers()

    assert threading.active_count() == threads + 1
    assert len(open_descriptors()) <= len(descriptors) + 4  # both ends, the stop flag, a lookup
    waiting.ends()
    relay.stops()
    joins_resolvers()
    any_portal.drops()
    assert open_descriptors() == descriptors
    assert threading.active_count() == threads


def open_descriptors() -> set[str]:
    """Name what is open, whatever its number."""
    found = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")  # noqa: PTH115
    return set(found)
