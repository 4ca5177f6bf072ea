"""The real process under floods of every kind, while its memory, descriptors and log are watched.

Two pairs of a client and a peer talk through the relay meanwhile. What the flooders have under way
is bounded (see :mod:`tests.flood`), so no queue overflows: every datagram of the pairs has to
arrive, unchanged and in order. What leaks shows from one round of all floods to the next.
"""

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count, cycle
from pathlib import Path
from typing import IO, Any, Final, Self

import pytest

from relay.observe.logratelimit import INTERVAL, UNLIMITED
from relay.stun.const import Family
from relay.turn.users import mint
from tests.fakeportal import FakePortal
from tests.flood import FLOODS, NEVER, PORTS
from tests.probes import scrape
from tests.process import TIMEOUT, RelayProcess, Stopped, environment, free_port, free_tcp_port
from tests.turnclient import Peer, TurnClient

SOAK: Final = 30.0  # seconds, and the rest of a round
# Rounds, after which memory must not grow. By then some thousand allocations have come and gone,
# and what is remembered of the last ones (relay.turn.ended) has reached its bound, nearly.
WARM_UP: Final = 3
FEWEST_ROUNDS: Final = WARM_UP + 3
BETWEEN_DISTURBANCES: Final = 100  # exchanges of each pair
FEWEST_EXCHANGES: Final = 3 * BETWEEN_DISTURBANCES  # of each pair, in a round
# What the arenas of CPython and the C library may still grow by: measured were 0.2 MiB. It takes
# 20 bytes for each datagram of a flood, or 400 for each allocation, to exceed it in three rounds.
MOST_GROWTH: Final = 1 << 20  # bytes
MOST_LINES: Final = 200  # in the log, per interval of its rate limit

HELD: Final = PORTS[::4]  # by others, in IPv4
ALLOCATIONS: Final = 2 * (1 + len(FLOODS))  # those of the pairs and of each flooder

RATE: Final = "unauthenticated-rate-per-prefix = 200\nrefused-peers = error\n"
CONFIGURATIONS: Final = ("deny-peer = everybody\n", RATE, f"{RATE}deny-peer = 127.0.0.2/32\n")
WRONG_RELOAD: Final = "not reloaded, all stays as it was: deny-peer 'everybody'"

# What the floods must have come to, or they were none.
CODES: Final = {"success", "400", "401", "403", "420", "437", "438", "443", "508"}
DROPS: Final = {
    "malformed_channel_data",
    "malformed_stun",
    "not_a_request",
    "oversized_stun",
    "unauthenticated_rate_per_prefix",
    "unbound_channel",
    "unbound_peer",
    "unknown_protocol",
    "wrong_fingerprint",
} | ({"source_port_zero"} if os.geteuid() == 0 else set())


@pytest.mark.slow
def test_floods_of_every_kind_leave_nothing_behind(tmp_path: Path) -> None:
    host = ".".join(map(str, ("127", *random.choices(range(100, 200), k=3))))  # nobody else's
    http, file = free_tcp_port(), tmp_path / "relay.conf"
    file.write_text(RATE)
    began = time.monotonic()
    with FakePortal() as portal:
        portal.serves()
        relay = RelayProcess(
            f"--config={file}",
            f"--api-url={portal.url}",
            f"--public-ip4-addr={host}",
            f"--http-addr=127.0.0.1:{http}",
            f"--lowest-port={PORTS[0]}",
            f"--highest-port={PORTS[-1]}",
            # The descriptors of an undumpable process are shown to root only.
            f"--harden={'auto' if os.geteuid() == 0 else 'off'}",
            # Only root can read the file again where pytest makes it.
            *(("--user=root",) if os.geteuid() == 0 else ()),
            port=free_port(),
            variables={"FIREZONE_TOKEN": "token"},
            portal=True,
        )
        with relay:
            relay.logs("relaying: listening on")
            memory, metrics = soak(relay, host, http, str(portal.stamp_secret), file)
            relay.signals(signal.SIGTERM)
            assert relay.wait() == 0
            lasted = time.monotonic() - began
        assert portal.joins == 1
        assert portal.heartbeats >= 2  # one is due every 10 s

    assert memory[-1] - memory[WARM_UP - 1] <= MOST_GROWTH, memory
    assert {name[2] for name in metrics if name[0] == "relay_responses_total"} >= CODES
    dropped = {name for name, value in metrics.items() if "dropped" in name[0] and value}
    assert {reason for _, reason in dropped} >= DROPS
    log = relay.errors().splitlines()
    assert any(WRONG_RELOAD in line for line in log)
    assert [line for line in log if "ERROR" in line and WRONG_RELOAD not in line] == []
    assert [line for line in log if "Traceback" in line or "draining" in line] == []
    by_others = [line for line in log if UNLIMITED not in line]  # than whoever sends the signals
    assert len(by_others) <= MOST_LINES * (1 + lasted / INTERVAL)


def soak(
    relay: RelayProcess, host: str, http: int, secret: str, file: Path
) -> tuple[list[int], dict[Any, float]]:
    """Play round after round. Return how much memory it had after each, and the last metrics."""
    memory: list[int] = []  # bytes
    metrics: dict[Any, float] = {}
    with ExitStack() as stack:
        pairs = [stack.enter_context(Pair(relay, at, secret)) for at in (host, "::1")]
        arguments = (host, relay.port, http, secret)
        flooders = [stack.enter_context(Flooder(kind, *arguments)) for kind in FLOODS]
        hold_ports(host, stack)
        disturbances = disturb(relay, file, pairs)
        descriptors = count_descriptors(relay)
        began = time.monotonic()
        while len(memory) < FEWEST_ROUNDS or time.monotonic() - began < SOAK:
            for flooder in flooders:
                flooder.begins()
            for exchanges in count():
                is_over = all(flooder.has_ended() for flooder in flooders)
                if is_over and exchanges >= FEWEST_EXCHANGES:
                    break
                for pair in pairs:
                    pair.exchanges()
                if exchanges % BETWEEN_DISTURBANCES == 0:
                    next(disturbances)

            for pair in pairs:
                pair.has_no_more()
            before, metrics = metrics, settled_metrics(http, pairs[0])
            fallen = [name for name in before if is_total(name) and metrics[name] < before[name]]
            assert fallen == []
            assert metrics["relay_channels"] == ALLOCATIONS  # one of each that stays
            assert metrics["relay_bugs_total"] == metrics["relay_portal_reconnects_total"] == 0
            assert metrics["relay_ready"] == metrics["relay_portal_connected"] == 1
            wait_for(lambda: count_descriptors(relay), descriptors)
            memory.append(resident_memory(relay))
    return memory, metrics


def disturb(relay: RelayProcess, file: Path, pairs: list["Pair"]) -> Iterator[None]:
    """Do one thing at a time that operators and schedulers do."""
    for configuration in cycle(CONFIGURATIONS):
        new = file.with_suffix(".new")
        new.write_text(configuration)
        new.replace(file)
        relay.signals(signal.SIGHUP)
        yield
        relay.signals(signal.SIGUSR1)
        yield
        with Stopped(relay):
            bursts = [pair.begins_burst() for pair in pairs]
        for pair, burst in zip(pairs, bursts, strict=True):
            pair.ends_burst(burst)
        yield


class Pair:
    """A client and its peer, who send each other numbered datagrams and miss none."""

    def __init__(self, relay: RelayProcess, host: str, secret: str) -> None:
        family = Family.IPV6 if ":" in host else Family.IPV4
        self._client = TurnClient((host, relay.port), *mint(NEVER, f"pair at {host}", secret))
        self._peer = Peer(family)
        self._relayed_address = self._client.allocates(family, lifetime=3600)
        self._client.binds(0x4000, self._peer.address)
        self._payloads = (f"{self._relayed_address} {number}".encode() for number in count())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._client, self._peer:
            self._client.refreshes(0)

    def exchanges(self) -> None:
        """Send one datagram there, and one back when it has arrived."""
        there, back = next(self._payloads), next(self._payloads)
        self._client.sends(0x4000, there)
        assert self._peer.receives() == (there, self._relayed_address)
        self._peer.sends(back, self._relayed_address)
        assert self._client.receives() == (0x4000, back)

    def begins_burst(self) -> list[bytes]:
        """Send 200 datagrams both ways at once."""
        burst = [next(self._payloads) for _ in range(200)]
        for payload in burst:
            self._client.sends(0x4000, payload)
            self._peer.sends(payload, self._relayed_address)
        return burst

    def ends_burst(self, burst: list[bytes]) -> None:
        assert [self._peer.receives()[0] for _ in burst] == burst
        assert [self._client.receives() for _ in burst] == [(0x4000, payload) for payload in burst]

    def has_no_more(self) -> None:
        """See that nothing has come twice, or was meant for somebody else."""
        for sock in (self._client.socket, self._peer.socket):
            assert select.select([sock], [], [], 0)[0] == []


class Flooder:
    """A process that plays the floods of one kind, round by round."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.flood", *map(str, arguments)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert pipe(self._process.stdout).readline() == b"ready\n"
        self._is_busy = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            pipe(self._process.stdin).close()

    def begins(self) -> None:
        self._is_busy = True
        pipe(self._process.stdin).write(b"\n")
        pipe(self._process.stdin).flush()

    def has_ended(self) -> bool:
        """Tell if the round is over, and the relay has read what belongs to it."""
        answers = pipe(self._process.stdout)
        if self._is_busy and select.select([answers], [], [], 0)[0]:
            assert answers.readline() == b"done\n"
            self._is_busy = False
        return not self._is_busy


def pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None
    return end


def hold_ports(host: str, stack: ExitStack) -> None:
    """Take ports that the relay may lend."""
    for port in HELD:
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with suppress(OSError):  # somebody else has it already
            sock.bind((host, port))


def settled_metrics(http: int, pair: Pair) -> dict[Any, float]:
    """Wait for the end of what must expire, and return metrics from after that."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        said = scrape(http)["relay_packet_size_bytes_count", "udp", "sockets"]
        pair.exchanges()
        # The same is said for a second: only with these datagrams it is what is now.
        while (metrics := scrape(http))["relay_packet_size_bytes_count", "udp", "sockets"] == said:
            pass
        if metrics["relay_allocations"] == ALLOCATIONS:
            return metrics
        assert time.monotonic() < deadline, metrics


def is_total(name: str | tuple[str, ...]) -> bool:
    """Tell a counter, which must not fall, from a gauge."""
    plain = name if isinstance(name, str) else name[0]
    return plain.endswith(("_total", "_count", "_sum", "_bucket"))


def wait_for(look: Callable[[], float], wanted: float) -> None:
    deadline = time.monotonic() + TIMEOUT
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"{seen} instead of {wanted}"


def count_descriptors(relay: RelayProcess) -> int:
    return len(list(Path(f"/proc/{relay.pid}/fd").iterdir()))


def resident_memory(relay: RelayProcess) -> int:
    """Return it in bytes."""
    pages = Path(f"/proc/{relay.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
