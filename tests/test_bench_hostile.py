"""No datagram makes much more work than a Binding request, whoever sends it.

The work is counted, not timed (:class:`bench.hostile.Work`), so these bounds hold on any machine.
"""

import zlib
from typing import Any

import pytest

from bench.hostile import BINDING, FLOODS, TARGET, Flood, Work, logging_as_in_service, work_of

# A limit that is reached has to pay off: what it turns away is not dearer than an honest request.
TURNED_AWAY = 2.0  # times a Binding request


@pytest.fixture(scope="module")
def binding() -> float:
    work = work_of(BINDING, beyond=False)
    assert work is not None
    return work


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.name)
def test_the_dearest_datagram_is_bounded(flood: Flood, binding: float) -> None:
    with logging_as_in_service():
        work = work_of(flood, beyond=False)
    assert work is not None
    assert work <= TARGET * binding


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.name)
def test_nobody_is_served_without_end(flood: Flood, binding: float) -> None:
    with logging_as_in_service():
        work = work_of(flood, beyond=True)
    assert work is not None, "there is no limit"
    assert work <= TURNED_AWAY * binding


def test_work_is_the_same_each_time() -> None:
    assert len({work_of(BINDING, beyond=False) for _ in range(3)}) == 1


def test_work_counts_bytecodes() -> None:
    once, often = (counted(f"for _ in range({times}): pass") for times in (10, 1000))
    assert 50 * once < often < 100 * once


def test_work_counts_calls_into_c_and_digests_above_all() -> None:
    nothing, call, digest = map(counted, ("None", "len('')", "zlib.crc32(b'')"))
    assert nothing < call < digest
    assert digest - nothing > Work.DIGEST


def test_work_leaves_out_what_is_not_the_relays() -> None:
    assert counted("for _ in range(100): len('')", module="tests.scenario") == 0


def counted(statement: str, module: str = "relay.somewhere") -> int:
    """Return the work of a function of *module* that does this."""
    namespace: dict[str, Any] = {"__name__": module, "zlib": zlib}
    exec(f"def function():\n    {statement}", namespace)
    with Work() as work:
        namespace["function"]()
    return work.done
