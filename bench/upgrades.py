"""What an upgrade costs those who call: what is missed, and how long a flow stands still.

Run it with ``python -m bench.upgrades``. Clients relay at a steady rate, both ways, while many
others hold allocations, refresh them, come and go. The first row is the same without an upgrade:
what this machine does to a flow by itself. Then the relay is upgraded again and again.

A gap is the time between two arrivals of one flow, the longest of all flows. Client, peers and
both processes share the machine; a successor takes a second of a CPU to start.
"""

import argparse
import signal
import time
from collections.abc import Callable

from tests.process import RelayProcess, free_port
from tests.steady import Outcome, Steady

UNLIMITED = (
    "--max-allocations-per-username=0",
    "--max-allocations-per-ip=0",
    "--unauthenticated-rate=0",
    "--unauthenticated-rate-per-prefix=0",
    "--drain-timeout=0",
)
BETWEEN = 1.0  # seconds from one upgrade to the next


def main() -> None:
    """Print a row for each kind of interruption."""
    parser = argparse.ArgumentParser(description="What does an upgrade cost those who call?")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--rate", type=int, default=250, help="datagrams per second, each way")
    parser.add_argument("--idle", type=int, default=2000, help="allocations beside the calls")
    parser.add_argument("--requests", type=int, default=100, help="per second, by the others")
    parser.add_argument("--upgrades", type=int, default=10)
    parser.add_argument("option", nargs="*", help="of the relay, after --")
    arguments = parser.parse_args()
    print(
        f"{'':16}{'sent':>9}{'lost':>7}{'twice or late':>15}{'unanswered':>12}{'refused':>9}"
        f"{'longest gap':>14}{'allocations left':>18}"
    )
    with RelayProcess(*UNLIMITED, *arguments.option, port=free_port()) as relay:
        steady = Steady(
            ("127.0.0.1", relay.port),
            relay.username,
            relay.password,
            calls=arguments.calls,
            rate=arguments.rate,
            idle=arguments.idle,
            requests=arguments.requests,
        )
        end = time.monotonic() + 5 * BETWEEN
        show("nothing", steady.runs(lambda: time.monotonic() > end), steady.everyone_refreshes())
        steady.forgets_delays()
        outcome = steady.runs(upgrading(relay, arguments.upgrades))
        left = steady.everyone_refreshes()
        show(f"{arguments.upgrades} upgrades", outcome, left)
        steady.close()
        lines = [line for line in relay.errors().splitlines() if "replaced by" in line]
        took = [int(line.rpartition("took ")[2].split()[0]) for line in lines]
        print(f"\nnobody read for: {', '.join(f'{each} ms' for each in took)}")


def upgrading(relay: RelayProcess, times: int) -> Callable[[], bool]:
    """Return what upgrades a relay so many times, and then is true."""
    begun, next_at = 0, time.monotonic() + BETWEEN

    def is_over() -> bool:
        nonlocal begun, next_at
        now = time.monotonic()
        if now < next_at:
            return False
        if relay.errors().count("replaced by") < begun:
            next_at = now + BETWEEN / 10
            return False
        if begun == times:
            return True
        begun += 1
        relay.signals(signal.SIGUSR2)
        next_at = now + BETWEEN
        return False

    return is_over


def show(name: str, outcome: Outcome, left: int) -> None:
    """Print a row."""
    print(
        f"{name:16}{outcome.sent:9,}{outcome.lost:7}{outcome.odd:15}{outcome.unanswered:12}"
        f"{sum(outcome.refused.values()):9}{1000 * outcome.longest_gap:11.0f} ms{left:18,}",
        flush=True,
    )


if __name__ == "__main__":
    main()
