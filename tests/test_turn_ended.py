"""Transactions whose effect is over: the last ones are known, and no more than that."""

from relay.stun.const import Method
from relay.turn.commands import ClientAddress
from relay.turn.ended import REMEMBERED, EndedTransactions

ALICE, BOB = (ClientAddress((("192.0.2.10", port), b"")) for port in (5000, 5001))


def test_a_transaction_is_known_by_its_client_its_method_and_its_id() -> None:
    ended = EndedTransactions()
    ended.add(ALICE, Method.ALLOCATE, b"a" * 12)

    assert ended.has(ALICE, Method.ALLOCATE, b"a" * 12)
    assert not ended.has(BOB, Method.ALLOCATE, b"a" * 12)
    assert not ended.has(ALICE, Method.REFRESH, b"a" * 12)
    assert not ended.has(ALICE, Method.ALLOCATE, b"b" * 12)


def test_the_last_ones_are_known_and_memory_is_bounded() -> None:
    ended = EndedTransactions()
    ids = [number.to_bytes(12, "big") for number in range(3 * REMEMBERED)]
    for known in ids:
        ended.add(ALICE, Method.ALLOCATE, known)

    assert all(ended.has(ALICE, Method.ALLOCATE, known) for known in ids[-REMEMBERED:])
    assert sum(ended.has(ALICE, Method.ALLOCATE, known) for known in ids) <= 2 * REMEMBERED
