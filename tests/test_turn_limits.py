"""What one user, one address, one network and all unauthenticated clients together may have."""

import errno
from collections.abc import Iterable
from itertools import cycle

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Kind, Method, PasswordAlgorithm
from relay.stun.message import Message, decode
from relay.turn.auth import NONCE_SIZES, Authenticator, AuthFailure
from relay.turn.channels import CHECKED_AT_ONCE
from relay.turn.ratelimit import BURST, BURST_IN_ALL, CLIENT_BURST, CLIENT_RATE, PROVEN
from relay.turn.users import DEFAULT_REALM, mint
from tests.scenario import (
    SECRET,
    UNIX_START,
    Answer,
    Client,
    Scenario,
    ToClient,
    Value,
    channel_data,
    relayed,
    request,
    to,
)

BINDING = request(Method.BINDING).encode()
UDP = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)


# --- 486 -------------------------------------------------------------------------------------


def test_a_username_may_have_so_many_allocations() -> None:
    relay = Scenario(max_allocations_per_username=2)
    relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.client("192.0.2.11:5000", user="alice").allocates()
    third = relay.client("192.0.2.12:5000", user="alice")

    assert tries_to_allocate(third).code == 486
    assert tries_to_allocate(third).signed
    relay.client("192.0.2.12:5001", user="bob").allocates()


def test_an_allocation_that_ends_makes_room_for_its_username() -> None:
    relay = Scenario(max_allocations_per_username=1)
    first = relay.client("192.0.2.10:5000", user="alice").allocates()
    second = relay.client("192.0.2.11:5000", user="alice")
    assert tries_to_allocate(second).code == 486

    first.refreshes(lifetime=0)

    assert tries_to_allocate(second).code is None


def test_a_takeover_is_no_more_than_before() -> None:
    """What it replaces makes room for it, at the user's limit and at the address's."""
    relay = Scenario(
        one_allocation_per_username=True,
        max_allocations_per_username=1,
        max_allocations_per_ip=1,
    )
    relay.client("192.0.2.10:5000", user="alice").allocates()

    relay.client("192.0.2.10:5001", user="alice").allocates()

    assert relay.server.allocations == 1


def test_a_takeover_over_the_limit_of_an_address_ends_nothing() -> None:
    relay = Scenario(one_allocation_per_username=True, max_allocations_per_ip=1)
    alice = relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.client("192.0.2.11:5000", user="bob").allocates()
    roaming = relay.client("192.0.2.11:5001", user="alice")

    assert tries_to_allocate(roaming).code == 486
    assert alice.refreshes().code is None


def test_an_address_may_have_so_many_allocations() -> None:
    relay = Scenario(max_allocations_per_ip=2)
    relay.client("192.0.2.10:5000").allocates()
    leaving = relay.client("192.0.2.10:5001").allocates()
    third = relay.client("192.0.2.10:5002")

    assert tries_to_allocate(third).code == 486
    relay.client("192.0.2.11:5000").allocates()
    leaving.refreshes(lifetime=0)
    assert tries_to_allocate(third).code is None


def test_of_ipv6_a_whole_64_counts_as_one_address() -> None:
    relay = Scenario(max_allocations_per_ip=1)
    relay.client("[2001:db8:0:1::1]:5000").allocates()

    assert tries_to_allocate(relay.client("[2001:db8:0:1:ffff::2]:5000")).code == 486
    assert tries_to_allocate(relay.client("[2001:db8:0:2::1]:5000")).code is None


def test_a_move_is_not_refused_for_a_limit_that_it_does_not_raise() -> None:
    relay = Scenario(one_allocation_per_username=True, max_sockets=3)
    alice = relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.client("192.0.2.11:5000", user="bob").allocates()
    relay.client("192.0.2.12:5000", user="carol").allocates()
    relay.changes_settings(max_allocations=2)

    relay.client("192.0.2.20:5000", user="alice").allocates()

    assert relay.server.allocations == 3
    assert alice.refreshes().code == 437


def test_a_refused_move_ends_nothing() -> None:
    """Here no socket is left to be made."""
    relay = Scenario(one_allocation_per_username=True)
    alice = relay.client("192.0.2.10:5000", user="alice").allocates()
    relay.network.failure = errno.EMFILE
    roaming = relay.client("192.0.2.11:5000", user="alice")

    assert tries_to_allocate(roaming).code == 508
    assert alice.refreshes().code is None


def test_a_move_where_all_ports_are_lent_gets_the_one_that_it_frees() -> None:
    relay = Scenario(one_allocation_per_username=True, ports=range(50000, 50001))
    relay.client("192.0.2.10:5000", user="alice").allocates()

    relay.client("192.0.2.11:5000", user="alice").allocates()
    assert relay.server.allocations == 1


def test_a_lower_limit_ends_nothing_that_exists() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    relay.client("192.0.2.10:5001").allocates()

    relay.changes_settings(max_allocations_per_ip=1)

    assert alice.refreshes().code is None
    assert tries_to_allocate(relay.client("192.0.2.10:5002")).code == 486


# --- Silence ---------------------------------------------------------------------------------


def test_a_network_gets_so_many_unauthenticated_answers_and_then_silence() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=2)
    answered = answers_to_a_flood(relay, "192.0.2.10:5000")

    assert answered == 2 * BURST + 1
    assert relay.dropped() == {"unauthenticated_rate_per_prefix": 1000 - answered}
    assert answers_to_a_flood(relay, "192.0.2.11:5000") == 0, "of the same /24"
    assert answers_to_a_flood(relay, "198.51.100.10:5000") == answered, "of another"


def test_then_answers_come_at_the_rate() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=2)
    answers_to_a_flood(relay, "192.0.2.10:5000")

    relay.passes(seconds=3)

    assert answers_to_a_flood(relay, "192.0.2.10:5000") == 3 * 2


def test_of_ipv6_a_56_is_one_network() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=1)
    answers_to_a_flood(relay, "[2001:db8:0:1::1]:5000")

    assert answers_to_a_flood(relay, "[2001:db8:0:2::1]:5000") == 0
    assert answers_to_a_flood(relay, "[2001:db8:0:100::1]:5000") > 0


def test_all_unauthenticated_clients_together_get_so_many_answers() -> None:
    relay = Scenario(unauthenticated_rate=400)
    floods = [answers_to_a_flood(relay, f"192.0.{n}.1:5000") for n in range(10)]

    assert 0 < sum(floods) <= 400 * BURST_IN_ALL
    assert set(relay.dropped()) == {"unauthenticated_rate"}


@pytest.mark.parametrize("method", [Method.ALLOCATE, Method.REFRESH, 0x0FF], ids=hex)
def test_errors_to_unauthenticated_clients_count_too(method: int) -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=1)
    client = relay.client("192.0.2.10:5000")
    for _ in range(100):
        client.sends(request(method).encode())

    assert len(relay.sent()) == BURST + 1


def test_who_holds_an_allocation_is_answered_in_the_middle_of_a_flood() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=1, unauthenticated_rate=100)
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    answers_to_a_flood(relay, "192.0.2.66:5000")
    relay.sent()

    alice.binds(0x4001, bob)
    assert alice.refreshes().code is None
    alice.sends_data(0x4001, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping")]


def test_requests_in_the_name_of_a_client_do_not_use_up_what_it_may_ask_for() -> None:
    """Without a nonce that was sent to its address they are anybody's."""
    relay = Scenario(unauthenticated_rate_per_prefix=1)
    alice = relay.client("192.0.2.10:5000").allocates()
    forged = request(Method.REFRESH, (Attr.NONCE, bytes(NONCE_SIZES[0]))).encode(b"guessed")
    for _ in range(1000):
        alice.sends(forged)
    relay.sent()

    assert alice.refreshes().code is None


class CountingAuthenticator(Authenticator):
    """Counts how often a key was made from a username."""

    keys_made = 0

    def keys(self, username: str, algorithm: PasswordAlgorithm) -> Iterable[bytes]:
        type(self).keys_made += 1
        return super().keys(username, algorithm)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingAuthenticator]:
    monkeypatch.setattr(CountingAuthenticator, "keys_made", 0)
    return CountingAuthenticator


@pytest.mark.parametrize("sha256", [False, True], ids=["SHA-1", "SHA-256"])
@pytest.mark.parametrize("has_nonce", [False, True])
def test_nothing_is_computed_for_a_source_that_is_over_its_limit(
    counting: type[CountingAuthenticator], has_nonce: bool, sha256: bool
) -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=10, authenticator=counting)
    mallory = relay.client("192.0.2.66:5000")
    credentials: list[Value] = [
        (Attr.USERNAME, mallory.username),
        (Attr.REALM, DEFAULT_REALM),
    ]
    if has_nonce:
        credentials.append((Attr.NONCE, mallory.nonce))
    datagram = request(Method.ALLOCATE, *credentials).encode(b"guessed", sha256=sha256)
    for _ in range(1000):
        mallory.sends(datagram)

    allowed = 10 * BURST * (PROVEN if has_nonce else 1)
    assert counting.keys_made <= allowed / 2 + 1, "a signature is work, on top of the answer"
    assert set(relay.dropped()) == {"unauthenticated_rate_per_prefix"}


def test_what_is_not_answered_was_work_all_the_same() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=2)
    client = relay.client("192.0.2.10:5000")
    damaged = bytearray(request(Method.BINDING).encode(fingerprinted=True))
    damaged[-1] ^= 1
    for _ in range(1000):
        client.sends(bytes(damaged))

    assert relay.dropped() == {"wrong_fingerprint": 11, "unauthenticated_rate_per_prefix": 989}


def test_what_is_no_request_is_not_even_counted() -> None:
    """It is dropped before anything is looked at, and takes nothing from those who ask."""
    relay = Scenario(unauthenticated_rate_per_prefix=2, unauthenticated_rate=100)
    client = relay.client("192.0.2.10:5000")
    for kind in (Kind.INDICATION, Kind.SUCCESS, Kind.ERROR):
        for _ in range(1000):
            client.sends(Message(kind, Method.BINDING, bytes(12)).encode())

    assert relay.dropped() == {"not_a_request": 3000}
    client.allocates()


# --- Requests of a client ---------------------------------------------------------------------


def test_a_client_may_have_so_many_requests_served_and_then_silence(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000").allocates()
    refresh = alice.signed(Method.REFRESH)
    for _ in range(1000):
        alice.sends(refresh)

    assert len(relay.sent()) == CLIENT_BURST
    assert relay.dropped() == {"client_rate": 1000 - CLIENT_BURST}
    relay.passes(seconds=2)
    for _ in range(1000):
        alice.sends(refresh)
    assert len(relay.sent()) == 2 * CLIENT_RATE


def test_other_clients_and_its_own_data_are_not_measured_by_that(relay: Scenario) -> None:
    alice, carol = relay.client("192.0.2.10:5000"), relay.client("192.0.2.10:5001")
    bob = relay.peer("198.51.100.7:9000")
    alice.allocates().binds(0x4001, bob)
    carol.allocates()
    refresh = alice.signed(Method.REFRESH)
    for _ in range(1000):
        alice.sends(refresh)
    relay.sent()

    assert carol.refreshes().code is None
    alice.sends_data(0x4001, b"ping")
    assert relay.sent() == [relayed(alice, bob, b"ping")]


def test_requests_with_a_wrong_password_count_as_well(
    counting: type[CountingAuthenticator],
) -> None:
    relay = Scenario(authenticator=counting)
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.password = "wrong"
    refresh = alice.signed(Method.REFRESH)
    counting.keys_made = 0
    for _ in range(1000):
        alice.sends(refresh)

    assert counting.keys_made == CLIENT_BURST


# --- Newcomers ---------------------------------------------------------------------------------

RETRANSMISSIONS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between. RFC 8489 §6.2.1


def test_a_network_that_was_quiet_comes_before_those_that_use_up_what_all_may_have() -> None:
    """Each of these asks for less than a network may, but all of them for more than there is."""
    relay = Scenario(unauthenticated_rate_per_prefix=100, unauthenticated_rate=100)
    networks = [f"10.0.{n}.1" for n in range(50)]
    flood = Flood(relay, networks, per_second=1000)
    flood.goes_on(seconds=5)
    assert relay.dropped()["unauthenticated_rate"] > 3000

    # Slots are drawn by hash: now and then two networks share one.
    busy = {relay.server._limiter.source(host, is_proven=False) for host in networks}
    hosts = [f"192.0.{n}.1" for n in range(100)]
    quiet = [h for h in hosts if relay.server._limiter.source(h, is_proven=False) not in busy]
    for host in quiet[:5]:
        newcomer = relay.client(f"{host}:5000")
        newcomer.hears(request(Method.BINDING).encode())
        newcomer.allocates()
        flood.goes_on(seconds=0.2)


def test_whoever_is_new_gets_in_while_forged_requests_come_from_everywhere() -> None:
    """The first answer takes some tries; who has it stands before all that is forged."""
    relay = Scenario(unauthenticated_rate_per_prefix=100, unauthenticated_rate=100)
    flood = Flood(relay, [f"10.{n >> 8}.{n & 255}.1" for n in range(20_000)], per_second=300)
    flood.goes_on(seconds=5)
    newcomer = relay.client("192.0.2.10:5000")

    for pause in RETRANSMISSIONS:
        flood.goes_on(pause)
        relay.sent()
        newcomer.sends(request(Method.ALLOCATE, UDP).encode())
        answers = relay.sent()
        if answers:
            break
    (answer,) = answers
    newcomer._nonce = decode(answer.datagram).message.get(Attr.NONCE)  # type: ignore[union-attr]
    flood.goes_on(seconds=1)
    assert tries_to_allocate(newcomer).code is None
    assert newcomer.refreshes().code is None


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_forged_in_the_name_of_a_network_does_not_lock_it_out(signed: bool) -> None:
    """Whoever has a nonce, so receives what is sent there, is counted apart."""
    relay = Scenario(unauthenticated_rate_per_prefix=2, unauthenticated_rate=1000)
    newcomer = relay.client("192.0.2.10:5000")
    assert newcomer.nonce
    forged = request(Method.ALLOCATE, UDP).encode(b"guessed" if signed else None)
    for _ in range(1000):
        relay.client("192.0.2.66:5000").sends(forged)
    relay.sent()

    newcomer.allocates()


class Flood:
    """Unsigned Allocates from many hosts, in turn, at a steady rate."""

    def __init__(self, relay: Scenario, hosts: list[str], per_second: int) -> None:
        self._relay = relay
        self._clients = cycle([relay.client(f"{host}:6000") for host in hosts])
        self._per_second = per_second
        self._datagram = request(Method.ALLOCATE, UDP).encode()

    def goes_on(self, seconds: float) -> None:
        for _ in range(int(seconds * self._per_second)):
            next(self._clients).sends(self._datagram)
            self._relay.passes(1 / self._per_second)


def test_without_limits_everyone_is_answered() -> None:
    assert answers_to_a_flood(Scenario(), "192.0.2.10:5000") == 1000


def test_rates_can_be_changed_in_the_middle_of_a_flood() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=1)
    answers_to_a_flood(relay, "192.0.2.10:5000")

    relay.changes_settings(unauthenticated_rate_per_prefix=0)

    assert answers_to_a_flood(relay, "192.0.2.10:5000") == 1000


def test_what_the_total_forbids_does_not_count_against_a_network() -> None:
    relay = Scenario(unauthenticated_rate_per_prefix=8, unauthenticated_rate=1)
    answers_to_a_flood(relay, "203.0.113.10:5000")
    answers_to_a_flood(relay, "192.0.2.10:5000")
    assert answers_to_a_flood(relay, "198.51.100.10:5000") == 0

    relay.changes_settings(unauthenticated_rate=0)

    assert answers_to_a_flood(relay, "198.51.100.10:5000") == 8 * BURST + 1


# --- What is counted -------------------------------------------------------------------------


def test_responses_are_counted_by_method_and_code() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    alice.refreshes()
    alice.refreshes(lifetime=0)
    alice.refreshes()
    alice.hears(BINDING)
    alice.hears(request(0x0FF).encode())

    assert relay.server.responses == {
        ("allocate", "401"): 1,
        ("allocate", "success"): 1,
        ("refresh", "success"): 2,
        ("refresh", "437"): 1,
        ("binding", "success"): 1,
        ("unknown", "400"): 1,
    }


def test_failed_authentication_is_counted_and_logged_with_address_and_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay = Scenario()
    mallory = relay.client("[2001:db8::66]:5000")
    mallory.password = "wrong"
    mallory.asks(Method.ALLOCATE)

    assert relay.server.auth_failures == {AuthFailure.WRONG_CREDENTIALS: 1}
    (record,) = caplog.records
    assert record.getMessage() == (
        "authentication failed for [2001:db8::66]:5000: unknown user or wrong password"
    )
    assert (record.levelname, record.name) == ("WARNING", "relay.turn")
    assert record.__dict__["client"] == "2001:db8::66"
    assert record.__dict__["reason"] == "unknown user or wrong password"


def test_expired_credentials_are_a_failure_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    relay = Scenario()
    late = relay.client("192.0.2.10:5000")
    late.username, late.password = mint(int(UNIX_START) - 1, "late", SECRET)
    late.asks(Method.ALLOCATE)

    assert relay.server.auth_failures == {AuthFailure.EXPIRED_CREDENTIALS: 1}
    (record,) = caplog.records
    assert record.getMessage().endswith(":5000: credentials have expired")


def test_an_address_that_may_be_forged_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    """A nonce that was not sent there proves nothing: somebody else could get it banned."""
    relay = Scenario()
    other = relay.client("192.0.2.11:5000")
    forged = relay.client("192.0.2.10:5000")
    forged.password = "wrong"
    forged._nonce = other.nonce
    forged.sends(forged.signed(Method.ALLOCATE))

    assert relay.server.auth_failures == {AuthFailure.STALE_NONCE: 1}
    assert caplog.records == []


def test_a_client_that_asks_for_its_first_nonce_has_not_failed() -> None:
    relay = Scenario()
    relay.client("192.0.2.10:5000").allocates()

    assert relay.server.auth_failures == {}


# --- Rules that change -----------------------------------------------------------------------


def test_a_peer_that_is_denied_is_cut_off_at_once_in_both_directions() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    bob, carol = relay.peer("198.51.100.7:9000"), relay.peer("198.51.100.8:9000")
    alice.binds(0x4001, bob).binds(0x4002, carol)

    relay.changes_peers(deny=["198.51.100.7/32"])
    for number in (0x4001, 0x4002):
        alice.sends_data(number, b"ping")
    bob.sends(b"pong", to=alice.relayed_address)
    carol.sends(b"pong", to=alice.relayed_address)

    assert relay.sent() == [
        relayed(alice, carol, b"ping"),
        to(alice, channel_data(0x4002, b"pong")),
    ]
    assert alice.tries_to_bind(0x4001, bob).code == 403


def test_many_channels_are_checked_some_at_a_time() -> None:
    relay = Scenario()
    bob = relay.peer("198.51.100.7:9000")
    clients = [relay.client(f"192.0.2.10:{port}").allocates() for port in range(5000, 5600)]
    for client in clients:
        client.binds(0x4001, bob)

    relay.changes_peers(deny=["198.51.100.7/32"])

    assert 600 - CHECKED_AT_ONCE <= relay.server.channels < 600
    relay.passes(seconds=0)
    assert relay.server.channels == 0


def test_many_channels_of_one_allocation_are_checked_some_at_a_time() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    for number in range(700):
        alice.binds(0x4000 + number, ("198.51.100.7", 9000 + number))
        relay.passes(1 / CLIENT_RATE)

    relay.changes_peers(deny=["198.51.100.7/32"])

    assert 700 - CHECKED_AT_ONCE <= relay.server.channels < 700
    alice.refreshes(lifetime=0)
    relay.passes(seconds=0)
    assert relay.server.channels == 0


def test_a_peer_that_is_allowed_again_can_be_bound_again() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)
    relay.changes_peers(deny=["198.51.100.7/32"])
    relay.changes_peers()

    alice.binds(0x4001, bob)
    alice.sends_data(0x4001, b"ping")

    assert relay.sent() == [relayed(alice, bob, b"ping")]


def test_a_cut_channel_is_gone_after_its_cooling() -> None:
    relay = Scenario()
    alice = relay.client("192.0.2.10:5000").allocates(lifetime=3600)
    alice.binds(0x4001, relay.peer("198.51.100.7:9000"))
    relay.changes_peers(deny=["198.51.100.7/32"])

    relay.passes(seconds=301)

    alice.binds(0x4001, relay.peer("198.51.100.9:9000"))


def test_rules_about_the_own_host_decide_whether_a_channel_reaches_outside() -> None:
    relay = Scenario(allow_peers=())
    alice = relay.client("203.0.113.10:5000").allocates()
    bob = relay.client("203.0.113.11:5000").allocates()
    port = relay.peer(f"{bob.relayed_address[0]}:{bob.relayed_address[1]}")
    alice.binds(0x4001, port)
    bob.refreshes(lifetime=0)

    alice.sends_data(0x4001, b"nobody")
    assert relay.dropped() == {"peer_is_gone": 1}

    relay.changes_peers(allow=["192.0.2.1/32"])
    alice.sends_data(0x4001, b"outside")
    assert relay.sent() == [relayed(alice, port, b"outside")]


def answers_to_a_flood(relay: Scenario, address: str) -> int:
    """How many of 1,000 Binding requests at one moment are answered."""
    before = relay.sent()
    client = relay.client(address)
    for _ in range(1000):
        client.sends(BINDING)
    sent = relay.sent()
    relay.network.sent = before
    assert all(isinstance(one, ToClient) for one in sent)
    return len(sent)


def tries_to_allocate(client: Client) -> Answer:
    return client.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
