"""Fixtures that every scenario shares."""

import pytest

from tests.scenario import Scenario


@pytest.fixture
def relay() -> Scenario:
    """A relay with both families and default settings, but that documentation may be reached."""
    return Scenario()
