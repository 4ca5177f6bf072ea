"""Upgrades with the program in the kernel: it relays on, and the next process sees to it."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.stun.const import Family
from tests.process import TIMEOUT, RelayProcess
from tests.test_upgrade_daemon import BROKEN, CHANGEABLE, replaced, upgrades
from tests.test_xdp_relay import Ends, programs_at
from tests.xdpbed import needs_bpf
from tests.xdpworld import Counts, World, two_interfaces

ATTACHED = {"towards0": "turn", "towards1": "turn"}


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    needs_bpf()


@pytest.fixture(scope="module")
def small() -> Iterator[World]:
    with two_interfaces() as world:
        yield world


def starts(world: World, file: Path, *arguments: str, xdp: str = "require") -> RelayProcess:
    """Start a relay that is changed by what a file holds when the next one starts."""
    file.write_text("")
    return world.starts(*arguments, xdp=xdp, program=CHANGEABLE.format(file=str(file)))


@pytest.mark.parametrize("family", Family)
def test_channels_stay_in_the_kernel(small: World, tmp_path: Path, family: Family) -> None:
    with starts(small, tmp_path / "first.py") as relay, Ends(small, relay, family) as ends:
        for _ in range(3):
            before = Counts.of(relay)
            upgrades(relay)
            ends.exchange(b"by the kernel")
            after = Counts.of(relay)
            assert programs_at(small) == ATTACHED
            assert after.routes == before.routes == 2
            assert (after.up_by_xdp, after.down_by_xdp) == (
                before.up_by_xdp + 1,
                before.down_by_xdp + 1,
            )
            assert after.up_by_sockets == before.up_by_sockets
        ends.client.refreshes(0)
        assert Counts.of(relay).routes == 0
        with Ends(small, relay, family, number=0x4002) as others:  # new ones get there, too
            before = Counts.of(relay)
            others.exchange(b"by the kernel")
            assert Counts.of(relay).up_by_xdp == before.up_by_xdp + 1
    assert programs_at(small) == {}
    assert "this is a bug" not in relay.errors()


def test_the_kernel_relays_while_nobody_else_does(small: World, tmp_path: Path) -> None:
    program, _ = BROKEN["it hangs when it should serve"]
    entered = tmp_path / "entered"
    with starts(small, tmp_path / "first.py") as relay, Ends(small, relay) as ends:
        (tmp_path / "first.py").write_text(
            f"{program}\nimport pathlib\n"
            "pause = signal.pause\n"
            f"signal.pause = lambda: (pathlib.Path({str(entered)!r}).open('w').close(), pause())"
        )
        before = Counts.of(relay)
        lines = relay.lines
        relay.signals(signal.SIGUSR2)
        relay.logs("upgrading", after=lines)
        while "not upgraded" not in relay.errors():
            ends.exchange(b"by the kernel")
        after = Counts.of(relay)
        assert after.up_by_sockets == before.up_by_sockets
        assert after.down_by_sockets == before.down_by_sockets
        assert after.up_by_xdp > before.up_by_xdp


def test_what_is_in_the_kernel_goes_where_it_is_not_wanted_any_more(
    small: World, tmp_path: Path
) -> None:
    file = tmp_path / "relay.conf"
    file.write_text("xdp = require\n")
    relay = starts(small, tmp_path / "first.py", f"--config={file}")
    relay._command = [part for part in relay._command if part != "--xdp=require"]
    with relay, Ends(small, relay) as ends:
        assert programs_at(small) == ATTACHED
        file.write_text("")
        upgrades(relay)
        ends.exchange(b"by the sockets")
        until_detached(small)


OTHER_LAYOUT = """
from relay.xdp import attach
attach.LAYOUT += 1
"""


def test_routes_of_another_layout_are_left_to_the_sockets(small: World, tmp_path: Path) -> None:
    first = tmp_path / "first.py"
    with starts(small, first, xdp="auto") as relay, Ends(small, relay) as ends:
        assert programs_at(small) == ATTACHED
        first.write_text(OTHER_LAYOUT)
        before = relay.lines
        upgrades(relay)
        relay.logs("what is in the kernel is of another version", after=before)
        ends.exchange(b"by the sockets")
        until_detached(small)


def until_detached(world: World) -> None:
    """Look until no device has the program.

    The process before lets go of it when it becomes a keeper, which is after it has said that it
    is replaced, and which nothing says. It keeps its number and nothing else.
    """
    give_up_at = time.monotonic() + TIMEOUT
    while programs_at(world):
        assert time.monotonic() < give_up_at, programs_at(world)


def test_where_they_are_required_the_upgrade_is_refused(small: World, tmp_path: Path) -> None:
    first = tmp_path / "first.py"
    with starts(small, first) as relay, Ends(small, relay) as ends:
        first.write_text(OTHER_LAYOUT)
        before = relay.lines
        relay.signals(signal.SIGUSR2)
        assert "of another version" in relay.logs("not upgraded, all stays", after=before)
        assert programs_at(small) == ATTACHED
        counts = Counts.of(relay)
        ends.exchange(b"by the kernel")
        assert Counts.of(relay).up_by_xdp == counts.up_by_xdp + 1
        first.write_text("")
        before = relay.lines
        relay.signals(signal.SIGUSR2)
        replaced(relay, before)


def test_to_begin_with_it_takes_a_restart(small: World, tmp_path: Path) -> None:
    file = tmp_path / "relay.conf"
    file.write_text("")
    relay = starts(small, tmp_path / "first.py", f"--config={file}")
    relay._command = [part for part in relay._command if part != "--xdp=require"]
    with relay, Ends(small, relay) as ends:
        file.write_text("xdp = auto\n")
        before = relay.lines
        upgrades(relay)
        relay.logs("to begin with it takes a restart", after=before)
        ends.exchange(b"by the sockets")
