"""A portal that does what the test says: a small websocket server on a real loopback socket.

By hand, each step is a line of the test, and runs in the test's own thread::

    with FakePortal() as portal:
        connection = portal.expects_connection()
        connection.upgrades()
        join = connection.receives()
        connection.replies_ok(join["ref"])
        connection.says_init()

Or it serves by itself, as the real one does, and counts::

    with FakePortal() as portal:
        portal.serves()
        portal.waits_until(lambda: portal.heartbeats >= 2)
        username, password = portal.credential()

Every wait has a limit that only a failing test reaches.
"""

import json
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from relay.turn.users import mint

WAIT: Final = 10.0  # seconds
BETWEEN_DRIPS: Final = 0.005  # seconds
LARGEST_HEAD: Final = 64 << 10  # bytes

MAGIC: Final = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA  # §5.2


@dataclass(frozen=True, slots=True)
class Frame:
    """What the client sent. RFC 6455 §5.2."""

    opcode: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """A self-signed certificate for localhost and 127.0.0.1, and its key."""

    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def self_signed(folder: Path) -> Certificate:
    """Make a certificate; a client trusts it with ``SSL_CERT_FILE`` set to its path."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    command = [openssl, "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT)
    return made


class FakePortal:
    """A portal on 127.0.0.1, with TLS if it has a certificate. Entering opens the port.

    Nothing is accepted until the test asks, or lets it serve; clients wait in the backlog.
    """

    def __init__(self, certificate: Certificate | None = None) -> None:
        self._conversation: Callable[[Connection], None] = self._converse
        self.port = 0  # chosen by the first start, and kept
        self.stamp_secret: str | None = None  # of the latest join
        self.connections = self.joins = self.heartbeats = 0  # while it serves
        self.is_secure = certificate is not None
        self._context = certificate.context() if certificate else None
        self._listener: socket.socket | None = None
        self._open: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._says_init = True

    def __enter__(self) -> Self:
        self.starts()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stops()

    def starts(self) -> None:
        """Open the port; again after :meth:`stops`, it is the same one."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._listener.settimeout(WAIT)
        self.port = self._listener.getsockname()[1]

    def stops(self) -> None:
        """Close the port and all connections, without a word."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # a close alone does not wake accept()
        self.drops()
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        self._threads.clear()
        self.drops()  # one may have been accepted in between
        if listener is not None:
            listener.close()

    def drops(self) -> None:
        """Close all connections, without a word, and go on accepting new ones."""
        with self._changed:
            connections, self._open = self._open, []
        for connection in connections:
            connection.ends()

    @property
    def url(self) -> str:
        """The API URL of this portal."""
        return f"{'wss' if self._context else 'ws'}://127.0.0.1:{self.port}"

    # --- By hand

    def accepts(self) -> "Connection":
        """Wait for a client to connect, and say nothing yet."""
        assert self._listener is not None
        sock, _ = self._listener.accept()
        connection = Connection(sock)
        with self._changed:
            self._open.append(connection)
        return connection

    def expects_connection(self) -> "Connection":
        """Wait for a client, shake hands if this is a TLS portal, and read its request."""
        connection = self.accepts()
        if self._context is not None:
            connection.secures(self._context)
        connection.reads_request()
        return connection

    def expects_join(self) -> "Connection":
        """Wait for a client, and let it join."""
        connection = self.expects_connection()
        connection.upgrades()
        connection.replies_ok(connection.receives()["ref"])
        return connection

    def expects_nobody(self) -> None:
        """Fail if a client has connected, or has tried to."""
        assert self._listener is not None
        self._listener.settimeout(0)
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        finally:
            self._listener.settimeout(WAIT)
        sock.close()
        raise AssertionError("somebody connected")

    # --- By itself

    def serves(self, *, init: bool = True) -> None:
        """Take everyone in from here on; with *init* False, init waits for says_init()."""
        self._says_init = init
        self._conversation = self._converse
        self._in_thread(self._serve)

    def refuses(
        self, status: int, body: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer everyone with an HTTP status from here on."""
        self._conversation = lambda c: c.answers_status(status, headers, body)
        self._in_thread(self._serve)

    def says_init(self) -> None:
        """Say init to everyone who joined, and from here on to everyone who joins."""
        with self._changed:
            self._says_init = True
            joined = [connection for connection in self._open if connection.has_joined]
            for connection in joined:
                connection.says_init()

    def waits_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to become true of what this portal counts."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT), "the portal waited for too long"

    @property
    def is_left(self) -> bool:
        """Whether everyone who had joined has closed the connection."""
        return self.joins > 0 and not self._open

    def credential(self, lifetime: int = 3600, salt: str = "fakeportal") -> tuple[str, str]:
        """Make a username and password as the portal does, with the secret of the join."""
        assert self.stamp_secret is not None, "nobody has joined"
        return mint(int(time.time()) + lifetime, salt, self.stamp_secret)

    def _in_thread(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, name="fakeportal", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while (listener := self._listener) is not None:
            try:
                connection = self.accepts()
            except TimeoutError:
                continue
            except (OSError, AssertionError):  # it stops
                if self._listener is listener:
                    raise
                return
            with self._changed:
                self.connections += 1
                self._changed.notify_all()
            self._in_thread(self._attend, connection, self._conversation)

    def _attend(
        self, connection: "Connection", conversation: Callable[["Connection"], None]
    ) -> None:
        with suppress(OSError, EOFError):
            if self._context is not None:
                connection.secures(self._context)
            connection.reads_request()
            conversation(connection)
        connection.ends()
        with self._changed:
            with suppress(ValueError):
                self._open.remove(connection)
            self._changed.notify_all()

    def _converse(self, connection: "Connection") -> None:
        connection.upgrades()
        connection.waits_forever()
        while True:
            frame = connection.receives()
            with self._changed:
                self._take(connection, frame)
                self._changed.notify_all()

    def _take(self, connection: "Connection", frame: Mapping[str, Any]) -> None:
        connection.replies_ok(frame["ref"], topic=frame["topic"])
        if frame["event"] == "phx_join":
            self.stamp_secret = frame["payload"]["stamp_secret"]
            self.joins += 1
            connection.has_joined = True
            if self._says_init:
                connection.says_init()
        elif frame["event"] == "heartbeat":
            self.heartbeats += 1


class Connection:
    """One client's connection, from the first byte on."""

    def __init__(self, sock: socket.socket) -> None:
        self.method = self.path = ""
        self.headers: dict[str, str] = {}  # by lower-case name
        self.has_joined = False
        self._sock = sock
        self._sock.settimeout(WAIT)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._over = threading.Event()
        self._flooded = threading.Event()
        self._threads: list[threading.Thread] = []

    def secures(self, context: ssl.SSLContext) -> None:
        """Shake hands for TLS."""
        self._sock = context.wrap_socket(
            self._sock, server_side=True, do_handshake_on_connect=False
        )
        self._sock.do_handshake()

    def reads_request(self) -> None:
        """Read the head of an HTTP request."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            assert len(head) < LARGEST_HEAD
            head += self._read(1)
        request, *lines = head.decode().split("\r\n")[:-2]
        self.method, self.path, _ = request.split(" ")
        fields = [line.split(": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in fields}
        assert len(self.headers) == len(fields), "a header is there twice"

    # --- Answers of HTTP

    def answers_status(
        self, status: int, headers: Mapping[str, str] | None = None, body: str | None = ""
    ) -> None:
        """Answer with something other than a websocket; no Content-Length if *body* is None."""
        fields = dict(headers or {})
        if body is not None:
            fields["Content-Length"] = str(len(body.encode()))
        self.sends_raw(_head(status, fields) + (body or "").encode())

    def upgrades(self, headers: Mapping[str, str] | None = None) -> None:
        """Become a websocket. RFC 6455 §4.2.2."""
        accept = b64encode(sha1((self.headers["sec-websocket-key"] + MAGIC).encode()).digest())
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        accepted = {"Sec-WebSocket-Accept": accept.decode()}
        self.sends_raw(_head(101, {**upgrade, **accepted, **(headers or {})}))

    def tunnels(self) -> None:
        """Be a proxy: grant what was asked for, and be the other end as well."""
        self.sends_raw(_head(200, {}))

    # --- What the client says

    def receives(self) -> dict[str, Any]:
        """Wait for a text frame, and return it parsed."""
        parsed: dict[str, Any] = json.loads(self.receives_text())
        return parsed

    def receives_text(self) -> str:
        """Wait for a text frame; EOFError if a close comes instead."""
        frame = self.receives_frame()
        if frame.opcode == CLOSE:
            raise EOFError
        assert frame.opcode == TEXT, frame
        return frame.payload.decode()

    def receives_frame(self) -> Frame:
        """Wait for a frame of any kind, and check that it is whole and masked."""
        first, second = self._read(2)
        assert first & 0xF0 == 0x80, "not one whole frame"
        assert second & 0x80, "a client must mask its frames"
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self._read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._read(8))
        mask = self._read(4)
        payload = self._read(size)
        return Frame(first & 0x0F, bytes(b ^ mask[i % 4] for i, b in enumerate(payload)))

    def receives_end(self) -> list[Frame]:
        """Wait until the client is gone, and return the frames that it sent before."""
        frames = []
        with suppress(EOFError, ConnectionError):
            while True:
                frames.append(self.receives_frame())
        return frames

    def is_gone(self) -> None:
        """Wait until the client is gone, whatever it says before."""
        with suppress(OSError):
            while self._sock.recv(65536):
                pass

    # --- What the portal says

    def replies_ok(self, ref: object, topic: str = "relay") -> None:
        self.replies(ref, {"status": "ok", "response": {}}, topic)

    def replies_error(self, ref: object, response: object, topic: str = "relay") -> None:
        self.replies(ref, {"status": "error", "response": response}, topic)

    def replies(self, ref: object, payload: object, topic: str = "relay") -> None:
        self.says("phx_reply", payload, topic=topic, ref=ref)

    def says_init(self) -> None:
        self.says("init", {})

    def says(
        self, event: str, payload: object, *, topic: str = "relay", ref: object = None
    ) -> None:
        """Send a Phoenix frame, its keys in the portal's order."""
        self.sends(json.dumps({"event": event, "payload": payload, "ref": ref, "topic": topic}))

    def sends(self, text: str) -> None:
        self.sends_frame(TEXT, text.encode())

    def sends_binary(self, data: bytes) -> None:
        self.sends_frame(BINARY, data)

    def sends_frame(self, opcode: int, payload: bytes, *, is_last: bool = True) -> None:
        self.sends_raw(frame(opcode, payload, is_last=is_last))

    def sends_raw(self, data: bytes) -> None:
        self._sock.sendall(data)

    def pings(self, payload: bytes) -> None:
        self.sends_frame(PING, payload)

    def drips(self, data: bytes) -> None:
        """Send *data* a byte at a time, in the background, for as long as anybody listens."""
        self._in_thread(self._drip, data)

    def floods(self, data: bytes) -> None:
        """Send *data* again and again, in the background, for as long as anybody listens.

        By the return it was sent once, and more of it is under way.
        """
        self._in_thread(self._flood, data)
        assert self._flooded.wait(WAIT)

    def hangs(self) -> None:
        """Say nothing; the connection stays open."""

    def waits_forever(self) -> None:
        """Set no time limit for what the client says."""
        self._sock.settimeout(None)

    # --- How it ends

    def closes(self, code: int | None = 1000, reason: str = "") -> None:
        """Send a close frame, wait for the answer and the end, and close."""
        self.sends_frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason.encode())
        self.is_gone()
        self.ends()

    def resets(self) -> None:
        """Break the connection off with an RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def ends(self) -> None:
        """Close the connection, without a word."""
        self._over.set()
        with suppress(OSError):  # a close alone does not wake recv(), nor may TLS interfere
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
        self._sock.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def _in_thread(self, function: Callable[[bytes], None], data: bytes) -> None:
        thread = threading.Thread(target=function, args=(data,), name="fakeportal", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _drip(self, data: bytes) -> None:
        with suppress(OSError):
            for position in range(len(data)):
                self._sock.sendall(data[position : position + 1])
                if self._over.wait(BETWEEN_DRIPS):
                    return

    def _flood(self, data: bytes) -> None:
        with suppress(OSError):
            while not self._over.is_set():
                self._sock.sendall(data)
                self._flooded.set()
        self._flooded.set()  # or there is nobody any more


def frame(opcode: int, payload: bytes, *, is_last: bool = True) -> bytes:
    """Frame *payload* as a server does, which never masks. RFC 6455 §5.2."""
    first = (0x80 if is_last else 0) | opcode
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", first, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} As The Test Says", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()
