"""This relay and Debian's coturn under the same loads, compared.

Run it as root with ``python -m bench.versus``; ``--quick`` takes about two minutes, the whole of it
about twenty. It needs two CPUs that have nothing else to do: one is the servers',
the other the load client's. Three network namespaces stand for clients, relay and peers; they and
the servers are gone afterwards, also when it is interrupted.

With ``--xdp`` coturn, this relay by its sockets and this relay in the kernel are compared instead,
on veths that behave like cables (bench/loadlib/cables.py): there what it costs to receive counts,
too, for in the kernel there is nothing else. It takes about ten minutes.

The machine is never equally fast for long, so each load alternates between the servers:
A B, B A, … Each round gives a ratio; the result is the median with the smallest and the largest.
It writes RESULTS.md, results.json with all that was measured, and results.svg.
"""

import argparse
import itertools
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from bench.loadlib.cables import CabledNetwork
from bench.loadlib.clients import Clients, LoadError
from bench.loadlib.comparison import Comparison, Metric
from bench.loadlib.netns import PEER_HOST, Network, inside
from bench.loadlib.process import cpu_time, resident_memory
from bench.loadlib.report import write
from bench.loadlib.servers import IN_KERNEL, Server, running
from bench.loadlib.tally import CALM, SLOWEST, Lossless, Result, search
from bench.loadlib.traffic import Framing, Load, Session, open_peers

COMPARED: Final = ("relay", "coturn", "coturn, defaults")
DESCRIPTORS: Final = 65536  # for the servers too: each has a socket for each allocation
FORGETS_AFTER: Final = 3.0  # seconds: by then coturn has forgotten the ports of earlier clients
BURST: Final = 16  # datagrams
ALLOCATIONS: Final = "Allocations"
# In the search single datagrams come eight at a time: one by one, the load client would be the
# limit. Where cost and latency are measured they come one by one.
SINGLES_OF_SEARCH: Final = 8
STEP: Final = 0.3  # seconds of a step of the search
MOST_DISTURBED: Final = 3  # times that something is measured in vain
WORTH_A_NOTE: Final = 0.001  # part of the datagrams
PATIENCE: Final = 0.1  # seconds in which nothing comes: what is missing then is lost
STEADY: Final = 0.4  # seconds of a round at the fixed rate
SEARCH_STARTS_AT: Final = 20_000.0  # datagrams per second
# Cost and latency are measured where neither server has trouble, in datagrams per second.
STEADY_RATES: Final = {False: 10_000.0, True: 40_000.0}  # without GSO, with GSO


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    payloads: Sequence[int] = (60, 160, 1200)
    payloads_of_defaults: Sequence[int] = (160,)  # compared with coturn with Debian's defaults, too
    payloads_by_indications: Sequence[int] = (160, 1200)
    clients: Sequence[int] = (1, 10, 100, 1000)
    clients_by_indications: Sequence[int] = (1, 100)
    rounds: int = 3  # of the search for the lossless rate
    steady_rounds: int = 9  # at the fixed rate, and of Allocates
    allocations: int = 1000  # for Allocates per second
    held: Sequence[int] = (1000, 10_000)  # for memory per allocation


XDP: Final = Plan(payloads=(160, 1200), clients=(1, 100))
XDP_QUICK: Final = Plan(payloads=(1200,), clients=(10,), rounds=1, steady_rounds=5)
QUICK: Final = Plan(
    payloads=(160,),
    payloads_by_indications=(160,),
    clients=(10, 100),
    clients_by_indications=(10,),
    rounds=1,
    steady_rounds=5,
    held=(1000,),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, and write it to files; return the exit code."""
    options = _parser().parse_args(arguments)
    here = Path(__file__).parent
    folder_of_results = options.output or (here / "xdp" if options.xdp else here)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _check_machine()
        measured = Measured(notes=[XDP_NOTES if options.xdp else NOTES])
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            if options.xdp:
                _measure_kernel(XDP_QUICK if options.quick else XDP, Path(folder), measured)
            else:
                _measure(QUICK if options.quick else Plan(), Path(folder), measured)
        minutes = (time.monotonic() - began) / 60
        measured.notes.append(f"{measured.calm} All of it took {minutes:.0f} minutes.")
        write(folder_of_results, measured.tables, measured.raw, measured.notes)
    except (LoadError, OSError) as error:
        print(f"bench.versus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"written: {folder_of_results / 'RESULTS.md'}, results.json, results.svg")
    return 0


NOTES: Final = f"""\
The servers have one CPU, each alone at a time, and the load client another one. Coturn runs with
one relay thread and without what the relay lacks (TCP, TLS, RFC 5780), and, where a table says
so, with Debian's defaults: a relay thread per CPU of the machine, all of them on the same CPU
here. Half of the datagrams go to peers, half to clients. The lossless rate is searched in steps of
{STEP} s: nothing may be lost, and almost nothing under way at the end; there single datagrams come
{SINGLES_OF_SEARCH} at a time. CPU and latency are at {STEADY_RATES[False]:,.0f} single datagrams
per second, one by one, and at {STEADY_RATES[True]:,.0f} in bursts with GSO. An Allocate counts
with the challenge before it. Memory is the process' own (VmRSS), without the kernel's, and with a
channel for each allocation."""


XDP_NOTES: Final = f"""\
Channels only, on veths that behave like cables: frames arrive with whole checksums, and what the
program sends back is received. **No network card was measured.** For rate and CPU the devices of
the relay's host are served by kernel threads on the server's CPU (threaded NAPI), and **what these
take counts**, for all three alike: in the kernel there is nothing else. With a veth that includes a
copy of each frame, which a network card would not make, and its delivery at the other end. CPU is
at {STEADY_RATES[True]:,.0f} datagrams per second, single ones {SINGLES_OF_SEARCH} at a time. For
latency, at {STEADY_RATES[False]:,.0f} single datagrams per second and at {STEADY_RATES[True]:,.0f}
in bursts, the sender itself does the work of receiving, as veths have it: nobody is woken up in the
kernel. Bursts leave in single frames there: the sender has to segment them. The relay in the
kernel has networks of its own, so that its program is in nobody else's way."""


@dataclass(slots=True)
class Calm:
    """Measures again, a few times, what something else on the machine has disturbed."""

    measured: int = 0
    disturbed: int = 0  # of those that count

    def measure(self, session: Session, load: Load) -> Result:
        """Return the first calm result, else the last one. Raises LoadError."""
        self.measured += 1
        for _ in range(MOST_DISTURBED):
            result = session.measure(load)
            if not result.is_disturbed:
                return result
        self.disturbed += 1
        return result

    def __str__(self) -> str:
        return (
            f"In {self.disturbed} of {self.measured} measurements one of the two waited for its CPU"
            f" more than {CALM:.0%} of the time, each of {MOST_DISTURBED} times."
        )


@dataclass(slots=True)
class Measured:
    """What came out: comparisons by their table, and the raw results behind them."""

    tables: dict[str, list[Comparison]] = field(default_factory=dict)
    raw: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calm: Calm = field(default_factory=Calm)

    def add(self, table: str, *comparisons: Comparison) -> None:
        """Keep comparisons, and say on standard error how they went."""
        self.tables.setdefault(table, []).extend(comparisons)
        print(f"{table}, {comparisons[0].case}", file=sys.stderr)
        for comparison in comparisons:
            cell = comparison.cell().replace("**", "")
            print(f"  {comparison.metric.title:30} {cell}", file=sys.stderr)


def _measure(plan: Plan, folder: Path, measured: Measured) -> None:
    """Run all of the plan. Raises LoadError."""
    load_cpu, server_cpu = _cpus()
    os.sched_setaffinity(0, {load_cpu})
    with Network() as network, ExitStack() as stack:
        servers = [
            stack.enter_context(running(name, network, server_cpu, folder)) for name in COMPARED
        ]
        for gso, payload, clients in itertools.product((False, True), plan.payloads, plan.clients):
            compared = servers if payload in plan.payloads_of_defaults else servers[:2]
            _compare_relaying(compared, Shape(payload, clients, gso), plan, measured)
        for gso, payload, clients in itertools.product(
            (False, True), plan.payloads_by_indications, plan.clients_by_indications
        ):
            shape = Shape(payload, clients, gso, Framing.INDICATIONS)
            _compare_relaying(servers[:2], shape, plan, measured)
        _compare_allocating(servers, plan, measured)
        _compare_memory(network, server_cpu, folder, plan, measured)


def _measure_kernel(plan: Plan, folder: Path, measured: Measured) -> None:
    """Run the plan on cables: with the program in one network, and without in another."""
    load_cpu, server_cpu = _cpus()
    os.sched_setaffinity(0, {load_cpu})
    with ExitStack() as stack:
        servers: dict[bool, list[Server]] = {True: [], False: []}  # received by threads, or not
        for threaded, running_there in servers.items():
            for names in (("relay", "coturn"), (IN_KERNEL,)):
                network = stack.enter_context(
                    CabledNetwork(
                        f"{'threads' if threaded else 'direct'}-{len(names)}",
                        relay_cpu=server_cpu,
                        load_cpu=load_cpu,
                        threaded=threaded,
                    )
                )
                running_there += [
                    stack.enter_context(running(name, network, server_cpu, folder))
                    for name in names
                ]
        for gso, payload, clients in itertools.product((False, True), plan.payloads, plan.clients):
            shape = Shape(payload, clients, gso)
            _compare_relaying(servers[True], shape, plan, measured, timed=servers[False])


@dataclass(frozen=True, slots=True)
class Shape:
    """A load without its rate."""

    payload: int
    clients: int
    gso: bool
    framing: Framing = Framing.CHANNELS

    @property
    def table(self) -> str:
        """Which table it belongs to."""
        table = f"Bursts of {BURST} datagrams in one call (GSO)" if self.gso else "Single datagrams"
        return table if self.framing is Framing.CHANNELS else f"{table}, by indications"

    def __str__(self) -> str:
        many = "client" if self.clients == 1 else "clients"
        return f"{self.payload:,} bytes, {self.clients:,} {many}"

    @property
    def searched(self) -> Load:
        """The load of a step of the search."""
        burst = BURST if self.gso else SINGLES_OF_SEARCH
        return Load(self.payload, seconds=STEP, burst=burst, gso=self.gso)

    @property
    def busy(self) -> Load:
        """A load at which nothing has to be woken up for each datagram."""
        burst = BURST if self.gso else SINGLES_OF_SEARCH
        return Load(self.payload, STEADY_RATES[True], STEADY, burst=burst, gso=self.gso)

    @property
    def steady(self) -> Load:
        """The load at which cost and latency are measured."""
        burst = BURST if self.gso else 1
        rate = STEADY_RATES[self.gso]
        return Load(self.payload, rate, STEADY, burst=burst, gso=self.gso)


def _compare_relaying(
    servers: Sequence[Server],
    shape: Shape,
    plan: Plan,
    measured: Measured,
    *,
    timed: Sequence[Server] = (),
) -> None:
    """Put one shape of load on the servers, which alternate. Raises LoadError.

    Latency is that of *timed*, if these are given: the same servers, elsewhere.
    """
    rates: dict[str, list[Lossless]] = {server.name: [] for server in servers}
    steady: dict[str, list[Result]] = {server.name: [] for server in servers}
    times = {server.name: [] for server in timed} if timed else steady
    with ExitStack() as stack:
        sessions = {
            server.name: _enter_session(stack, server, shape.clients, shape.framing)
            for server in servers
        }
        for name in alternating(list(sessions), plan.rounds):
            rate = _search(sessions[name], shape.searched, rates[name], measured.calm)
            rates[name].append(rate)
        for name in alternating(list(sessions), plan.steady_rounds):
            load = shape.busy if timed else shape.steady
            steady[name].append(measured.calm.measure(sessions[name], load))
    with ExitStack() as stack:
        sessions = {
            server.name: _enter_session(stack, server, shape.clients, shape.framing)
            for server in timed
        }
        for name in alternating(list(sessions), plan.steady_rounds):
            times[name].append(measured.calm.measure(sessions[name], shape.steady))
    for name, found in rates.items():
        measured.raw.append(
            {
                "server": name,
                **asdict(shape),
                "framing": shape.framing.value,
                "lossless": [asdict(rate) for rate in found],
                "steady": [result.as_dict() for result in steady[name]],
                **({"timed": [result.as_dict() for result in times[name]]} if timed else {}),
            }
        )
        lost = max(result.loss for result in steady[name])
        if lost > WORTH_A_NOTE:
            measured.notes.append(
                f"At the fixed rate {name} lost up to {lost:.1%} ({shape.table}, {shape})."
            )
    for ours, rival in itertools.product(_ours(rates), _rivals(rates)):
        compare = partial(_compare, shape, ours, rival)
        measured.add(
            _title(ours, rival, shape.table),
            compare(Metric.RATE, rates, lambda rate: max(rate.rate, SLOWEST)),
            compare(Metric.COST, steady, lambda result: result.server_cost or 0.0),
            compare(Metric.P50, times, lambda result: _percentile(result, "p50")),
            compare(Metric.P99, times, lambda result: _percentile(result, "p99")),
        )


def _ours(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("relay")]


def _rivals(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("relay")]


def _title(ours: str, rival: str, table: str) -> str:
    """Return the title of a table, with the servers that are not the usual ones."""
    title = table if ours == "relay" else f"In the kernel: {table[0].lower()}{table[1:]}"
    return title if rival == "coturn" else f"{title}, compared with {rival}"


T = TypeVar("T", Lossless, Result)


def _compare(
    shape: Shape,
    ours_name: str,
    rival: str,
    metric: Metric,
    found: Mapping[str, Sequence[T]],
    number: Callable[[T], float],
) -> Comparison:
    """Return a comparison of that *number* of what a relay's and a rival's rounds have found."""
    ours: Sequence[T] = found[ours_name]
    theirs: Sequence[T] = found[rival]
    return Comparison(
        str(shape),
        metric,
        relay=[number(item) for item in ours],
        coturn=[number(item) for item in theirs],
        limited=any(item.limited_by_client for item in (*ours, *theirs)),
    )


def _percentile(result: Result, which: str) -> float:
    if result.latency is None:
        raise LoadError(f"nothing arrived at {result.wanted_rate:,.0f} datagrams per second")
    return result.latency.percentiles[which]


def _search(session: Session, load: Load, before: Sequence[Lossless], calm: Calm) -> Lossless:
    """Look for the lossless rate: in small steps around the one found *before*, if any."""
    return search(
        lambda rate: calm.measure(session, load.at(rate)),
        start=before[-1].rate if before else SEARCH_STARTS_AT,
        growth=1.25 if before else 2.0,
        tries=2,
    )


def _compare_allocating(servers: Sequence[Server], plan: Plan, measured: Measured) -> None:
    """Allocate for many clients at once, on servers that alternate. Raises LoadError."""
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    costs: dict[str, list[float]] = {server.name: [] for server in servers}
    by_name = {server.name: server for server in servers}
    for name in alternating(list(by_name), plan.steady_rounds):
        server = by_name[name]
        time.sleep(FORGETS_AFTER)
        with inside(server.network.clients):
            clients = Clients(server.address, server.credentials, plan.allocations)
        with clients:
            before = cpu_time(server.pid)
            rates[name].append(plan.allocations / clients.allocate())
            spent = (cpu_time(server.pid) - before).spent
            costs[name].append(spent / plan.allocations / 1000)
            clients.release()
    case = f"{plan.allocations:,} at once"
    measured.raw.append({"allocations": plan.allocations, "rates": rates, "costs": costs})
    for rival in _rivals(by_name):
        measured.add(
            _title("relay", rival, ALLOCATIONS),
            Comparison(case, Metric.ALLOCATES, rates["relay"], rates[rival]),
            Comparison(case, Metric.ALLOCATE_COST, costs["relay"], costs[rival]),
        )


def _compare_memory(
    network: Network, cpu: int, folder: Path, plan: Plan, measured: Measured
) -> None:
    """Hold allocations with a channel each, on servers that have just been started."""
    per_allocation: dict[str, dict[int, float]] = {}
    for name in ("relay", "coturn"):
        numbers = per_allocation[name] = {}
        with ExitStack() as stack:
            server = stack.enter_context(running(name, network, cpu, folder))
            _enter_session(stack, server, 1)  # whatever the first one takes
            empty, held = resident_memory(server.pid), 0
            for count in plan.held:
                _enter_session(stack, server, count - held)
                held = count
                numbers[count] = (resident_memory(server.pid) - empty) / count
    measured.raw.append({"memory": per_allocation})
    for count in plan.held:
        numbers_of = {name: [numbers[count]] for name, numbers in per_allocation.items()}
        measured.add(
            ALLOCATIONS,
            Comparison(f"{count:,} held", Metric.MEMORY, numbers_of["relay"], numbers_of["coturn"]),
        )


def _enter_session(
    stack: ExitStack,
    server: Server,
    clients: int,
    framing: Framing = Framing.CHANNELS,
) -> Session:
    """Return a session with one channel per client, which *stack* ends. Raises LoadError."""
    with inside(server.network.peers):
        peers = open_peers(PEER_HOST, 1)
    for peer in peers:
        stack.enter_context(peer)
    with inside(server.network.clients):
        session = Session(
            server.address,
            server.credentials,
            clients=clients,
            peers=peers,
            pid=server.pid,
            threads=server.network.threads,
            patience=PATIENCE,
            framing=framing,
        )
    return stack.enter_context(session)


def alternating(names: Sequence[str], rounds: int) -> Iterable[str]:
    """Return the names round by round, every other round backwards."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def _check_machine() -> None:
    """Raise LoadError if this cannot work here; allow as many descriptors as it takes."""
    if os.geteuid() != 0:
        raise LoadError("network namespaces take root: run it with sudo")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise LoadError(f"{program} is missing: apt-get install {package}")
    _cpus()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, max(hard, DESCRIPTORS)))
    except ValueError:  # root without CAP_SYS_RESOURCE, in a container
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


PROGRAMS: Final = {"turnserver": "coturn", "ip": "iproute2", "taskset": "util-linux"}


def _cpus() -> tuple[int, int]:
    """Return the load client's CPU and the servers'. Raises LoadError."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise LoadError("two CPUs are needed: one for the server, one for the load client")
    return usable[0], usable[-1]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.versus",
        description="Compare this relay with coturn, in network namespaces. Takes root.",
    )
    parser.add_argument("--quick", action="store_true", help="a few loads only: about two minutes")
    parser.add_argument("--xdp", action="store_true", help="compare what the kernel relays")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write RESULTS.md, results.json and results.svg; default: bench or bench/xdp",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
