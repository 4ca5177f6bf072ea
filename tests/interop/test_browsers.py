"""Debian's browsers: data channels and calls with the relay, nothing else, between both ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loadlib.netns import RELAY_HOST, Network
from tests.certificates import Authority
from tests.interop.browser import PROGRAMS, WEB, Browser, ice_server
from tests.interop.needs import needs_packages, needs_programs
from tests.interop.network import PORT, RELAY_NAME, relay_in
from tests.process import RelayProcess

pytestmark = [pytest.mark.interop, pytest.mark.slow]

MESSAGES = [f"message {number}" for number in range(300)]
LARGE = "x" * 200_000  # some two hundred datagrams, in SCTP
COUNT = 10  # pictures, and packets of sound


@pytest.fixture(scope="module", params=PROGRAMS)
def browser(
    request: pytest.FixtureRequest, network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    kind: str = request.param
    needs_programs(PROGRAMS[kind])
    needs_packages(WEB)
    with Browser(kind, network.clients, tmp_path_factory.mktemp(kind)) as browser:
        yield browser


def test_a_data_channel_is_relayed_at_both_ends(
    browser: Browser, relay_at_a_distance: RelayProcess
) -> None:
    connect(browser, browser, relay_at_a_distance)
    for sender, receiver in (("alice", "bob"), ("bob", "alice")):
        browser.call("send", sender, MESSAGES)
        assert browser.call("receive", receiver, len(MESSAGES)) == MESSAGES
        browser.call("send", sender, [LARGE])
        assert browser.call("receive", receiver, 1) == [LARGE]

    hang_up(browser, browser)


def test_a_call_is_relayed_at_both_ends(
    browser: Browser, relay_at_a_distance: RelayProcess
) -> None:
    """Sound and pictures."""
    connect(browser, browser, relay_at_a_distance, with_media=True)
    for name in ("alice", "bob"):
        browser.call("media", name, COUNT)

    hang_up(browser, browser)


def test_chromium_and_firefox_call_each_other(
    network: Network, relay_at_a_distance: RelayProcess, tmp_path: Path
) -> None:
    needs_programs(*PROGRAMS.values())
    needs_packages(WEB)
    with (
        Browser("chromium", network.clients, tmp_path / "chromium") as chromium,
        Browser("firefox", network.clients, tmp_path / "firefox") as firefox,
    ):
        for alice, bob in ((chromium, firefox), (firefox, chromium)):
            connect(alice, bob, relay_at_a_distance, with_media=True)
            exchange(alice, bob)
            alice.call("media", "alice", COUNT)
            bob.call("media", "bob", COUNT)
            hang_up(alice, bob)


def test_a_call_goes_on_after_the_relay_has_come_back_with_another_secret(
    browser: Browser, network: Network
) -> None:
    """By an ICE restart with new credentials; a service has to hand them out in any case."""
    with relay_in(network, PORT + 1) as first:
        connect(browser, browser, first, with_media=True)
        exchange(browser, browser)
    with relay_in(network, PORT + 1) as second:
        assert second.password != first.password
        for name in ("alice", "bob"):
            browser.call("configure", name, ice_server(second, RELAY_HOST))
        shake_hands(browser, browser, restart=True)
        exchange(browser, browser)
        for name in ("alice", "bob"):
            browser.call("media", name, COUNT)
            assert browser.call("pair", name) == ["relay", "relay"]
        hang_up(browser, browser)


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_call_where_no_udp_comes_through(
    network: Network, tmp_path: Path, kind: str, transport: str
) -> None:
    """Alice's network lets only TCP through, or only what looks like the web; bob's has UDP."""
    needs_programs(PROGRAMS[kind], "certutil")
    needs_packages(WEB)
    authority = Authority()
    chain, key = authority.issue(RELAY_NAME).write_to(tmp_path)
    arguments = [f"--tcp-port={PORT}", "--tls-port=443", f"--tls-cert={chain}", f"--tls-key={key}"]
    url = f"turn:{RELAY_HOST}:{PORT}?transport=tcp"
    if transport == "tls":
        url = f"turns:{RELAY_NAME}:443?transport=tcp"  # to an address Firefox speaks no TLS
    with (
        relay_in(network, PORT + 2, *arguments, "--user=root") as relay,
        Browser(kind, network.clients, tmp_path / kind, authority) as browser,
    ):
        assert url in relay.urls
        connect(browser, browser, relay, with_media=True, urls=(url, ""))
        assert browser.call("relayProtocol", "alice") == transport
        assert browser.call("relayProtocol", "bob") == "udp"
        exchange(browser, browser)
        for name in ("alice", "bob"):
            browser.call("media", name, COUNT)
        hang_up(browser, browser)


def connect(
    alice: Browser,
    bob: Browser,
    relay: RelayProcess,
    *,
    with_media: bool = False,
    urls: tuple[str, str] = ("", ""),
) -> None:
    """Connect two ends, alice and bob, which may be in one browser; by UDP or other *urls*."""
    for browser, name, url in ((alice, "alice", urls[0]), (bob, "bob", urls[1])):
        browser.call("create", name, ice_server(relay, RELAY_HOST, url))
        if with_media:
            browser.call("addMedia", name)
    shake_hands(alice, bob)
    for browser, name in ((alice, "alice"), (bob, "bob")):
        browser.call("opened", name)
        assert browser.call("pair", name) == ["relay", "relay"]


def shake_hands(alice: Browser, bob: Browser, *, restart: bool = False) -> None:
    """Exchange offer and answer. Nothing but relayed candidates may be in them."""
    offer = alice.call("offer", "alice", restart)
    answer = bob.call("answer", "bob", offer)
    alice.call("accept", "alice", answer)
    for sdp in (offer, answer):
        candidates = [line for line in sdp.splitlines() if line.startswith("a=candidate:")]
        assert candidates
        assert all(" typ relay " in candidate for candidate in candidates)


def exchange(alice: Browser, bob: Browser) -> None:
    alice.call("send", "alice", MESSAGES)
    bob.call("send", "bob", MESSAGES)
    assert bob.call("receive", "bob", len(MESSAGES)) == MESSAGES
    assert alice.call("receive", "alice", len(MESSAGES)) == MESSAGES


def hang_up(alice: Browser, bob: Browser) -> None:
    alice.call("close", "alice")
    bob.call("close", "bob")
