"""What a probe and a scraper ask the relay for, over HTTP."""

import http.client
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from relay.observe.counters import Counters
from relay.observe.exposition import Status
from tests.turnclient import TIMEOUT

# What a relay says of itself that has just started; with counters of one's own, use replace().
QUIET = Status(
    not_ready=None,
    stuck_for=0.0,
    loop_lag=0.0,
    slow_iterations=0,
    allocations=0,
    channels=0,
    permissions=0,
    portal_connected=None,
    portal_reconnects=0,
    responses={},
    auth_failures={},
    refused_peers={},
    overflows=0,
    counters=Counters(),
    in_kernel=None,
    connections=None,
)


def ask(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def scrape(port: int, host: str = "127.0.0.1") -> dict[Any, float]:
    """Return the value of each sample by name, with its labels' values if it has any."""
    _, text = ask(port, "/metrics", host)
    metrics: dict[Any, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = tuple(sample.labels[key] for key in sorted(sample.labels, reverse=True))
            metrics[(sample.name, *labels) if labels else sample.name] = sample.value
    return metrics
