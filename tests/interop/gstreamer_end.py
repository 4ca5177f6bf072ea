"""A WebRTC end by GStreamer, whose ICE is libnice's: see program.py. Relayed candidates only.

For the Python of the system, which has the bindings: ``python3 gstreamer_end.py ICE-SERVER``
"""

import json
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstSdp", "1.0")
gi.require_version("GstWebRTC", "1.0")
from gi.repository import GLib, Gst, GstSdp, GstWebRTC  # noqa: E402


class End:
    """A webrtcbin with a data channel."""

    def __init__(self, server: dict[str, str]) -> None:
        self.inbox: SimpleQueue[str] = SimpleQueue()
        self.opened = threading.Event()
        self._gathered = threading.Event()
        self._candidates: list[str] = []
        self._pipeline = Gst.Pipeline.new()
        self._bin = Gst.ElementFactory.make("webrtcbin")
        who = f"{quote(server['username'], safe='')}:{quote(server['credential'], safe='')}"
        scheme, _, address = server["urls"].partition(":")
        self._bin.set_property("turn-server", f"{scheme}://{who}@{address}")
        self._bin.set_property("ice-transport-policy", GstWebRTC.WebRTCICETransportPolicy.RELAY)
        self._bin.set_property("bundle-policy", GstWebRTC.WebRTCBundlePolicy.MAX_BUNDLE)
        self._bin.connect("on-data-channel", lambda _bin, channel: self._use(channel))
        self._bin.connect("notify::ice-gathering-state", self._on_gathering)
        self._bin.connect("on-ice-candidate", self._on_candidate)
        self._pipeline.add(self._bin)
        self._pipeline.set_state(Gst.State.PLAYING)

    def offer(self) -> str:
        self._use(self._bin.emit("create-data-channel", "data", None))
        return self._describe("create-offer", "offer")

    def answer(self, sdp: str) -> str:
        self._hear(GstWebRTC.WebRTCSDPType.OFFER, sdp)
        return self._describe("create-answer", "answer")

    def accept(self, sdp: str) -> None:
        self._hear(GstWebRTC.WebRTCSDPType.ANSWER, sdp)

    def wait(self) -> None:
        self.opened.wait()

    def send(self, messages: list[str]) -> None:
        for message in messages:
            self._channel.emit("send-string", message)

    def receive(self, count: int) -> list[str]:
        return [self.inbox.get() for _ in range(count)]

    def _use(self, channel: Any) -> None:
        self._channel = channel
        channel.connect("on-open", lambda _channel: self.opened.set())
        channel.connect("on-message-string", lambda _channel, text: self.inbox.put(text))
        if channel.get_property("ready-state") == GstWebRTC.WebRTCDataChannelState.OPEN:
            self.opened.set()

    def _describe(self, action: str, field: str) -> str:
        made = Gst.Promise.new()
        self._bin.emit(action, None, made)
        made.wait()
        reply = made.get_reply()  # to whom the description belongs
        self._bin.emit("set-local-description", reply.get_value(field), Gst.Promise.new())
        self._gathered.wait()
        sdp: str = self._bin.get_property("local-description").sdp.as_text()
        if "a=candidate:" in sdp:
            return sdp
        return sdp + "".join(f"a={candidate}\r\n" for candidate in self._candidates)

    def _hear(self, kind: Any, text: str) -> None:
        _, sdp = GstSdp.SDPMessage.new_from_text(text)
        description = GstWebRTC.WebRTCSessionDescription.new(kind, sdp)
        done = Gst.Promise.new()
        self._bin.emit("set-remote-description", description, done)
        done.wait()

    def _on_candidate(self, _bin: Any, _line: int, candidate: str) -> None:
        self._candidates.append(candidate)

    def _on_gathering(self, _bin: Any, _property: Any) -> None:
        state = self._bin.get_property("ice-gathering-state")
        if state == GstWebRTC.WebRTCICEGatheringState.COMPLETE:
            self._gathered.set()


def main() -> None:
    Gst.init(None)
    end = End(json.loads(sys.argv[1]))
    calls: dict[str, Callable[..., Any]] = {
        "offer": end.offer,
        "answer": end.answer,
        "accept": end.accept,
        "opened": end.wait,
        "send": end.send,
        "receive": end.receive,
    }
    threading.Thread(target=GLib.MainLoop().run, daemon=True).start()
    say({"id": 0, "result": "ready"})
    for line in sys.stdin:
        asked = json.loads(line)
        say({"id": asked["id"], "result": calls[asked["call"]](*asked["arguments"])})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
