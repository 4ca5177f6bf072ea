"""The status page: what is in it, what is not, and who may read it."""

import json
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config.differences import differences
from relay.config.model import ConfigError
from relay.config.options import OPTIONS, Option
from relay.config.reading import read
from relay.observe.counters import Connections, Counters, InKernel, Relayed
from relay.observe.exposition import Status
from relay.observe.history import PERIOD, SAMPLES, History, Sample
from relay.observe.http import HealthServer
from relay.observe.recent import LINES, LONGEST, RecentLines
from relay.observe.statuspage import (
    ETAG,
    FRESH,
    LASTING,
    PAGE,
    SAFETY,
    About,
    StatusPage,
    as_json,
    is_ours,
)
from tests.certificates import Authority
from tests.probes import QUIET, ask
from tests.process import RelayProcess, free_port, free_tcp_port

FOR_PEOPLE = ("/", "/status.json", "/history.json")


# --- Who may read it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8080", "LOCALHOST.", "relay.localhost:80", "127.0.0.1:8080"),
        *("192.0.2.1", "[::1]:8080", "[2001:db8::1]", "0.0.0.0:1", None),
    ],
)
def test_an_address_and_localhost_are_ours(host: str | None) -> None:
    assert is_ours(host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("", ":8080", "localhost:", "localhost:80:80", "[localhost]x", "xlocalhost", "1.2.3"),
    ],
)
def test_a_name_is_not(host: str) -> None:
    assert not is_ours(host) or host == "localhost:"  # which is localhost, without a port


@given(st.text(max_size=40))
def test_any_host_is_judged(host: str) -> None:
    assert is_ours(host) in {True, False}


@pytest.fixture
def server() -> Iterator[HealthServer]:
    server = HealthServer("127.0.0.1", 0, lambda: QUIET, version="1.2.3")
    server.start()
    yield server
    server.stop()


def fetch(server: HealthServer, path: str, host: str, method: str = "GET") -> tuple[int, str, str]:
    """Ask as a browser would that came by the name *host*."""
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = b""
        while part := client.recv(65536):
            answer += part
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head, body


@pytest.mark.parametrize("path", FOR_PEOPLE)
def test_the_page_is_for_who_asks_by_address(server: HealthServer, path: str) -> None:
    status, head, body = fetch(server, path, "127.0.0.1:8080")
    assert status == 200
    assert body
    for name, value in [*SAFETY, *(LASTING if path == "/" else FRESH)]:
        assert f"{name}: {value}\r\n".lower() in f"{head}\r\n".lower()
    assert fetch(server, path, "localhost", "HEAD")[::2] == (200, "")
    assert fetch(server, path, "localhost", "POST")[0] == 405


@pytest.mark.parametrize("path", FOR_PEOPLE)
def test_who_asks_by_a_name_is_told_what_to_do(server: HealthServer, path: str) -> None:
    status, head, body = fetch(server, path, "evil.example")
    assert status == 403
    assert "X-Content-Type-Options: nosniff" in head
    assert "ask for it by address, or as localhost" in body
    assert "allocations" not in body


@pytest.mark.parametrize(
    ("etags", "status"),
    [(ETAG, 304), (f'"old", W/{ETAG}', 304), ("*", 304), ('"old"', 200), ("", 200)],
)
def test_who_has_the_page_need_not_be_sent_it_again(
    server: HealthServer, etags: str, status: int
) -> None:
    answer, head, body = fetch(server, "/", f"localhost\r\nIf-None-Match: {etags}")
    assert (answer, bool(body)) == (status, status == 200)
    assert f"etag: {ETAG}" in head.lower()
    assert fetch(server, "/", f"evil.example\r\nIf-None-Match: {etags}")[0] == 403
    assert fetch(server, "/status.json", f"localhost\r\nIf-None-Match: {etags}")[0] == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_may_ask_by_any_name(server: HealthServer, path: str) -> None:
    assert fetch(server, path, "relay.monitoring.svc")[0] in {200, 503}


# --- What a browser lets it do --------------------------------------------------------------


def test_a_browser_lets_it_run_and_ask_nothing_else() -> None:
    policy = dict(SAFETY)["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert "unsafe" not in policy
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[name])
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"


def test_it_is_one_file_with_all_that_it_needs() -> None:
    assert not re.search(r"""(src|href)=["'](?!data:|/metrics)""", PAGE)
    assert "://" not in PAGE.replace("http://www.w3.org/2000/svg", "")  # which is but a name
    assert "@import" not in PAGE
    assert len(PAGE) < 40_000


# --- What is in it --------------------------------------------------------------------------


def test_what_the_relay_is_at_this_moment() -> None:
    counters = Counters({"no_permission": 0})
    counters.to_peer[100] = 3
    counters.by_transport["tls"].to_client[50] = 2
    counters.dropped["no_permission"] = 4
    in_kernel = InKernel({"eth0": "native"}, 8, {}, [Relayed(5, 1000)], [Relayed(0, 0)])
    status = replace(
        QUIET,
        counters=counters,
        allocations=7,
        overflows=6,
        responses={("allocate", "401"): 9},
        portal_connected=False,
        in_kernel=in_kernel,
        connections=Connections({"tcp": 1, "tls": 2}, {}, {}, 0, None),
    )
    page = StatusPage(lambda: status, version="1.2.3", cpu_time=lambda: 1.5)
    page.about = About(["turn:192.0.2.1:3478"], [("realm", "example")])
    now = json.loads(as_json(page.now()))
    assert (now["version"], now["ready"], now["reason"]) == ("1.2.3", True, None)
    assert (now["allocations"], now["portal"], now["cpu_seconds"]) == (7, "away", 1.5)
    assert now["traffic"]["to_peer"] == {"datagrams": 8, "bytes": 1300}
    assert now["traffic"]["to_client"] == {"datagrams": 2, "bytes": 100}
    assert now["dropped"] == {"no_permission": 4, "receive_queue_full": 6}
    assert now["responses"] == {"allocate 401": 9}
    assert now["connections"] == {"tcp": 1, "tls": 2}
    assert now["kernel"] == {"devices": {"eth0": "native"}, "routes": 8}
    assert now["urls"] == ["turn:192.0.2.1:3478"]
    assert now["options"] == [["realm", "example"]]


def test_a_relay_that_waits_for_its_portal() -> None:
    status = replace(QUIET, not_ready="waiting for the portal", portal_connected=False)
    now = StatusPage(lambda: status, version="").now()
    assert (now["ready"], now["reason"]) == (False, "waiting for the portal")


def test_the_page_reads_what_there_is() -> None:
    """Each name that its script takes from the answer is in there."""
    now = StatusPage(lambda: QUIET, version="").now()
    taken = set(re.findall(r"\bstatus\.(?!json)([a-z_]+)", PAGE))
    assert taken
    assert taken <= set(now)
    script = PAGE.partition("function totals")[0]
    assert set(re.findall(r'rate\("(\w+)"\)', script)) <= set(Sample._fields)


def test_a_sample_every_ten_seconds_for_an_hour() -> None:
    history = History(lambda: QUIET, lambda: 0.0)
    now = 1000.0
    for _ in range(SAMPLES + 50):
        history.sample_if_due(now)
        history.sample_if_due(now + PERIOD / 2)
        assert history.seconds_left(now + PERIOD / 2) == pytest.approx(PERIOD / 2)
        now += PERIOD
    assert len(history.samples) == SAMPLES
    assert (SAMPLES - 1) * PERIOD == 3600


def test_the_thread_takes_samples_by_itself(server: HealthServer) -> None:
    assert json.loads(fetch(server, "/history.json", "localhost")[2])["samples"]
    assert ask(server.address[1], "/status.json")[0] == 200


def test_a_bug_in_a_sample_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever gets no answer from /healthz may restart a relay that is well."""
    bugs = [ZeroDivisionError("a bug")]

    def status() -> Status:
        if bugs:
            raise bugs.pop()
        return QUIET

    server = HealthServer("127.0.0.1", 0, status, version="1.2.3")
    server.start()
    try:
        assert ask(server.address[1], "/healthz") == (200, b"ok\n")
    finally:
        server.stop()
    assert bugs == []
    assert [record.getMessage() for record in caplog.records] == [
        "no sample for the status page; this is a bug"
    ]


# --- What is not ----------------------------------------------------------------------------


def test_lines_of_level_warning_the_latest_first() -> None:
    recent = RecentLines()
    logger = logging.Logger("relay.test")
    logger.addHandler(recent)
    logger.info("nothing to see")
    letters = "abcdefghijklmnopq"[: LINES + 5]
    for letter in letters:
        logger.warning("line %s", letter)
    assert [line.text for line in recent.lines] == [f"line {c}" for c in letters[:4:-1]]
    logger.error("%s", "x" * 2 * LONGEST)
    assert (recent.lines[0].level, len(recent.lines[0].text)) == ("ERROR", LONGEST)
    logger.warning("%d", "no number")
    assert recent.lines[0].text == "%d"


def test_a_line_that_comes_often_drives_out_no_other() -> None:
    recent = RecentLines()
    logger = logging.Logger("relay.test")
    logger.addHandler(recent)
    logger.warning("the certificate for TLS ends in %d days", 12)
    for port in range(49152, 49152 + 2 * LINES):
        logger.warning("cannot open relay port %d: %s", port, "Address already in use")
    often, once = recent.lines
    assert often.text == f"cannot open relay port {49151 + 2 * LINES}: Address already in use"
    assert (often.times, once.times) == (2 * LINES, 1)


@pytest.mark.parametrize(
    "typed", ["s3cr3t", "it's s3cr3t", 'a "s3cr3t"', "\\'s3cr3t\"", "s3cr3t\n"]
)
def test_a_secret_typed_where_its_file_belongs_is_in_no_line(typed: str) -> None:
    """The relay says so on a reload, and quotes it."""
    recent = RecentLines()
    logger = logging.Logger("relay.daemon")
    logger.addHandler(recent)
    with pytest.raises(ConfigError) as caught:
        read(["-c", os.devnull, f"--auth-secret-file={typed}"], {})
    logger.error("not reloaded, all stays as it was: %s", caught.value)
    (line,) = recent.lines
    assert line.text.startswith("not reloaded, all stays as it was: auth-secret-file '…': ")
    assert "s3cr3t" not in line.text


def test_an_apostrophe_is_no_quotation() -> None:
    recent = RecentLines()
    logger = logging.Logger("relay.net")
    logger.addHandler(recent)
    logger.warning("this host's addresses, and the kernel's: all of them")
    assert recent.lines[0].text == "this host's addresses, and the kernel's: all of them"


def test_no_line_that_names_a_client() -> None:
    recent = RecentLines()
    logger = logging.Logger("relay.turn")
    logger.addHandler(recent)
    logger.warning("authentication failed for %s", "192.0.2.7:5000", extra={"client": "192.0.2.7"})
    assert recent.lines == []


def test_no_secret_is_shown(tmp_path: Path) -> None:
    """Of each option that names a file, nothing is shown but that it is set."""
    secret = "s3cr3t-0123456789"
    certificate = Authority().issue("turn.example.org")
    contents = {
        "token-file": secret,
        "relay-secret-file": secret,
        "auth-secret-file": secret,
        "users-file": f"alice:{secret}",
        "tls-key": certificate.key,
        "tls-cert": certificate.pem,
    }
    assert set(contents) == {option.name for option in OPTIONS if option.in_file}
    arguments = ["-c", os.devnull, "--public-ip4-addr=192.0.2.1", "--tls-port=5349"]
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        arguments.append(f"--{name}={tmp_path / name}")
    shown = differences(read(arguments, {}).config)
    assert {name for name, value in shown if value == "set"} == set(contents)
    text = json.dumps(shown)
    assert not any(word in text for word in (secret, str(tmp_path), "alice", "PRIVATE"))


# Whoever adds an option decides if its text may be on the page, and says so here or there.
SHOWN = {
    *("public-ip4-addr", "public-ip6-addr", "bind-ip4-addr", "bind-ip6-addr", "listen-port"),
    *("lowest-port", "highest-port", "tcp-port", "tls-port", "proxy-protocol-from", "api-url"),
    *("name", "realm", "print-credential", "allow-peer", "deny-peer", "refused-peers"),
    *("send-indications", "one-allocation-per-username", "max-allocations"),
    *("max-allocations-per-username", "max-allocations-per-ip", "max-channels-per-allocation"),
    *("max-connections", "max-connections-per-ip", "unauthenticated-rate"),
    *("unauthenticated-rate-per-prefix", "log-format", "log-level", "http-addr", "harden"),
    *("drain-timeout", "channel-range", "offload", "copy-tos", "xdp", "xdp-device", "software"),
}


@pytest.mark.parametrize("option", OPTIONS, ids=[option.name for option in OPTIONS])
def test_no_text_is_shown_but_of_options_that_say_nothing_of_a_secret(option: Option) -> None:
    config = read(["-c", os.devnull, "--public-ip4-addr=192.0.2.1"], {}).config
    text = "c4n4ry"
    shown = dict(differences(replace(config, texts={option.name: (text,)})))
    assert shown == {option.name: text if option.name in SHOWN else "set"}


def test_the_seed_of_all_secrets_is_not_shown() -> None:
    """With it, and the program, anybody could make credentials."""
    arguments = ["-c", os.devnull, "--public-ip4-addr=192.0.2.1", "--rng-seed=8656", "--user=0"]
    shown = dict(differences(read(arguments, {}).config))
    assert shown == {"public-ip4-addr": "192.0.2.1", "user": "set", "rng-seed": "set"}


def test_a_token_in_the_environment_is_set_and_not_shown() -> None:
    arguments = ["-c", os.devnull, "--public-ip4-addr=192.0.2.1"]
    shown = dict(differences(read(arguments, {"FIREZONE_TOKEN": "s3cr3t"}).config))
    assert shown == {"public-ip4-addr": "192.0.2.1", "token": "set"}


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--listen-port=3478", {}),
        ("--listen-port=3479", {"listen-port": "3479"}),
        ("--allow-peer=10.0.0.0/8,fd00::/8", {"allow-peer": "10.0.0.0/8,fd00::/8"}),
        ("--no-send-indications", {"send-indications": "false"}),
    ],
)
def test_what_differs_from_the_default(argument: str, shown: dict[str, Any]) -> None:
    config = read(["-c", os.devnull, "--public-ip4-addr=192.0.2.1", argument], {}).config
    assert dict(differences(config)) == {"public-ip4-addr": "192.0.2.1", **shown}


def test_a_reload_shows_on_the_page(tmp_path: Path) -> None:
    file, http = tmp_path / "relay.conf", free_tcp_port()
    file.write_text("drain-timeout = 7\n")
    same_user = ("--user=root",) if os.geteuid() == 0 else ()  # nobody else may read that file
    arguments = (f"--config={file}", f"--http-addr=127.0.0.1:{http}", *same_user)
    with RelayProcess(*arguments, port=free_port()) as relay:
        shown = json.loads(ask(http, "/status.json")[1])
        assert shown["urls"] == relay.urls
        assert ["drain-timeout", "7"] in shown["options"]
        file.write_text("drain-timeout = 8\n")
        relay.signals(signal.SIGHUP)
        relay.logs("reloaded; changed: drain-timeout")
        while ["drain-timeout", "8"] not in shown["options"]:  # what is said may be a second old
            shown = json.loads(ask(http, "/status.json")[1])
