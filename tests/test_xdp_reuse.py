"""The memory of a deleted route is the next one's at once, even while the program reads it.

One CPU deletes routes and writes others; another one runs the program on a datagram that may not
take the first one's, so that it hands it up each time. What it relays, it has misdelivered.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contrib import program
from relay.stun.const import Family
from tests import xdpbed
from tests.frames import Datagram
from tests.scenario import channel_data
from tests.xdpbed import CLIENTS, PEERS, Bed, Channel, Entries, routes_to

REPEATS = 20_000  # in one call, of the program on the same frame
CALLS = 100  # after so many the race has been lost, if it can be
LOOKED_UP = "\tif (!route)\n\t\treturn 0;\n"  # in find()
COPIED = "\t*copy = *route;\n"
# bpf_get_prandom_u32(), for some time. As a function, GCC would call it by a pointer: BPF has none.
WAIT = 50 * '\tasm volatile("call 7" ::: "r0", "r1", "r2", "r3", "r4", "r5", "memory");\n'
COPIED_IN_HALVES = (
    "\t__builtin_memcpy(copy, route, 48);\n"  # all up to the key
    + WAIT
    + "\t__builtin_memcpy((void *)copy + 48, (void *)route + 48, sizeof *copy - 48);\n"
)
BY_IDS = "\tif (*(const volatile __u32 *)&route->id != id)\n\t\treturn 0;\n"
BY_KEY = "\t    is[4] != wanted[4])\n\t\treturn 0;\n"
RACES = {  # what to exchange for a program that takes its time, and what keeps that one right
    "another route": (LOOKED_UP, LOOKED_UP + WAIT, BY_KEY),
    "half of another route": (COPIED, COPIED_IN_HALVES, BY_IDS),
}
NUMBER = 0x4001
NOWHERE = Channel(CLIENTS[Family.IPV4], NUMBER, 50000, PEERS[Family.IPV6])
SOMEWHERE = Channel(("192.0.2.11", 5000), NUMBER, 50001, PEERS[Family.IPV4])


@pytest.fixture(scope="module")
def _namespace() -> Iterator[None]:
    xdpbed.needs_bpf()
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU has nobody to race with")
    with xdpbed.network():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_namespace")
def test_one_clients_data_never_takes_the_route_of_another() -> None:
    with Bed() as bed, routes_come_and_go(bed):
        assert misdelivered(bed) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_namespace")
@pytest.mark.parametrize("compiler", program.COMPILERS)
@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "unguarded"])
def test_the_guards_are_what_prevents_it(
    compiler: str, race: str, is_guarded: bool, tmp_path: Path
) -> None:
    """A program that takes its time to read a route: nearly each time it is another's by then."""
    xdpbed.needs_compiler(compiler)
    fast, slow, guard = RACES[race]
    source = exchanged(program.SOURCE.read_text(), fast, slow)
    if not is_guarded:
        source = exchanged(source, guard, guard.replace("return 0;", "{}"))
    changed = tmp_path / program.SOURCE.name
    changed.write_text(source)
    program.compile_program(compiler, tmp_path / "slow.o", source=changed)
    with Bed(tmp_path / "slow.o") as bed, routes_come_and_go(bed):
        assert (misdelivered(bed) == 0) == is_guarded


def exchanged(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1
    return source.replace(old, new)


def misdelivered(bed: Bed) -> int:
    """Run the program until it relays something, or often enough; return how much that is."""
    datagram = Datagram(
        source=NOWHERE.client,
        to=NOWHERE.listening,
        payload=channel_data(NUMBER, b"x"),
        has_checksum=False,  # so it cannot go to IPv6
    )
    frame = datagram.frame()
    for _ in range(CALLS):
        bed.program.run(frame, REPEATS)
        relayed = sum(datagrams for datagrams, _ in bed.counts())
        if relayed:
            return relayed
    return 0


def route_up(channel: Channel) -> tuple[bytes, bytes]:
    """The entry of a channel for what its client sends."""
    entries = Entries()
    routes_to(entries, on_lost_control=pytest.fail).bound(channel.bound)
    return list(entries.items())[1]


@contextmanager
def routes_come_and_go(bed: Bed) -> Iterator[None]:
    """Write one route and the other in turn, on another CPU."""
    routes, channels = bed.program.maps["routes"], [route_up(NOWHERE), route_up(SOMEWHERE)]
    before = os.sched_getaffinity(0)
    one, other = sorted(before)[:2]
    ended = threading.Event()

    def write_in_turn() -> None:
        os.sched_setaffinity(0, {other})
        ids = itertools.count()
        while not ended.is_set():
            for key, value in channels * 50:
                number = next(ids).to_bytes(4)
                routes.update(key, number + value[4:84] + number + value[88:])
                routes.delete(key)

    thread = threading.Thread(target=write_in_turn)
    thread.start()
    os.sched_setaffinity(0, {one})
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.sched_setaffinity(0, before)
