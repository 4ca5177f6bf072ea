"""What the dearest datagram costs: each kind of a hostile one, as a multiple of a Binding request.

Run it with ``python -m bench.hostile``. The server and the data path are the real ones, between
sockets that remember what is sent, so the cost of the kernel is left out: it is the same for all.
Each kind is measured below its limits, where all of it is served, and beyond them, where it is
not: the sender has had what may be had at once, and no time passes. A kind that is served for
however long has no limit.

The time is the least of many small batches, in which the kinds take turns: noise only adds.
The work is what :class:`Work` counts. It is the same in every run, and a test bounds it.
"""

import gc
import io
import itertools
import logging
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Self

from relay.config.parsing import MOST_SECRETS
from relay.observe.logratelimit import LogRateLimit
from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.stun.raw import MAX_PEERS
from relay.turn.commands import ClientAddress, Drop
from relay.turn.users import DEFAULT_REALM, Users
from tests.scenario import SECRET, Client, Scenario, Value, channel_data, request

BATCHES: Final = 60
IN_A_BATCH: Final = 10  # datagrams
TARGET: Final = 10.0  # at most so many times the cost of a Binding request may a datagram have

# Below its limits, a client sends ten datagrams per second, and answers are not rationed.
PAUSE: Final = 0.1  # seconds
UNLIMITED: Final = 1_000_000  # answers per second
# Beyond them, rations are small, so that they are soon used up.
RATIONED: Final = 4  # answers per second, of which some seconds' worth may come at once
MOST_AT_ONCE: Final = 2000  # datagrams in no time: who is still served then is not limited

LIMITS: Final = {reason.value for reason in (Drop.CLIENT_RATE, Drop.PREFIX_RATE, Drop.TOTAL_RATE)}

LARGEST: Final = 2048  # bytes of a STUN message that is read
MALLORY: Final = "192.0.2.66:5000"

Datagram = tuple[bytes, ClientAddress]
"""What is sent, and by whom."""


def main() -> None:
    """Measure every kind, and print a table."""
    with logging_as_in_service():
        measured = measure_all()
    binding = measured[BINDING.name][0]
    assert binding is not None
    titles = f"{'µs':>8}{'x time':>8}{'x work':>8}"
    print(f"{'':45}{'below the limits':>24}{'beyond them':>24}")
    print(f"{'kind of datagram':45}{titles}{titles}")
    for name, (below, beyond) in measured.items():
        cells = "".join(_cells(cost, binding) for cost in (below, beyond))
        print(f"{name:45}{cells}".rstrip())


@dataclass(frozen=True, slots=True)
class Cost:
    """What one datagram of a kind takes."""

    seconds: float
    work: float


@contextmanager
def logging_as_in_service() -> Iterator[None]:
    """Have the relay log as it does by default, but to nobody, and at most some lines."""
    logger = logging.getLogger("relay")
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(LogRateLimit(clock=lambda: 0.0))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)


def measure_all() -> dict[str, tuple[Cost | None, Cost | None]]:
    """Return what each kind costs below its limits and beyond, None where it has none."""
    flooded = {
        (flood.name, beyond): target
        for flood in FLOODS
        for beyond in (False, True)
        if (target := Target(flood)).is_flooded(beyond=beyond)
    }
    times: dict[tuple[str, bool], float] = dict.fromkeys(flooded, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(BATCHES):
            for key, target in flooded.items():
                times[key] = min(times[key], target.seconds(IN_A_BATCH))
    finally:
        gc.enable()
    costs = {key: Cost(times[key], target.work(IN_A_BATCH)) for key, target in flooded.items()}
    return {
        flood.name: (costs.get((flood.name, False)), costs.get((flood.name, True)))
        for flood in FLOODS
    }


def work_of(flood: "Flood", *, beyond: bool) -> float | None:
    """Return the work that one datagram makes, or None if *flood* cannot get beyond a limit."""
    target = Target(flood)
    return target.work(IN_A_BATCH) if target.is_flooded(beyond=beyond) else None


class Target:
    """A relay of its own, and one kind of datagram that it is sent."""

    def __init__(self, flood: "Flood") -> None:
        self._flood = flood
        self._pause = PAUSE

    def is_flooded(self, *, beyond: bool) -> bool:
        """Begin; with *beyond*, say if there is a limit, and have reached it."""
        self._relay = Scenario(
            unauthenticated_rate=UNLIMITED,
            unauthenticated_rate_per_prefix=UNLIMITED,
            max_allocations=1000,
            users=Users(secret=SECRET, rest_secrets=self._flood.rest_secrets),
        )
        mallory = self._relay.client(MALLORY).allocates(lifetime=3600)
        self._datagrams = self._flood.datagrams(self._relay, mallory)
        self._serve(self._take(IN_A_BATCH))  # the first is dearer than others
        if not beyond:
            return True
        self._pause = 0.0
        self._relay.changes_settings(
            unauthenticated_rate=RATIONED, unauthenticated_rate_per_prefix=RATIONED
        )
        self._is_answered(
            (request(Method.BINDING).encode(), mallory.address) for _number in endless()
        )
        return not self._is_answered(self._datagrams)

    def seconds(self, count: int) -> float:
        """Return the time that one of *count* datagrams takes."""
        batch = self._take(count)
        began = time.perf_counter()
        self._serve(batch)
        took = time.perf_counter() - began
        self._relay.sent()  # and forgotten
        return took / count

    def work(self, count: int) -> float:
        """Return the work that one of *count* datagrams makes."""
        batch = self._take(count)
        with Work() as work:
            self._serve(batch)
        return work.done / count

    def _take(self, count: int) -> list[Datagram]:
        return list(itertools.islice(self._datagrams, count))

    def _serve(self, batch: list[Datagram]) -> None:
        relay, pause = self._relay, self._pause
        for datagram, client in batch:
            relay.time.now += pause
            relay.serves(datagram, client)

    def _is_answered(self, datagrams: Iterator[Datagram]) -> bool:
        """Say whether so many are answered in no time; send until a limit turns one away."""
        is_answered = False
        for datagram, client in itertools.islice(datagrams, MOST_AT_ONCE):
            self._relay.serves(datagram, client)
            is_answered = bool(self._relay.sent())
            if not LIMITS.isdisjoint(self._relay.dropped()):
                return False
        return is_answered


Trace = Callable[[FrameType, str, object], Any]


TOOL: Final = 4  # one of those that sys.monitoring leaves to anybody


class Work:
    """Counts what the interpreter does: bytecodes, and calls into C for several of them each.

    Not what is done outside the relay and what it imports: the sockets are not the real ones.
    Calls that digest count for more, as they take longer.
    """

    CALL: Final = 5  # bytecodes take as long as a call into C does
    DIGEST: Final = 50  # and as one that digests

    def __init__(self) -> None:
        self.done = 0
        self._before = sys.gettrace(), sys.getprofile()

    def __enter__(self) -> Self:
        """Count from here on."""
        sys.setprofile(self._profile)
        if sys.version_info >= (3, 12):
            events = sys.monitoring.events.INSTRUCTION
            sys.monitoring.use_tool_id(TOOL, "work")
            sys.monitoring.register_callback(TOOL, events, self._on_instruction)
            sys.monitoring.set_events(TOOL, events)
        else:  # opcode events of settrace are not to be relied on in later versions
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        trace, profile = self._before
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.free_tool_id(TOOL)
        else:
            sys.settrace(trace)
        sys.setprofile(profile)

    def _on_instruction(self, _code: object, _offset: int) -> None:
        if not _is_outside(sys._getframe(1)):  # noqa: SLF001
            self.done += 1

    def _trace(self, frame: FrameType, event: str, _: object) -> Trace | None:
        if _is_outside(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self.done += 1
        return self._trace

    def _profile(self, frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and not _is_outside(frame):
            is_digest = getattr(called, "__name__", "") in DIGESTS
            self.done += self.DIGEST if is_digest else self.CALL


DIGESTS: Final = {
    *("hmac_digest", "digest", "hexdigest", "blake2s", "blake2b", "crc32"),
    *("openssl_md5", "openssl_sha1", "openssl_sha256"),
}


def _is_outside(frame: FrameType) -> bool:
    return frame.f_globals["__name__"].partition(".")[0] in {"tests", "bench"}


@dataclass(frozen=True, slots=True)
class Flood:
    """A kind of datagram, and how to make them without end, for a client with an allocation."""

    name: str
    datagrams: Callable[[Scenario, Client], Iterator[Datagram]]
    from_strangers: bool = False  # it takes neither credentials nor a nonce
    rest_secrets: tuple[str, ...] = ()  # that the relay has besides Firezone's


def bindings(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    for _number in endless():
        yield request(Method.BINDING).encode(), mallory.address


def garbage(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    rng = random.Random(1)
    for _number in endless():
        yield b"\x80" + rng.randbytes(999), mallory.address


def garbage_like_stun(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    rng = random.Random(1)
    for _number in endless():
        yield b"\x00\x01" + rng.randbytes(998), mallory.address


def unbound_channel_data(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    for number in endless():
        yield channel_data(0x4000 + number % 0x1000, bytes(996)), mallory.address


def indications(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    """Full of attributes, all of one type that needs no understanding."""
    for number in endless():
        yield (
            message(0x0011, struct.pack("!HH", 0xFFFF, 0) * MOST_ATTRIBUTES, number),
            mallory.address,
        )


def unknown_attributes(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    """Full of attributes that would have to be understood."""
    kinds = range(0x7000, 0x7000 + MOST_ATTRIBUTES)
    attributes = b"".join(struct.pack("!HH", kind, 0) for kind in kinds)
    for number in endless():
        yield message(Method.BINDING, attributes, number), mallory.address


def wrong_fingerprints(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    """Long ones: all of it is summed up."""
    padding = bytes(LARGEST - 20 - 4 - 8)
    attributes = struct.pack("!HH", 0xFFFF, len(padding)) + padding
    for number in endless():
        wrong = struct.pack("!HHI", Attr.FINGERPRINT.type, 4, 0)
        yield message(Method.BINDING, attributes + wrong, number), mallory.address


def wrong_signatures(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    for number in endless():
        yield _wrongly_signed(number, b"no such nonce"), mallory.address


def wrong_signatures_with_a_nonce(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    for number in endless():
        yield _wrongly_signed(number, mallory.nonce), mallory.address


def long_wrong_signatures(sha256: bool) -> Callable[[Scenario, Client], Iterator[Datagram]]:
    def datagrams(_: Scenario, mallory: Client) -> Iterator[Datagram]:
        for number in endless():
            padding = (Attr.DATA, bytes(1800))
            yield _wrongly_signed(number, mallory.nonce, padding, sha256=sha256), mallory.address

    return datagrams


def spoofed_allocates(relay: Scenario, _: Client) -> Iterator[Datagram]:
    """From an address and a network of its own each. They get a 401."""
    rng = random.Random(1)
    for _number in endless():
        host = ".".join(str(number) for number in rng.randbytes(4))
        sender = relay.client(f"{host}:{rng.randrange(1, 65536)}").address
        yield request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).encode(), sender


def permissions(peers: int) -> Callable[[Scenario, Client], Iterator[Datagram]]:
    """CreatePermission for so many peers."""

    def datagrams(_: Scenario, mallory: Client) -> Iterator[Datagram]:
        hosts = [(Attr.XOR_PEER_ADDRESS, (f"198.51.100.{1 + at}", 9000)) for at in range(peers)]
        for _number in endless():
            yield mallory.signed(Method.CREATE_PERMISSION, *hosts), mallory.address

    return datagrams


def ipv6_permissions(relay: Scenario, _: Client) -> Iterator[Datagram]:
    """CreatePermission for as many IPv6 peers as may be in one, in which no IPv4 is written."""
    client = relay.client("192.0.2.68:5000")
    client.allocates((Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6), lifetime=3600)
    hosts = [(Attr.XOR_PEER_ADDRESS, (f"2600::{1 + at:x}", 9000)) for at in range(MAX_PEERS)]
    for _number in endless():
        yield client.signed(Method.CREATE_PERMISSION, *hosts), client.address


def new_ipv6_permissions(relay: Scenario, _: Client) -> Iterator[Datagram]:
    """CreatePermission for others each time, until there are as many as there may be."""
    client = relay.client("192.0.2.69:5000")
    client.allocates((Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6), lifetime=3600)
    for number in endless():
        hosts = [
            (Attr.XOR_PEER_ADDRESS, (f"2600::{number:x}:{at:x}", 9000)) for at in range(MAX_PEERS)
        ]
        yield client.signed(Method.CREATE_PERMISSION, *hosts), client.address


def refreshes(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    for _number in endless():
        yield mallory.signed(Method.REFRESH, (Attr.LIFETIME, 3600)), mallory.address


def refused_binds(_: Scenario, mallory: Client) -> Iterator[Datagram]:
    """To addresses that may not be reached, a new one each time."""
    for number in endless():
        peer = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 9000
        yield (
            mallory.signed(
                Method.CHANNEL_BIND, (Attr.CHANNEL_NUMBER, 0x4000), (Attr.XOR_PEER_ADDRESS, peer)
            ),
            mallory.address,
        )


def coming_and_going(relay: Scenario, _: Client) -> Iterator[Datagram]:
    """One client allocates and deletes, in turns."""
    client = relay.client("192.0.2.67:5000")
    for _number in endless():
        yield (
            client.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)),
            client.address,
        )
        yield client.signed(Method.REFRESH, (Attr.LIFETIME, 0)), client.address


MOST_ATTRIBUTES: Final = (LARGEST - 20) // 4

BINDING: Final = Flood("Binding request", bindings, from_strangers=True)
FLOODS: Final = (
    BINDING,
    Flood("garbage", garbage, from_strangers=True),
    Flood("garbage that begins as STUN does", garbage_like_stun, from_strangers=True),
    Flood("ChannelData on channels that are not bound", unbound_channel_data, from_strangers=True),
    Flood(f"indication of {MOST_ATTRIBUTES} attributes", indications, from_strangers=True),
    Flood(
        f"request of {MOST_ATTRIBUTES} unknown attributes", unknown_attributes, from_strangers=True
    ),
    Flood("wrong FINGERPRINT, 2 KiB", wrong_fingerprints, from_strangers=True),
    Flood("wrong signature, no good nonce", wrong_signatures),
    Flood("wrong signature, good nonce", wrong_signatures_with_a_nonce),
    Flood("wrong signature, good nonce, 2 KiB", long_wrong_signatures(sha256=False)),
    Flood("wrong SHA-256, good nonce, 2 KiB", long_wrong_signatures(sha256=True)),
    Flood(
        "the same, as many secrets as there may be",
        long_wrong_signatures(sha256=True),
        rest_secrets=tuple(f"secret {number}" for number in range(MOST_SECRETS)),
    ),
    Flood("unsigned Allocate, addresses spoofed", spoofed_allocates, from_strangers=True),
    Flood("CreatePermission with 16 peers", permissions(MAX_PEERS)),
    Flood("CreatePermission with 16 IPv6 peers", ipv6_permissions),
    Flood("CreatePermission with 16 new IPv6 peers", new_ipv6_permissions),
    Flood("CreatePermission with 150 peers", permissions(150)),
    Flood("Refresh", refreshes),
    Flood("ChannelBind that is refused", refused_binds),
    Flood("Allocate and Refresh 0, in turns", coming_and_going),
)


def message(message_type: int, attributes: bytes, number: int) -> bytes:
    """Return a STUN message with these attributes, encoded."""
    header = struct.pack("!HHI", message_type, len(attributes), 0x2112A442)
    return header + number.to_bytes(12, "big") + attributes


def _wrongly_signed(number: int, nonce: bytes, *attributes: Value, sha256: bool = False) -> bytes:
    """Return an Allocate by a username that nobody has had before."""
    credentials: tuple[Value, ...] = (
        (Attr.USERNAME, f"{2**40}:{number}"),
        (Attr.REALM, DEFAULT_REALM),
        (Attr.NONCE, nonce),
    )
    return request(Method.ALLOCATE, *attributes, *credentials).encode(b"guessed", sha256=sha256)


def _cells(cost: Cost | None, binding: Cost) -> str:
    if cost is None:
        return f"{'no limit':>24}"
    times = cost.seconds / binding.seconds
    return f"{1e6 * cost.seconds:8.2f}{times:8.1f}{cost.work / binding.work:8.1f}"


endless = itertools.count

if __name__ == "__main__":
    main()
