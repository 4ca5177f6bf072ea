"""The relay that other people's clients are pointed at."""

from collections.abc import Iterator

import pytest

from tests.interop.loopback import running_relay
from tests.process import RelayProcess


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    """A relay with both families, as a process of its own."""
    with running_relay() as relay:
        yield relay
