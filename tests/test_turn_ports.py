"""Free ports: drawn at random, given back, and set aside while another process holds them."""

import random
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from relay.turn.ports import SET_ASIDE_FOR, FreePorts
from tests.scenario import Scenario

PORTS = range(50000, 50008)
EXCLUDED = 50003
AVAILABLE = set(PORTS) - {EXCLUDED}


def test_each_port_is_drawn_with_the_same_probability() -> None:
    """Also after others were taken and given back in any order."""
    free = FreePorts(PORTS, EXCLUDED, random.Random(1).randrange)
    drawn: Counter[int | None] = Counter()
    for _ in range(7000):
        held = [free.take(0.0) for _ in range(3)]
        drawn[held[0]] += 1
        for port in reversed(held):
            assert port is not None
            free.give_back(port)

    assert set(drawn) == AVAILABLE
    assert min(drawn.values()) > 850
    assert max(drawn.values()) < 1150


def test_what_another_process_holds_is_not_drawn_for_a_while() -> None:
    free = FreePorts(range(50000, 50002), EXCLUDED, lambda _: 0)
    first, second = free.take(100.0), free.take(100.0)
    assert first is not None
    assert second is not None
    free.set_aside(first, 100.0)
    free.give_back(second)

    for _ in range(10):
        assert free.take(100.0 + SET_ASIDE_FOR - 0.001) == second
        free.give_back(second)
    free.take(100.0 + SET_ASIDE_FOR)
    assert free.take(100.0 + SET_ASIDE_FOR) is not None


def test_where_no_other_port_is_free_it_is_tried_again_once_per_allocate() -> None:
    relay = Scenario(ports=range(50000, 50003))
    relay.network.occupied = {(Family.IPV4, port) for port in range(50000, 50003)}
    alice = relay.client("192.0.2.10:5000")
    for number in (1, 2):
        assert alice.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).code == 508
        assert len(relay.network.tried) == 3 * number

    relay.network.occupied.remove((Family.IPV4, 50001))
    assert alice.allocates().relayed_address[1] == 50001


def test_what_one_allocate_has_found_out_costs_the_next_nothing() -> None:
    """Nor does a range that is nearly full: each Allocate tries just one port."""
    relay = Scenario(ports=range(50000, 50020))
    relay.network.occupied = {(Family.IPV4, port) for port in range(50000, 50010)}
    relay.client("192.0.2.10:1").allocates()
    tries = len(relay.network.tried)
    # By then all that are held may have been found, one Allocate after the other.
    for number in range(2, 11):
        relay.client(f"192.0.2.10:{number}").allocates()

    assert len(relay.network.tried) <= 20
    assert len(set(relay.network.tried)) == len(relay.network.tried)
    assert tries <= 11


class Ports(RuleBasedStateMachine):
    """Any order of taking, giving back and setting aside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.free = FreePorts(PORTS, EXCLUDED, random.Random(2).randrange)
        self.taken: list[int] = []
        self.aside: dict[int, float] = {}  # until when

    @rule()
    def take(self) -> None:
        port = self.free.take(self.now)
        self.aside = {p: until for p, until in self.aside.items() if until > self.now}
        if port is None:
            assert set(self.taken) == AVAILABLE
            return
        assert port in AVAILABLE - set(self.taken)
        if port in self.aside:  # the first that was set aside, as no other is free
            assert {*self.taken, *self.aside} == AVAILABLE
            assert self.aside[port] == min(self.aside.values())
            del self.aside[port]
        self.taken.append(port)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.free.give_back(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def set_aside(self, data: st.DataObject) -> None:
        port = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.free.set_aside(port, self.now)
        self.aside[port] = self.now + SET_ASIDE_FOR

    @rule(seconds=st.sampled_from([0.5, 5.0, SET_ASIDE_FOR]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def each_port_is_in_one_place(self) -> None:
        self.free.check(self.taken)


TestPorts = Ports.TestCase
TestPorts.settings = settings(deadline=None, max_examples=50)
