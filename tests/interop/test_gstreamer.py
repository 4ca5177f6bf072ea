"""GStreamer's webrtcbin, and so libnice, with the relay between both ends."""

import json
import subprocess
from pathlib import Path

import pytest

from bench.loadlib.netns import RELAY_HOST, Network
from tests.interop.browser import ice_server
from tests.interop.needs import missing, needs_programs
from tests.interop.program import Program, connect
from tests.process import RelayProcess

pytestmark = [pytest.mark.interop, pytest.mark.slow]

END = Path(__file__).parent / "gstreamer_end.py"
SYSTEM_PYTHON = "/usr/bin/python3"  # which has bindings that are no packages of Python
MESSAGES = [f"message {number}" for number in range(300)]


def test_a_data_channel_is_relayed_at_both_ends(
    network: Network, relay_at_a_distance: RelayProcess, tmp_path: Path
) -> None:
    needs_gstreamer()
    server = json.dumps(ice_server(relay_at_a_distance, RELAY_HOST))
    command = ["ip", "netns", "exec", network.clients, SYSTEM_PYTHON, str(END), server]
    with (
        Program("alice", command, folder(tmp_path / "alice"), {}) as alice,
        Program("bob", command, folder(tmp_path / "bob"), {}) as bob,
    ):
        connect(alice, bob)
        alice.call("send", MESSAGES)
        assert bob.call("receive", len(MESSAGES)) == MESSAGES
        bob.call("send", MESSAGES)
        assert alice.call("receive", len(MESSAGES)) == MESSAGES


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
