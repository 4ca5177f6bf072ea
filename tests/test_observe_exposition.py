"""The metrics, from what the relay says of itself to what Prometheus reads."""

import platform
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from relay.observe.counters import Connections, Counters, InKernel, Relayed
from relay.observe.exposition import STUCK_AFTER, RelayCollector
from tests.probes import QUIET

Samples = dict[tuple[str, str], float]  # by name, and the value of its label or labels


class Relay:
    """A relay that is whatever the test says."""

    def __init__(self) -> None:
        self.counters = Counters(known_drops=("unbound_peer", "send_eagain"))
        self.status = replace(QUIET, counters=self.counters, auth_failures={"stale_nonce": 0})
        self._registry = CollectorRegistry()
        self._registry.register(RelayCollector(lambda: self.status, version="1.2.3"))

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def scrape(self) -> Samples:
        return samples(self.text())


def samples(text: str) -> Samples:
    found = [one for family in text_string_to_metric_families(text) for one in family.samples]
    by_key = {(one.name, ",".join(one.labels.values())): one.value for one in found}
    assert len(by_key) == len(found)
    return by_key


@pytest.fixture
def relay() -> Relay:
    return Relay()


# --- State ----------------------------------------------------------------------------------


def test_state_of_the_relay_is_exported(relay: Relay) -> None:
    relay.status = replace(
        relay.status, allocations=3, channels=5, permissions=7, loop_lag=0.25, slow_iterations=4
    )
    relay.counters.bugs = 2

    found = relay.scrape()

    assert found["relay_allocations", ""] == 3
    assert found["relay_channels", ""] == 5
    assert found["relay_permissions", ""] == 7
    assert found["relay_loop_lag_seconds", ""] == 0.25
    assert found["relay_bugs_total", ""] == 2
    assert found["relay_loop_slow_turns_total", ""] == 4
    assert found["relay_build_info", f"{platform.python_version()},1.2.3"] == 1


@pytest.mark.parametrize(
    ("not_ready", "stuck_for", "ready"),
    [
        pytest.param(None, STUCK_AFTER, 1, id="ready, with a long iteration"),
        pytest.param("draining", 0.0, 0, id="draining"),
        pytest.param(None, STUCK_AFTER + 1, 0, id="stuck"),
    ],
)
def test_relay_that_is_not_ready_or_stuck_says_so(
    relay: Relay, not_ready: str | None, stuck_for: float, ready: int
) -> None:
    relay.status = replace(relay.status, not_ready=not_ready, stuck_for=stuck_for)

    assert relay.scrape()["relay_ready", ""] == ready


def test_iteration_that_does_not_end_counts_as_lag(relay: Relay) -> None:
    relay.status = replace(relay.status, loop_lag=0.001, stuck_for=7.5)

    assert relay.scrape()["relay_loop_lag_seconds", ""] == 7.5


@pytest.mark.parametrize(("connected", "value"), [(True, 1), (False, 0)])
def test_portal_is_exported(relay: Relay, connected: bool, value: int) -> None:
    relay.status = replace(relay.status, portal_connected=connected, portal_reconnects=4)

    found = relay.scrape()

    assert found["relay_portal_connected", ""] == value
    assert found["relay_portal_reconnects_total", ""] == 4


def test_relay_without_a_portal_has_no_metrics_of_one(relay: Relay) -> None:
    """A 0 would raise an alarm."""
    assert not any("portal" in name for name, _ in relay.scrape())


# --- Requests -------------------------------------------------------------------------------


def test_responses_are_exported_by_method_and_code(relay: Relay) -> None:
    responses = {("allocate", "success"): 2, ("allocate", "401"): 3, ("unknown", "400"): 1}
    relay.status = replace(relay.status, responses=responses)

    found = relay.scrape()

    assert found["relay_responses_total", "success,allocate"] == 2
    assert found["relay_responses_total", "401,allocate"] == 3
    assert found["relay_responses_total", "400,unknown"] == 1


def test_reasons_are_exported_before_and_when_they_are_counted(relay: Relay) -> None:
    """A rate needs the 0 to start from. Other reasons appear when they first occur."""
    before = relay.scrape()
    relay.counters.dropped["send_eagain"] += 2
    relay.counters.lost("send_enobufs")
    relay.status = replace(relay.status, auth_failures={"stale_nonce": 7})
    after = relay.scrape()

    assert before["relay_dropped_packets_total", "unbound_peer"] == 0
    assert before["relay_dropped_packets_total", "send_eagain"] == 0
    assert ("relay_dropped_packets_total", "send_enobufs") not in before
    assert before["relay_auth_failures_total", "stale_nonce"] == 0
    assert after["relay_dropped_packets_total", "unbound_peer"] == 0
    assert after["relay_dropped_packets_total", "send_eagain"] == 2
    assert after["relay_dropped_packets_total", "send_enobufs"] == 1
    assert after["relay_auth_failures_total", "stale_nonce"] == 7


# --- Data -----------------------------------------------------------------------------------


def test_relayed_datagrams_and_bytes_are_exported_by_direction(relay: Relay) -> None:
    relay.counters.to_peer.update({100: 3, 0: 1})
    relay.counters.to_client.update({1300: 2})

    found = relay.scrape()

    assert found["relay_relayed_packets_total", "sockets,client_to_peer,udp"] == 4
    assert found["relay_relayed_bytes_total", "sockets,client_to_peer,udp"] == 300
    assert found["relay_relayed_packets_total", "sockets,peer_to_client,udp"] == 2
    assert found["relay_relayed_bytes_total", "sockets,peer_to_client,udp"] == 2600


def test_sizes_of_both_directions_are_one_histogram(relay: Relay) -> None:
    relay.counters.to_peer.update({0: 1, 64: 1, 65: 1, 65507: 1})
    relay.counters.to_client.update({64: 2, 1500: 1, 1501: 1})

    found = relay.scrape()

    assert buckets(found, "relay_packet_size_bytes") == [4, 5, 5, 5, 5, 5, 6, 8]
    assert found["relay_packet_size_bytes_count", "sockets,udp"] == 8
    assert found["relay_packet_size_bytes_sum", "sockets,udp"] == 65507 + 1501 + 1500 + 65 + 3 * 64


def test_batches_and_single_datagrams_are_one_histogram(relay: Relay) -> None:
    relay.counters.to_peer.update({100: 16})
    relay.counters.to_client.update({100: 70})
    relay.counters.batches.update({2: 1, 5: 2, 64: 1})

    found = relay.scrape()

    assert buckets(found, "relay_train_length") == [10, 11, 11, 13, 13, 13, 14, 14]
    assert found["relay_train_length_count", ""] == 14
    assert found["relay_train_length_sum", ""] == 86
    assert relay.counters.batches == {2: 1, 5: 2, 64: 1}  # what counts is not touched


def test_no_counter_falls_if_a_batch_is_counted_before_its_datagrams(relay: Relay) -> None:
    """Prometheus would take it for a restart, and add all of it once more."""
    relay.counters.to_peer[100] = 10
    before = relay.scrape()
    relay.counters.batches[4] = 1
    after = relay.scrape()

    assert before["relay_train_length_bucket", "1.0"] == 10
    assert after["relay_train_length_bucket", "1.0"] == 10


def test_what_the_kernel_relays_is_told_apart(relay: Relay) -> None:
    """In the same classes, so that the sum of both is what the relay does."""
    relay.counters.to_peer.update({64: 1, 1501: 1})
    nothing = [Relayed(0, 0)] * 7
    relay.status = replace(
        relay.status,
        in_kernel=InKernel(
            devices={"eth0": "native", "eth1": "no"},
            routes=4,
            failures={"map_full": 2, "other": 0},
            to_peer=[Relayed(2, 100), *nothing],
            to_client=[*nothing, Relayed(1, 2000)],
        ),
    )

    found = relay.scrape()

    assert found["relay_relayed_packets_total", "sockets,client_to_peer,udp"] == 2
    assert found["relay_relayed_packets_total", "xdp,client_to_peer,udp"] == 2
    assert found["relay_relayed_bytes_total", "xdp,client_to_peer,udp"] == 100
    assert found["relay_relayed_packets_total", "xdp,peer_to_client,udp"] == 1
    assert found["relay_relayed_bytes_total", "xdp,peer_to_client,udp"] == 2000
    sizes = buckets(found, "relay_packet_size_bytes")
    assert sizes == [1, 1, 1, 1, 1, 1, 1, 2, *[2] * 7, 3]
    assert found["relay_packet_size_bytes_sum", "xdp,udp"] == 2100
    assert found["relay_train_length_count", ""] == 2  # the kernel hands nothing to itself
    assert found["relay_xdp_attached", "eth0,native"] == 1
    assert found["relay_xdp_attached", "eth1,no"] == 0
    assert found["relay_xdp_routes", ""] == 4
    assert found["relay_xdp_failures_total", "map_full"] == 2


def test_without_a_data_path_in_the_kernel_there_are_no_metrics_of_it(relay: Relay) -> None:
    assert "xdp" not in relay.text()


def test_what_another_thread_counts_meanwhile_is_consistent(relay: Relay) -> None:
    """The reactor goes on: with sizes that were not there before, and without any lock."""
    counters, stopping = relay.counters, threading.Event()

    def relays() -> None:
        size = 0
        while not stopping.is_set():
            size = (size + 1) % 1501
            counters.to_peer[size] += 1
            counters.to_client[size] += 1
            counters.dropped[f"reason {size % 100}"] += 1

    reactor = threading.Thread(target=relays)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reactor.start()
    try:
        scrapes = [relay.scrape() for _ in range(10)]
    finally:
        stopping.set()
        reactor.join()
        sys.setswitchinterval(usual)

    for before, after in pairwise(scrapes):
        assert [key for key in before if after[key] < before[key]] == []
    for found in scrapes:
        everything = found["relay_packet_size_bytes_bucket", "sockets,+Inf,udp"]
        assert found["relay_packet_size_bytes_bucket", "sockets,1500.0,udp"] == everything
        assert everything == (
            found["relay_relayed_packets_total", "sockets,client_to_peer,udp"]
            + found["relay_relayed_packets_total", "sockets,peer_to_client,udp"]
        )


def test_what_comes_over_connections_is_told_apart(relay: Relay) -> None:
    relay.counters.to_peer.update({100: 1})
    relay.counters.by_transport["tls"].to_peer.update({100: 2})
    relay.counters.by_transport["tcp"].to_client.update({10: 3})
    connections = Connections(
        open={"tcp": 1, "tls": 2},
        accepted={"tcp": 5, "tls": 6},
        ended={"idle": 4},
        queued=1000,
        certificate_expires=1.5e9,
    )
    relay.status = replace(relay.status, connections=connections)

    found = relay.scrape()

    assert found["relay_relayed_bytes_total", "sockets,client_to_peer,udp"] == 100
    assert found["relay_relayed_bytes_total", "sockets,client_to_peer,tls"] == 200
    assert found["relay_relayed_packets_total", "sockets,peer_to_client,tcp"] == 3
    assert found["relay_packet_size_bytes_count", "sockets,tcp"] == 3
    assert found["relay_connections", "tls"] == 2
    assert found["relay_connections_accepted_total", "tcp"] == 5
    assert found["relay_connections_ended_total", "idle"] == 4
    assert found["relay_connections_queued_bytes", ""] == 1000
    assert found["relay_tls_certificate_expiry_timestamp_seconds", ""] == 1.5e9


def test_without_connections_there_are_no_metrics_of_them(relay: Relay) -> None:
    text = relay.text()
    assert "relay_connections" not in text
    assert "tls" not in text
    assert "tcp" not in text


# --- The format -----------------------------------------------------------------------------


def test_nothing_is_labelled_by_what_a_client_chose(relay: Relay) -> None:
    families = list(text_string_to_metric_families(relay.text()))
    labels = {label for family in families for one in family.samples for label in one.labels}

    assert labels <= {
        *("method", "code", "direction", "datapath", "reason", "le", "version", "python"),
        *("device", "mode"),  # which the operator chose
        "transport",
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_no_complaint(relay: Relay) -> None:
    relay.status = replace(
        relay.status, portal_connected=True, responses={("binding", "success"): 1}
    )

    subprocess.run(
        ["promtool", "check", "metrics"], input=relay.text(), text=True, timeout=30, check=True
    )


def buckets(found: Samples, name: str) -> list[float]:
    return [value for (one, _), value in found.items() if one == f"{name}_bucket"]
