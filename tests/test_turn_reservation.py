"""EVEN-PORT, RESERVATION-TOKEN and DONT-FRAGMENT in an Allocate. RFC 8656 §7.2."""

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Family, Method
from tests.scenario import Answer, Client, Scenario, Value

UDP: Value = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)
EVEN, EVEN_AND_NEXT = 0x00, 0x80


def test_an_even_port_is_even(relay: Scenario) -> None:
    for number in range(40):
        client = relay.client(f"192.0.2.10:{5000 + number}")
        assert client.allocates((Attr.EVEN_PORT, EVEN)).relayed_address[1] % 2 == 0


def test_of_the_value_only_the_first_bit_counts(relay: Scenario) -> None:
    """RFC 8656 §18.7: the others are reserved."""
    answer = allocate(relay.client("192.0.2.10:5000"), (Attr.EVEN_PORT, 0x7F))

    assert answer.code is None
    assert answer.get(Attr.RESERVATION_TOKEN) is None


def test_the_next_port_is_kept_for_whoever_has_the_token(relay: Scenario) -> None:
    rtp, rtcp = relay.client("192.0.2.10:5000", "alice"), relay.client("192.0.2.10:5001", "alice")
    token, port = reserve(rtp)
    assert len(token) == 8

    answer = allocate(rtcp, (Attr.RESERVATION_TOKEN, token))
    assert answer.code is None
    assert answer.get_all(Attr.XOR_RELAYED_ADDRESS) == [("192.0.2.1", port + 1)]
    assert answer.get(Attr.RESERVATION_TOKEN) is None


def test_a_lost_answer_comes_again_with_the_token(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    first, second = (
        alice.asks(
            Method.ALLOCATE, UDP, (Attr.EVEN_PORT, EVEN_AND_NEXT), transaction_id=b"twelve bytes"
        )
        for _ in range(2)
    )

    assert second.get(Attr.RESERVATION_TOKEN) == first.get(Attr.RESERVATION_TOKEN) is not None


def test_a_token_is_good_once(relay: Scenario) -> None:
    token, _ = reserve(relay.client("192.0.2.10:5000", "alice"))
    rtcp, third = relay.client("192.0.2.10:5001", "alice"), relay.client("192.0.2.10:5002", "alice")

    assert allocate(rtcp, (Attr.RESERVATION_TOKEN, token)).code is None
    assert allocate(third, (Attr.RESERVATION_TOKEN, token)).code == 508


def test_a_token_is_good_for_thirty_seconds(relay: Scenario) -> None:
    rtcp = relay.client("192.0.2.10:5001", "alice")
    token, _ = reserve(relay.client("192.0.2.10:5000", "alice"))
    relay.passes(seconds=30)

    assert allocate(rtcp, (Attr.RESERVATION_TOKEN, token)).code == 508


def test_a_token_outlives_the_allocation_it_came_with(relay: Scenario) -> None:
    rtp, rtcp = relay.client("192.0.2.10:5000", "alice"), relay.client("192.0.2.10:5001", "alice")
    token, _ = reserve(rtp)
    rtp.refreshes(0)

    assert allocate(rtcp, (Attr.RESERVATION_TOKEN, token)).code is None


def test_a_token_is_no_use_to_another_user(relay: Scenario) -> None:
    token, _ = reserve(relay.client("192.0.2.10:5000", "alice"))
    mallory, alice = relay.client("192.0.2.66:1", "mallory"), relay.client("192.0.2.10:1", "alice")

    assert allocate(mallory, (Attr.RESERVATION_TOKEN, token)).code == 508
    assert allocate(alice, (Attr.RESERVATION_TOKEN, token)).code is None


def test_an_unknown_token_is_insufficient_capacity(relay: Scenario) -> None:
    client = relay.client("192.0.2.10:5000")

    assert allocate(client, (Attr.RESERVATION_TOKEN, bytes(8))).code == 508


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param([(Attr.RESERVATION_TOKEN, bytes(8)), (Attr.EVEN_PORT, EVEN)], id="both"),
        pytest.param(
            [(Attr.RESERVATION_TOKEN, bytes(8)), (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV4)],
            id="a token and a family",
        ),
        pytest.param(
            [(Attr.RESERVATION_TOKEN, bytes(8)), (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)],
            id="a token and another family",
        ),
        pytest.param(
            [(Attr.EVEN_PORT, EVEN_AND_NEXT), (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)],
            id="two ports and two families",
        ),
    ],
)
def test_what_does_not_go_together_is_a_bad_request(
    relay: Scenario, attributes: list[Value]
) -> None:
    assert allocate(relay.client("192.0.2.10:5000"), *attributes).code == 400


def test_one_even_port_may_be_of_both_families(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    alice.allocates((Attr.EVEN_PORT, EVEN), (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6))

    assert len(alice.relayed_addresses) == 2
    assert alice.relayed_address[1] % 2 == 0


def test_a_reserved_port_is_of_the_family_of_the_first(relay: Scenario) -> None:
    rtp, rtcp = relay.client("192.0.2.10:5000", "alice"), relay.client("192.0.2.10:5001", "alice")
    token, port = reserve(rtp, (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV6))

    answer = allocate(rtcp, (Attr.RESERVATION_TOKEN, token))
    assert answer.get_all(Attr.XOR_RELAYED_ADDRESS) == [("2001:db8::1", port + 1)]


def test_the_pair_is_found_however_few_are_left() -> None:
    relay = Scenario(ports=range(50000, 50100))
    others = [relay.client(f"192.0.2.10:{5000 + n}").allocates() for n in range(100)]
    free = {50041, 50042, 50043}  # odd, even, odd: one pair
    for other in others:
        if other.relayed_address[1] in free:
            other.refreshes(0)

    assert reserve(relay.client("192.0.2.11:5000"))[1] == 50042
    assert allocate(relay.client("192.0.2.11:5001"), (Attr.EVEN_PORT, EVEN)).code == 508
    assert relay.client("192.0.2.11:5002").allocates().relayed_address[1] == 50041
    relay.passes(seconds=30)
    assert relay.client("192.0.2.11:5003").allocates().relayed_address[1] == 50043


def test_an_even_port_that_another_process_holds_is_left_out() -> None:
    relay = Scenario(ports=range(50000, 50008))
    relay.network.occupied = {(Family.IPV4, port) for port in (50000, 50002, 50006)}

    assert reserve(relay.client("192.0.2.10:5000"))[1] == 50004
    relay.server.check()


def test_a_reserved_port_that_cannot_be_bound_is_insufficient_capacity(relay: Scenario) -> None:
    token, port = reserve(relay.client("192.0.2.10:5000", "alice"))
    relay.network.occupied = {(Family.IPV4, port + 1)}

    rtcp = relay.client("192.0.2.10:5001", "alice")
    assert allocate(rtcp, (Attr.RESERVATION_TOKEN, token)).code == 508
    relay.server.check()


def test_reservations_count_as_allocations_do() -> None:
    """Or a user could keep all ports from others, by one reservation after another."""
    relay = Scenario(max_allocations_per_username=3)
    clients = [relay.client(f"192.0.2.10:{5000 + n}", "alice") for n in range(4)]
    token, _ = reserve(clients[0])

    assert allocate(clients[1], (Attr.EVEN_PORT, EVEN_AND_NEXT)).code == 486
    clients[1].allocates()
    assert allocate(clients[2]).code == 486
    assert allocate(clients[2], (Attr.RESERVATION_TOKEN, token)).code is None
    assert allocate(clients[3]).code == 486


def test_reservations_count_per_address_too() -> None:
    relay = Scenario(max_allocations_per_ip=2)
    reserve(relay.client("192.0.2.10:5000", "alice"))

    assert allocate(relay.client("192.0.2.10:5001", "bob")).code == 486
    relay.passes(seconds=30)
    assert allocate(relay.client("192.0.2.10:5001", "bob")).code is None


def test_the_listening_port_is_never_part_of_a_pair() -> None:
    relay = Scenario(ports=range(3476, 3482))  # 3478 is in it
    found = set()
    for number in range(2):
        found.add(reserve(relay.client(f"192.0.2.10:{5000 + number}"))[1])

    assert found == {3476, 3480}


def test_dont_fragment_is_taken(relay: Scenario) -> None:
    assert allocate(relay.client("192.0.2.10:5000"), (Attr.DONT_FRAGMENT, b"")).code is None


def allocate(client: Client, *attributes: Value) -> Answer:
    return client.asks(Method.ALLOCATE, UDP, *attributes)


def reserve(client: Client, *attributes: Value) -> tuple[bytes, int]:
    """Allocate an even port and have the next one kept: its token, and the even port."""
    answer = allocate(client, (Attr.EVEN_PORT, EVEN_AND_NEXT), *attributes)
    assert answer.code is None
    token, (address,) = answer.get(Attr.RESERVATION_TOKEN), answer.get_all(Attr.XOR_RELAYED_ADDRESS)
    assert token is not None
    assert address[1] % 2 == 0
    return token, address[1]
