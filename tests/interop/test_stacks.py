"""WebRTC stacks that are no browsers, with the relay, and nothing else, between both ends."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.stun.attributes import Attr
from relay.stun.integrity import userhash
from tests.interop.browser import ice_server
from tests.interop.needs import missing, needs_packages, needs_programs
from tests.interop.program import Program, connect
from tests.interop.proxy import Recorder
from tests.process import RelayProcess, free_port

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HERE = Path(__file__).parent
MESSAGES = [f"message {number}" for number in range(300)]
LARGE = "x" * 60_000  # some fifty datagrams, in SCTP

Start = Callable[[str, str, dict[str, str]], Program]


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
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    """Starts an end by a stack, under a name of its own."""

    def start(stack: str, name: str, server: dict[str, str]) -> Program:
        if stack == "pion":
            program = [str(request.getfixturevalue("pion"))]
        else:
            needs_packages(HERE / "node")
            program = ["node", str(HERE / f"node/{stack}.mjs")]
        folder = tmp_path / name
        folder.mkdir()
        return Program(f"{stack} ({name})", [*program, json.dumps(server)], folder, {})

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
def test_a_data_channel_is_relayed_at_both_ends(
    start: Start, relay: RelayProcess, alice: str, bob: str
) -> None:
    """Of libdatachannel, ICE is libjuice's."""
    server = ice_server(relay, "127.0.0.1")
    with start(alice, "alice", server) as caller, start(bob, "bob", server) as callee:
        connect(caller, callee)
        for sender, receiver in ((caller, callee), (callee, caller)):
            sender.call("send", MESSAGES)
            assert receiver.call("receive", len(MESSAGES)) == MESSAGES
            sender.call("send", [LARGE])
            assert receiver.call("receive", 1) == [LARGE]


def test_libjuice_hides_its_name(start: Start, tmp_path: Path) -> None:
    """By a USERHASH, as all users are static ones: the nonce cookie says that it may."""
    users, owner = tmp_path / "users", os.geteuid()
    users.write_text("alice:word\n")
    arguments = [f"--users-file={users}", *(["--user=root"] if owner == 0 else [])]
    with (
        RelayProcess(*arguments, port=free_port(), portal=True) as relay,
        Recorder(("127.0.0.1", relay.port)) as recorder,
    ):
        relay.logs("relaying")
        server = {
            "urls": f"turn:127.0.0.1:{recorder.port}",
            "username": "alice",
            "credential": "word",
        }
        with (
            start("libdatachannel", "alice", server) as caller,
            start("libdatachannel", "bob", server) as callee,
        ):
            connect(caller, callee)
            caller.call("send", MESSAGES)
            assert callee.call("receive", len(MESSAGES)) == MESSAGES
        signed = recorder.signed_requests()
    assert len(signed) >= 3  # two Allocates and a permission
    for request in signed:
        assert request.get(Attr.USERHASH) == userhash("alice", "firezone")
        assert request.get(Attr.USERNAME) is None
