"""The buffer, and what is cut from it."""

import pytest

from relay.datapath.workspace import LARGEST_DATAGRAM, LARGEST_REMEMBERED, Prefixes, Workspace
from relay.observe.counters import Counters


@pytest.mark.parametrize(
    "size", [0, 1, LARGEST_REMEMBERED, LARGEST_REMEMBERED + 1, LARGEST_DATAGRAM]
)
def test_a_prefix_is_what_the_buffer_holds_now(size: int) -> None:
    buffer = bytearray(LARGEST_DATAGRAM)
    prefixes = Prefixes(memoryview(buffer))
    for filler in (b"\x01", b"\x02"):
        buffer[:] = filler * LARGEST_DATAGRAM
        assert bytes(prefixes[size]) == filler * size


def test_not_every_size_is_remembered() -> None:
    """Clients choose the sizes, so there can be 65,536 of them."""
    prefixes = Prefixes(memoryview(bytearray(LARGEST_DATAGRAM)))
    for size in range(0, LARGEST_DATAGRAM, 100):
        prefixes[size]

    assert max(prefixes) == LARGEST_REMEMBERED
    assert len(prefixes) == 16


def test_a_payload_lies_behind_the_header() -> None:
    workspace = Workspace(Counters())
    workspace.for_clients[:8] = b"headdata"

    assert bytes(workspace.payloads[4]) == bytes(workspace.for_peers[:4]) == b"data"
    assert bytes(workspace.framed[8]) == b"headdata"
