"""Records as they go from one process to the next."""

import json
from collections.abc import Iterable

from relay.turn.records import Record


def encode(records: Iterable[Record]) -> bytes:
    """Write records as bytes."""
    return json.dumps(list(records)).encode()


def decode(written: bytes) -> list[Record]:
    """Read records."""
    records: list[Record] = json.loads(written)
    return records
