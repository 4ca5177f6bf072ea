"""The status page, and its call to itself, in Debian's browsers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.loadlib.netns import RELAY_HOST, Network, inside
from tests.interop.browser import PROGRAMS, WEB, Visitor
from tests.interop.needs import needs_packages, needs_programs
from tests.interop.network import PORT, relay_in
from tests.process import RelayProcess
from tests.turnclient import TurnClient

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HTTP_PORT = 8080
URL = f"http://{RELAY_HOST}:{HTTP_PORT}/"
DESKTOP, PHONE = (1180, 900), (360, 740)


@pytest.fixture(scope="module")
def relay(network: Network) -> Iterator[RelayProcess]:
    with relay_in(network, PORT, f"--http-addr={RELAY_HOST}:{HTTP_PORT}") as relay:
        yield relay


@pytest.fixture(scope="module", params=PROGRAMS)
def visitor(
    request: pytest.FixtureRequest, network: Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Visitor]:
    kind: str = request.param
    needs_programs(PROGRAMS[kind])
    needs_packages(WEB)
    with Visitor(kind, network.clients, tmp_path_factory.mktemp(kind)) as visitor:
        yield visitor


def test_the_page_keeps_itself_up_to_date(
    visitor: Visitor, relay: RelayProcess, network: Network
) -> None:
    visitor.call("open", URL, *DESKTOP, False)
    visitor.call("until", "document.querySelector('#allocations').textContent.trim() === '0'")
    server = (RELAY_HOST, PORT)
    with (
        inside(network.clients),
        TurnClient(server, relay.username, relay.password) as alice,
        TurnClient(server, relay.username, relay.password) as bob,
    ):
        relayed = {end: end.allocates() for end in (alice, bob)}
        visitor.call("until", "document.querySelector('#allocations').textContent.trim() === '2'")
        alice.binds(0x4000, relayed[bob])
        bob.binds(0x4000, relayed[alice])
        for _ in range(100):
            alice.sends(0x4000, bytes(1000))
            bob.receives()
        for direction in ("traffic-up", "traffic-down", "datagrams-up", "datagrams-down"):
            shown = f"document.querySelector('#{direction}').textContent"
            visitor.call("until", f"parseFloat({shown}) > 0")
        for end in (alice, bob):
            end.refreshes(lifetime=0)
    visitor.call("until", "document.querySelector('#allocations').textContent.trim() === '0'")
    assert "relaying" in visitor.call("evaluate", "document.querySelector('#state').textContent")
    assert "allocate success" in visitor.call("evaluate", "document.body.innerText")
    expect_nothing_wrong(visitor)


def test_it_says_that_the_relay_does_not_answer_and_goes_on_with_the_next_one(
    visitor: Visitor, network: Network
) -> None:
    port = HTTP_PORT + 1
    more = f"--http-addr={RELAY_HOST}:{port}"
    is_away = "!document.querySelector('#away').hidden"
    with relay_in(network, PORT + 1, more):
        visitor.call("open", f"http://{RELAY_HOST}:{port}/", *DESKTOP, False)
        visitor.call("until", "document.querySelector('#state').textContent === 'relaying'")
    visitor.call("until", f"{is_away} && document.body.classList.contains('stale')")
    said = visitor.call("evaluate", "document.querySelector('#away').textContent")
    assert said.startswith("the relay does not answer since ")
    assert visitor.call("evaluate", "document.querySelector('#state').textContent") == "unknown"
    with relay_in(network, PORT + 1, more):
        visitor.call("until", f"!({is_away}) && !document.body.classList.contains('stale')")
        assert visitor.call("evaluate", "document.querySelector('#state').textContent") == (
            "relaying"
        )
    visitor.call("open", "about:blank", *DESKTOP, False)
    visitor.call("problems")  # that nobody answered


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits(
    visitor: Visitor, relay: RelayProcess, size: tuple[int, int], is_dark: bool, tmp_path: Path
) -> None:
    assert relay.port == PORT
    visitor.call("open", URL, *size, is_dark)
    visitor.call("until", "document.querySelector('#cpu span') !== null")
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wanted, available = visitor.call("evaluate", widths)
    assert wanted <= available
    ground = visitor.call("evaluate", "getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, ground.strip("rgb()").split(",")))
    if visitor.name == "chromium":  # the other one cannot be told
        assert (brightness < 200) == is_dark
    visitor.call("picture", str(tmp_path / "page.png"), True)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    expect_nothing_wrong(visitor)


def test_a_call_to_oneself(visitor: Visitor, relay: RelayProcess) -> None:
    visitor.call("open", URL, *DESKTOP, False)
    calls_itself(visitor, relay.username, relay.password)
    visitor.call("until", "!document.querySelector('#results').hidden")
    steps = visitor.call("evaluate", "document.querySelector('#steps').innerText")
    assert "✗" not in steps
    assert "Connected in" in steps
    results = visitor.call("evaluate", "document.querySelector('#results').innerText")
    assert all(word in results for word in ("latency", "jitter", "bit/s"))
    expect_nothing_wrong(visitor)


def test_a_call_with_a_wrong_credential(visitor: Visitor, relay: RelayProcess) -> None:
    visitor.call("open", URL, *DESKTOP, False)
    calls_itself(visitor, relay.username, "wrong")
    visitor.call("until", "document.querySelector('#steps .failed') !== null")
    said = visitor.call("evaluate", "document.querySelector('#steps').innerText")
    if visitor.name == "chromium":
        assert "the username or the credential is wrong, or has expired (401)" in said
    else:  # the other one says nothing of it to a page
        assert "gives no address" in said or "(401)" in said
    visitor.call("until", "!document.querySelector('#go').disabled")
    visitor.call("problems")  # some browsers complain of the relay's 401, too


def test_what_mint_prints_is_all_that_there_is_to_fill_in(
    visitor: Visitor, relay: RelayProcess
) -> None:
    assert relay.port == PORT
    url = f"turn:{RELAY_HOST}:{PORT}?transport=udp"
    minted = {"urls": [url], "username": "1:a", "credential": "b", "expires": 1}
    visitor.call("open", URL, *DESKTOP, False)
    visitor.call("until", "document.querySelector('#url').options.length > 0")
    visitor.call("fill", "#username", json.dumps(minted))
    values = "['url', 'username', 'credential'].map(id => document.getElementById(id).value)"
    assert visitor.call("evaluate", values) == [url, "1:a", "b"]
    expect_nothing_wrong(visitor)


def calls_itself(visitor: Visitor, username: str, credential: str) -> None:
    visitor.call("until", "document.querySelector('#url').options.length > 0")
    visitor.call("fill", "#username", username)
    visitor.call("fill", "#credential", credential)
    visitor.call("click", "#go")


def expect_nothing_wrong(visitor: Visitor) -> None:
    """No error, no violation of the policy, and no request to anywhere else."""
    assert visitor.call("problems") == []
    elsewhere = [url for url in visitor.call("requests") if not url.startswith((URL, "data:"))]
    assert elsewhere == []
