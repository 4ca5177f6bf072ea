"""GStreamer's webrtcbin, and so libnice, with the relay between both ends."""

import json
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.loadlib.netns import RELAY_HOST, Network
from tests.interop.browser import ice_server
from tests.interop.needs import missing, needs_programs
from tests.interop.network import PORT, relay_in
from tests.interop.program import Program, connect

pytestmark = [pytest.mark.interop, pytest.mark.slow]

END = Path(__file__).parent / "gstreamer_end.py"
SYSTEM_PYTHON = "/usr/bin/python3"  # which has bindings that are no packages of Python
MESSAGES = [f"message {number}" for number in range(300)]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_data_channel_is_relayed_at_both_ends(
    network: Network, tmp_path: Path, transport: str
) -> None:
    """Of alice's network nothing else may come through; bob has UDP."""
    needs_gstreamer()
    command = ["ip", "netns", "exec", network.clients, SYSTEM_PYTHON, str(END)]
    url = f"turn:{RELAY_HOST}:{PORT + 3}?transport={transport}"
    with relay_in(network, PORT + 3, f"--tcp-port={PORT + 3}") as relay, ExitStack() as stack:
        alice, bob = (
            stack.enter_context(
                Program(name, [*command, json.dumps(server)], folder(tmp_path / name), {})
            )
            for name, server in (
                ("alice", ice_server(relay, RELAY_HOST, url)),
                ("bob", ice_server(relay, RELAY_HOST)),
            )
        )
        connect(alice, bob)
        alice.call("send", MESSAGES)
        assert bob.call("receive", len(MESSAGES)) == MESSAGES
        bob.call("send", MESSAGES)
        assert alice.call("receive", len(MESSAGES)) == MESSAGES
        relay.signals(signal.SIGUSR1)
        by_tcp = re.search(r"client to peer by TCP: (\d+) datagrams", relay.logs("summary"))
        assert by_tcp is not None
        assert (int(by_tcp[1]) > 0) is (transport == "tcp")


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def needs_gstreamer() -> None:
    """Skip without GStreamer, its plugins for WebRTC, and its bindings for Python."""
    needs_programs("gst-inspect-1.0", SYSTEM_PYTHON)
    elements = ("webrtcbin", "nicesrc", "sctpenc", "dtlsenc")
    bindings = "import gi; gi.require_version('GstWebRTC', '1.0')"
    for command in (
        *(["gst-inspect-1.0", element] for element in elements),
        [SYSTEM_PYTHON, "-c", bindings],
    ):
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
            missing(f"GStreamer lacks what {command[-1]!r} asks for")
