"""What does somebody cost who looks at the status page? One relay, watched in every other span.

Run it with ``python -m bench.statuspage``. A client sends to its peer, one datagram at a time, for
spans of ten seconds. In every other one ``/status.json`` is fetched every two seconds, as the page
does, by a process of its own. It prints, as ratios of the watched spans to the others: the relay's
CPU time per relayed datagram, all of its threads together, as schedstat has it; and the way through
it, median and 99th percentile. Each span is compared with the one before it. The relay has a CPU
of its own, and so has who measures; where something else runs too, a few per cent are noise. What
is not is the last line: the CPU time that the thread for HTTP takes for it.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Self

from relay.turn.channeldata import HEADER
from tests.process import RelayProcess, free_port, free_tcp_port
from tests.turnclient import TIMEOUT, TurnClient

NUMBER: Final = 0x4000
PAYLOAD: Final = bytes(160)
FRAME: Final = HEADER.pack(NUMBER, len(PAYLOAD)) + PAYLOAD
MEASURES: Final = ("CPU per datagram", "latency, median", "latency, p99")

WATCHER: Final = """
import http.client, sys, time
while True:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", "/status.json")
    assert connection.getresponse().read()
    connection.close()
    time.sleep(float(sys.argv[2]))
"""


def main() -> None:
    """Measure as the command line says, and print what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spans", type=int, default=20, metavar="N", help="of each kind")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each span")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="between fetches")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})  # and all that it starts
    http = free_tcp_port()
    with RelayProcess(f"--http-addr=127.0.0.1:{http}", port=free_port()) as relay:
        os.sched_setaffinity(0, {cpus[0]})
        with Flow(relay) as flow:
            flow.span(options.seconds / 5)  # to get warm
            ratios = [
                ratio(flow, http, options.seconds, options.every) for _ in range(options.spans)
            ]
    for name, found in zip(MEASURES, zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:18} x {middle:.3f} (quartiles {low:.3f} and {high:.3f})")
    print(f"the thread for HTTP: {1e3 * statistics.median(flow.http):.2f} ms per second")


def ratio(flow: "Flow", http: int, seconds: float, every: float) -> list[float]:
    """Return the measures of a watched span, over those of one before it that nobody watched."""
    alone = flow.span(seconds)
    watcher = subprocess.Popen([sys.executable, "-c", WATCHER, str(http), str(every)])
    try:
        before = flow.cpu_time("health")
        watched = flow.span(seconds)
        flow.http.append((flow.cpu_time("health") - before) / seconds)
        if watcher.poll() is not None:
            raise SystemExit("the watcher has ended: is /status.json there?")
    finally:
        watcher.kill()
        watcher.wait()
    return [there / here for here, there in zip(alone, watched, strict=True)]


class Flow:
    """A client that sends to its peer through the relay, one datagram at a time."""

    def __init__(self, relay: RelayProcess) -> None:
        self.http: list[float] = []  # CPU time per second of the thread for HTTP, while watched
        self._tasks = Path(f"/proc/{relay.pid}/task")
        self._client = TurnClient(("127.0.0.1", relay.port), relay.username, relay.password)
        self._peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        self._peer.bind(("127.0.0.1", 0))
        self._peer.settimeout(TIMEOUT)
        self._client.allocates()
        self._client.binds(NUMBER, self._peer.getsockname()[:2])
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.close()
        self._client.socket.close()

    def span(self, seconds: float) -> tuple[float, float, float]:
        """Send for so long; return CPU per datagram, median and p99 of the way, in seconds."""
        self._client.refreshes(lifetime=600)
        ways: list[float] = []
        send, receive, clock = self._client.socket.send, self._peer.recv, time.perf_counter
        before, ends = self.cpu_time(), clock() + seconds
        while (began := clock()) < ends:
            send(FRAME)
            receive(2048)
            ways.append(clock() - began)
        cost = (self.cpu_time() - before) / len(ways)
        ways.sort()
        return cost, ways[len(ways) // 2], ways[len(ways) * 99 // 100]

    def cpu_time(self, thread: str | None = None) -> float:
        """Return that of all threads, or of one, in seconds."""
        return sum(
            int((task / "schedstat").read_text().split()[0]) / 1e9
            for task in self._tasks.iterdir()
            if thread is None or (task / "comm").read_text().strip() == thread
        )


if __name__ == "__main__":
    main()
