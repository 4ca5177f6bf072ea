"""WebRTC stacks that are no browsers, with the relay, and nothing else, between both ends."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.browser import ice_server
from tests.interop.needs import missing, needs_packages, needs_programs
from tests.interop.program import Program
from tests.process import RelayProcess

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HERE = Path(__file__).parent
MESSAGES = [f"message {number}" for number in range(300)]
LARGE = "x" * 60_000  # some fifty datagrams, in SCTP

Start = Callable[[str, str], Program]


@pytest.fixture(scope="module")
def pion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program ``pion/main.go``."""
    needs_programs("go")
    program = tmp_path_factory.mktemp("pion") / "end"
    built = subprocess.run(
        ["go", "build", "-o", str(program), "."],
        cwd=HERE / "pion",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if built.returncode:
        missing(f"go cannot build pion/main.go: {built.stderr[-500:]}")
    return program


@pytest.fixture
def start(request: pytest.FixtureRequest, relay: RelayProcess, tmp_path: Path) -> Start:
    """Starts an end by a stack, under a name of its own."""
    server = json.dumps(ice_server(relay, "127.0.0.1"))

    def start(stack: str, name: str) -> Program:
        if stack == "pion":
            command = [str(request.getfixturevalue("pion")), server]
        else:
            needs_packages(HERE / "node")
            command = ["node", str(HERE / f"node/{stack}.mjs"), server]
        folder = tmp_path / name
        folder.mkdir()
        return Program(f"{stack} ({name})", command, folder, {})

    return start


@pytest.mark.parametrize(
    ("alice", "bob"),
    [
        ("pion", "pion"),
        ("werift", "werift"),
        ("libdatachannel", "libdatachannel"),
        ("pion", "werift"),
        ("libdatachannel", "pion"),
    ],
)
def test_a_data_channel_is_relayed_at_both_ends(start: Start, alice: str, bob: str) -> None:
    """Of libdatachannel, ICE is libjuice's."""
    with start(alice, "alice") as caller, start(bob, "bob") as callee:
        offer = caller.call("offer")
        answer = callee.call("answer", offer)
        caller.call("accept", answer)
        for sdp in (offer, answer):
            candidates = [line for line in sdp.splitlines() if line.startswith("a=candidate:")]
            assert candidates
            assert all(" typ relay" in candidate for candidate in candidates)
        caller.call("opened")
        callee.call("opened")
        for sender, receiver in ((caller, callee), (callee, caller)):
            sender.call("send", MESSAGES)
            assert receiver.call("receive", len(MESSAGES)) == MESSAGES
            sender.call("send", [LARGE])
            assert receiver.call("receive", 1) == [LARGE]
