"""Fixtures that every scenario shares."""

import signal

import pytest
from hypothesis import settings

from tests.scenario import Scenario

# How long an example takes says something about the machine only.
settings.register_profile("relay", deadline=None)
settings.load_profile("relay")

# A shell starts what is to run in the background deaf to it, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def relay() -> Scenario:
    """A relay with both families and default settings, but that documentation may be reached."""
    return Scenario()
