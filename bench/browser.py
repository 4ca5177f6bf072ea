"""How long a browser takes until ICE is connected through this relay, and through coturn.

Run it as root with ``python -m bench.browser``; ``--rounds`` says how often, ``--browser`` which
one. A page in a network namespace connects to itself, with relayed candidates only at both ends, to
each server in turns: A B, B A, … A round gives a ratio; the result is the median, with the smallest
and the largest. The time is from the first offer, with allocations and candidates, until both ends
are connected.
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

from bench.loadlib.netns import RELAY_HOST
from bench.loadlib.servers import Server, running
from bench.versus import alternating
from tests.interop.browser import PROGRAMS, WEB, Browser
from tests.interop.needs import needs_packages
from tests.interop.network import small_network

ROUNDS: Final = 15
COMPARED: Final = ("relay", "coturn")


def main(arguments: list[str] | None = None) -> int:
    """Connect again and again, and print how long it took; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.browser", description="Takes root.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--browser", choices=PROGRAMS, default="chromium")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.error("network namespaces take root: run it with sudo")
    needs_packages(WEB)
    cpu = max(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(small_network())
        servers = {
            name: stack.enter_context(running(name, network, cpu, folder)) for name in COMPARED
        }
        profile = folder / "browser"
        browser = stack.enter_context(Browser(options.browser, network.clients, profile))
        for name in COMPARED:  # what is done but once
            milliseconds(browser, servers[name])
        took: dict[str, list[float]] = {name: [] for name in COMPARED}
        for name in alternating(COMPARED, options.rounds):
            took[name].append(milliseconds(browser, servers[name]))
    ratios = [ours / theirs for ours, theirs in zip(*took.values(), strict=True)]
    print(f"until ICE is connected, in {options.browser}, {options.rounds} rounds:")
    for name, numbers in took.items():
        print(f"  {name:8} {median(numbers):6.0f} ms ({min(numbers):.0f} to {max(numbers):.0f})")
    print(f"  ratio    {median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


def milliseconds(browser: Browser, server: Server) -> float:
    """Connect two ends in one page, and return how long that took."""
    host, port = server.address
    assert host == RELAY_HOST
    ice_server = {
        "urls": f"turn:{host}:{port}?transport=udp",
        "username": server.credentials.username,
        "credential": server.credentials.password,
    }
    took: float = browser.call("timeConnecting", ice_server)
    return took


if __name__ == "__main__":
    sys.exit(main())
