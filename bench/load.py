"""How much a TURN server relays, how fast, and what a datagram costs it.

Run it with ``python -m bench.load SERVER …``; ``--help`` has the options. Each client is a
socket with an allocation and channels of its own; the peers are sockets here too, so one process
sees a datagram leave and arrive. It spins while it waits: give it a CPU that the server does not
use (``taskset -c 0``), and the server another one.

With ``--search`` it looks for the highest rate at which nothing is lost. Latency is one way, of
every datagram, from before the system call that sent it until after the one that received it. The
server's cost is CPU time, from schedstat, over the datagrams that arrived.
"""

import argparse
import json
import os
import resource
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.loadlib.clients import Credentials, LoadError
from bench.loadlib.process import resident_memory
from bench.loadlib.table import Progress, row, rows, search_rows
from bench.loadlib.tally import Result, search
from bench.loadlib.traffic import (
    MOST_CHANNELS,
    Direction,
    Framing,
    Load,
    Session,
    open_peers,
)
from relay.stun.address import Address, format_endpoint
from relay.turn.users import mint

DEFAULT_PORT: Final = 3478
CREDENTIAL_LIFETIME: Final = 86400  # seconds
SPARE_DESCRIPTORS: Final = 64
SEARCH_STARTS_AT: Final = 5000.0  # datagrams per second


def main(arguments: list[str] | None = None) -> int:
    """Put the load on the server and print what came of it; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        load = _load(options)
        credentials = _credentials(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        report = _run(options, load, credentials)
        if options.json and options.json != "-":
            Path(options.json).write_text(_as_json(report))
    except (LoadError, OSError) as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json == "-":
        print(_as_json(report), end="")
    return 0


def _run(options: argparse.Namespace, load: Load, credentials: Credentials) -> dict[str, Any]:
    """Load the server, print the table, and return the same as JSON has it. Raises LoadError."""
    server: Address = options.server
    pid: int | None = options.pid
    table = sys.stderr if options.json == "-" else sys.stdout
    allow_descriptors(options.clients + options.channels + SPARE_DESCRIPTORS)
    with ExitStack() as stack:
        peers = open_peers(options.peer_host or own_host(server), options.channels)
        for peer in peers:
            stack.enter_context(peer)
        memory = resident_memory(pid) if pid else 0
        session = stack.enter_context(
            Session(
                server,
                credentials,
                clients=options.clients,
                peers=peers,
                pid=pid,
                framing=Framing.INDICATIONS if options.indications else Framing.CHANNELS,
            )
        )
        report: dict[str, Any] = {
            "server": format_endpoint(*server),
            "clients": options.clients,
            "channels": options.channels,
            "load": {**asdict(load), "direction": load.direction.value},
            "allocates_per_second": options.clients / session.allocate_seconds,
        }
        print(row("allocates per second", f"{report['allocates_per_second']:,.0f}"), file=table)
        if pid:
            cost = session.set_up_cost.spent / options.clients / 1000
            report["allocation_cost"] = cost
            size = (resident_memory(pid) - memory) / options.clients
            report["allocation_memory"] = size
            what = "µs of the server's CPU, channels included"
            print(row("an allocation", f"{cost:,.0f} {what}"), file=table)
            print(row("", f"{size:,.0f} bytes of its memory"), file=table)
        progress = Progress()
        if options.search:
            steps: list[Result] = []

            def measure(rate: float) -> Result:
                steps.append(session.measure(load.at(rate), progress.show))
                return steps[-1]

            found = search(measure, start=load.rate or SEARCH_STARTS_AT, loss=options.loss)
            progress.clear()
            report["lossless"] = asdict(found)
            report["steps"] = [step.as_dict() for step in steps]
            print(*search_rows(steps, found), sep="\n", file=table)
        else:
            result = session.measure(load, progress.show)
            progress.clear()
            report["result"] = result.as_dict()
            print(*rows(result), sep="\n", file=table)
    return report


def own_host(server: Address) -> str:
    """Return the address of this machine that the server hears from. Raises LoadError."""
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(server)
        except OSError as error:
            raise LoadError(f"{format_endpoint(*server)}: {error.strerror}") from error
        host: str = probe.getsockname()[0]
        return host


def allow_descriptors(count: int) -> None:
    """Raise this process' limit to *count*. Raises LoadError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
    except (ValueError, OSError) as error:
        raise LoadError(f"{count} descriptors are needed, {hard} allowed (ulimit -Hn)") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load",
        description="Load a TURN server over UDP, and say what it relayed, lost and spent.",
    )
    parser.add_argument(
        "server",
        type=server_address,
        metavar="SERVER",
        help="host or host:port, port 3478 by default",
    )
    who = parser.add_argument_group("credentials (one of the two)")
    who.add_argument("--username", metavar="NAME", help="with --password")
    who.add_argument("--password", metavar="WORD", help="of that user; beware of ps")
    who.add_argument(
        "--secret-file", type=Path, metavar="FILE", help="mint one from this, as Firezone's portal"
    )
    what = parser.add_argument_group("load")
    what.add_argument("--clients", type=_count, default=1, metavar="N", help="default 1")
    what.add_argument(
        "--channels", type=_channels, default=1, metavar="M", help="of each client; default 1"
    )
    what.add_argument(
        "--payload", type=int, default=160, metavar="BYTES", help="of a datagram; default 160"
    )
    what.add_argument(
        "--rate",
        type=_rate,
        default=SEARCH_STARTS_AT,
        metavar="N",
        help="datagrams per second in all, or max: as fast as it goes; default 5000",
    )
    what.add_argument("--seconds", type=float, metavar="S", help="default 5; with --search 1 each")
    what.add_argument(
        "--direction",
        choices=[direction.value for direction in Direction],
        default=Direction.BOTH.value,
        help="up is client to peer, down is peer to client; default both, half of the rate each",
    )
    what.add_argument(
        "--burst", type=int, default=1, metavar="N", help="datagrams back to back; default 1"
    )
    what.add_argument(
        "--gso", action="store_true", help="send each burst in one system call (UDP_SEGMENT)"
    )
    what.add_argument(
        "--indications",
        action="store_true",
        help="send and receive Send and Data indications instead of ChannelData",
    )
    what.add_argument(
        "--peer-host", metavar="ADDR", help="where the peers are; default: as the server sees us"
    )
    how = parser.add_argument_group("measurement")
    how.add_argument("--search", action="store_true", help="look for the lossless rate from --rate")
    how.add_argument(
        "--loss", type=float, default=0.0, metavar="PART", help="what --search allows; default 0"
    )
    how.add_argument("--pid", type=_pid, metavar="PID", help="the server's process, if it is here")
    how.add_argument("--json", metavar="FILE", help="write all of it there; - is standard output")
    return parser


def _load(options: argparse.Namespace) -> Load:
    """Return what to send. Raises ValueError."""
    if options.search and options.rate is None:
        raise ValueError("--search begins at a rate, and max is none")
    if not 0 <= options.loss <= 1:
        raise ValueError("--loss is a part of what is sent, 0 to 1")
    seconds = options.seconds if options.seconds is not None else 1.0 if options.search else 5.0
    return Load(
        payload=options.payload,
        rate=options.rate,
        seconds=seconds,
        direction=Direction(options.direction),
        burst=options.burst,
        gso=options.gso,
    )


def _credentials(options: argparse.Namespace) -> Credentials:
    """Return the one that was given or can be minted. Raises ValueError and OSError."""
    is_user = options.username is not None and options.password is not None
    if options.secret_file is not None and options.username is None and options.password is None:
        secret = options.secret_file.read_text().strip()
        expiry = int(time.time()) + CREDENTIAL_LIFETIME
        return Credentials(*mint(expiry, os.urandom(8).hex(), secret))
    if is_user and options.secret_file is None:
        return Credentials(options.username, options.password)
    raise ValueError("give --username and --password, or --secret-file")


def server_address(text: str) -> Address:
    """Return what ``host``, ``host:port`` or ``[host]:port`` names."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:  # no port, perhaps IPv6
        host, port = text, ""
    try:
        found = socket.getaddrinfo(host, int(port or DEFAULT_PORT), type=socket.SOCK_DGRAM)
    except (OSError, ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    address: Address = found[0][4][:2]  # type: ignore[assignment]
    return address


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _channels(text: str) -> int:
    number = _count(text)
    if number > MOST_CHANNELS:
        raise argparse.ArgumentTypeError(f"at most {MOST_CHANNELS}")
    return number


def _rate(text: str) -> float | None:
    return None if text == "max" else float(text)


def _pid(text: str) -> int:
    number = int(text)
    try:
        resident_memory(number)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no such process: {text}") from error
    return number


def _as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
