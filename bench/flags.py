"""What does an option cost? Relays that differ in it take turns, on loopback.

Run it with ``python -m bench.flags --copy-tos=off --copy-tos=auto --copy-tos=on``: a relay for each
flag, of which the first is what the others are compared with. It prints the CPU time of the relay
per relayed datagram, as schedstat has it, and its ratio to the first one's: the medians of all
rounds. A round is a thousand datagrams in each direction through each relay. Two processes that
are told the same can differ by a tenth, so they are started anew a number of times. All share one
CPU, or the cost of waking another one, which is none of theirs, would be most of it.

``--ipv6`` and ``--burst N`` say how they come: so many of them, then as many back. ``--tos OCTET``
is their DSCP and ECN.
"""

import argparse
import os
import socket
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from relay.stun.const import Family
from relay.turn.channeldata import HEADER
from tests.process import RelayProcess, free_port
from tests.turnclient import TIMEOUT, TurnClient

NUMBER: Final = 0x4000
PAYLOAD: Final = bytes(160)
FRAME: Final = HEADER.pack(NUMBER, len(PAYLOAD)) + PAYLOAD
DATAGRAMS: Final = 1000  # per round, relay and direction


def main() -> None:
    """Measure as the command line says, and print what came out."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options] --FLAG=VALUE --FLAG=OTHER ...")
    parser.add_argument("--ipv6", action="store_true")
    parser.add_argument("--burst", type=int, default=1, metavar="N")
    parser.add_argument("--tos", type=lambda text: int(text, 0), default=0, metavar="OCTET")
    parser.add_argument("--starts", type=int, default=20, metavar="N")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="after each start")
    options, flags = parser.parse_known_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # and all that it starts
    costs: dict[str, list[float]] = {flag: [] for flag in flags}
    for _ in range(options.starts):
        with ExitStack() as stack:
            relays = {
                flag: Measured(flag, stack, ipv6=options.ipv6, burst=options.burst, tos=options.tos)
                for flag in flags
            }
            for number in range(options.rounds + 1):
                for flag in flags if number % 2 else reversed(flags):
                    cost = relays[flag].costs()
                    if number:  # the first round is to get warm
                        costs[flag].append(cost)
    for flag in flags:
        ratios = [here / there for here, there in zip(costs[flag], costs[flags[0]], strict=True)]
        microseconds = 1e6 * statistics.median(costs[flag])
        print(f"{flag:24} {microseconds:6.2f} µs, ratio {statistics.median(ratios):.3f}")


class Measured:
    """A relay with one flag, a client and its peer."""

    def __init__(self, flag: str, stack: ExitStack, *, ipv6: bool, burst: int, tos: int) -> None:
        host = "::1" if ipv6 else "127.0.0.1"
        self._burst = burst
        relay = stack.enter_context(RelayProcess(flag, port=free_port()))
        self._tasks = Path(f"/proc/{relay.process.pid}/task")
        client = stack.enter_context(TurnClient((host, relay.port), relay.username, relay.password))
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self._peer = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        self._peer.bind((host, 0))
        self._peer.settimeout(TIMEOUT)
        self._peer.connect(client.allocates(Family.IPV6 if ipv6 else Family.IPV4))
        client.binds(NUMBER, self._peer.getsockname()[:2])
        self._client = client.socket
        for sock in (self._client, self._peer):
            if ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
            else:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)

    def costs(self) -> float:
        """Relay a thousand each way; return the CPU time per datagram, in seconds."""
        before = self._cpu_time()
        for _ in range(DATAGRAMS // self._burst):
            for sender, datagram, receiver in (
                (self._client, FRAME, self._peer),
                (self._peer, PAYLOAD, self._client),
            ):
                for _ in range(self._burst):
                    sender.send(datagram)
                for _ in range(self._burst):
                    receiver.recv(2048)
        relayed = 2 * (DATAGRAMS // self._burst) * self._burst
        return (self._cpu_time() - before) / relayed

    def _cpu_time(self) -> float:
        """Return that of all threads, in seconds. Documentation/scheduler/sched-stats.rst."""
        nanoseconds = 0
        for task in self._tasks.iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9


if __name__ == "__main__":
    main()
