"""The portal's thread: a blocking websocket, and nothing else that anyone shares.

It dials, writes and reads as :class:`~relay.portal.phoenix.Phoenix` says, and posts events. No
other thread touches the websocket; the only way in from outside is the stop flag, which every
wait watches.
"""

import logging
import random
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from websocket import (
    ABNF,
    WebSocket,
    WebSocketBadStatusException,
    WebSocketConnectionClosedException,
    WebSocketException,
)

from relay.portal.endpoint import Endpoint
from relay.portal.phoenix import Connect, Disconnect, Phoenix, PortalEvent, Send, State
from relay.portal.stream import Stop, Stopped, Stream, StreamError, dial

logger = logging.getLogger("relay.portal")

DIAL_TIMEOUT: Final = 10.0  # seconds for DNS and TCP
HANDSHAKE_TIMEOUT: Final = 10.0  # seconds for TLS, and again for the websocket
MESSAGE_TIMEOUT: Final = 5.0  # seconds from the first byte of a message to its last
SEND_TIMEOUT: Final = 5.0  # seconds
LARGEST_ANSWER: Final = 64 << 10  # bytes of an HTTP answer
LARGEST_MESSAGE: Final = 1 << 20  # bytes
STOP_TIMEOUT: Final = 0.1  # seconds

EXPECTED: Final = (OSError, StreamError, WebSocketException)  # when a connection fails
LONGEST_REASON: Final = 200  # characters
SWITCHING_PROTOCOLS: Final = 101


class PortalClient:
    """Keeps a relay joined to its portal, from a thread of its own."""

    def __init__(
        self,
        portal: Endpoint,
        *,
        token: str,
        secret: str,
        user_agent: str,
        post: Callable[[PortalEvent], None],
        on_start: Callable[[], None] = lambda: None,
        has_joined: bool = False,
    ) -> None:
        """Take where the portal is, who we are, the credentials' secret, and where events go.

        *has_joined*: the portal has taken this relay before, in another process.

        *post*, and *on_start* before anything else, are called in the portal's thread;
        :meth:`start` waits for the latter.
        """
        self._portal = portal
        self._headers = [f"X-Authorization: Bearer {token}", f"User-Agent: {user_agent}"]
        self._secret = secret
        self._tls = ssl.create_default_context() if portal.is_secure else None
        self._post = post
        self._on_start = on_start
        self._has_joined = has_joined
        self._stop = Stop()
        self._stream: Stream | None = None
        self._websocket: WebSocket | None = None
        self._is_closed = False
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="portal", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if the system allows no more threads."""
        self._thread.start()
        self._has_started.wait()

    def stop(self) -> None:
        """Have the thread leave the portal and end, wherever it waits. Does not wait for that."""
        if not self._is_closed:
            self._stop.set()

    def close(self) -> None:
        """End the thread; it has at most 100 ms to say goodbye."""
        if self._is_closed:
            return
        self.stop()
        self._is_closed = True
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("the portal's thread does not end")  # it dies with the process
        else:
            self._stop.close()

    def _run(self) -> None:
        try:
            self._on_start()
        finally:
            self._has_started.set()
        phoenix = Phoenix(
            self._secret,
            portal=self._portal.host,
            random=random.random,
            now=time.monotonic(),
            has_joined=self._has_joined,
        )
        try:
            while phoenix.state is not State.FINISHED:
                try:
                    self._carry_out(phoenix)
                    self._wait(phoenix)
                except Stopped:
                    raise
                except Exception as error:
                    # Of bytes from outside anything can come, and none of it may end the thread.
                    if not isinstance(error, EXPECTED):
                        logger.debug("unexpected from the portal", exc_info=True)
                    self._disconnect()
                    phoenix.handle_closed(_reason(error), time.monotonic())
                phoenix.handle_timeout(time.monotonic())
            self._carry_out(phoenix)
        except Stopped:
            pass
        except Exception:
            logger.exception("the portal's thread is stopped by a bug")
        finally:
            self._disconnect()

    def _carry_out(self, phoenix: Phoenix) -> None:
        while (output := phoenix.next_output()) is not None:
            match output:
                case Connect():
                    self._connect(phoenix)
                case Send(text):
                    assert self._websocket is not None
                    assert self._stream is not None
                    self._stream.allow(SEND_TIMEOUT)
                    self._websocket.send(text)
                case Disconnect():
                    self._disconnect()
                case event:
                    self._post(event)

    def _wait(self, phoenix: Phoenix) -> None:
        """Wait for a message or the next deadline."""
        deadline = phoenix.poll_timeout()
        if deadline is None:
            return
        timeout = max(0.0, deadline - time.monotonic())
        if self._stream is None or self._websocket is None:
            self._stop.wait(timeout)
        elif self._stream.wait(timeout):
            if self._websocket.cont_frame.cont_data is None:  # else a message goes on
                self._stream.allow(MESSAGE_TIMEOUT, LARGEST_MESSAGE)
            # Not recv(): that returns '' for an empty message as well as for a close.
            opcode, frame = self._websocket.recv_data_frame(control_frame=True)
            if opcode == ABNF.OPCODE_TEXT:
                phoenix.handle_text(frame.data.decode(), time.monotonic())
            elif opcode == ABNF.OPCODE_CLOSE:
                raise StreamError(f"it closed the connection {_close_reason(frame.data)}".rstrip())
            elif opcode == ABNF.OPCODE_BINARY:
                logger.warning("ignored from the portal: a binary frame")

    def _connect(self, phoenix: Phoenix) -> None:
        stream = self._dial()
        self._stream = stream
        if self._tls is not None:
            stream.allow(HANDSHAKE_TIMEOUT, 0)
            stream.secure(self._tls, self._portal.host)
        websocket = WebSocket(enable_multithread=False, skip_utf8_validation=True)
        stream.allow(HANDSHAKE_TIMEOUT, LARGEST_ANSWER)
        status, headers, body = self._open(websocket, stream)
        if status == SWITCHING_PROTOCOLS:
            self._websocket = websocket
            phoenix.handle_connected(time.monotonic())
        else:
            self._disconnect()
            phoenix.handle_rejected(
                status,
                headers,
                body.decode(errors="replace"),
                now=time.monotonic(),
                unix_now=time.time(),
            )

    def _open(self, websocket: WebSocket, stream: Stream) -> tuple[int, dict[str, str], bytes]:
        """Shake hands, and return status, headers by lower-case name, and body of the answer."""
        try:
            websocket.connect(  # type: ignore[no-untyped-call]
                self._portal.url,
                socket=stream,
                header=self._headers,
                suppress_origin=True,
                redirect_limit=0,  # the token is for this host only
            )
        except WebSocketBadStatusException as error:
            return error.status_code, error.resp_headers or {}, error.resp_body or b""
        except WebSocketException:
            # To websocket-client a redirect is a success, if one that leads nowhere.
            if websocket.handshake_response is None:
                raise
        return websocket.getstatus() or 0, websocket.getheaders() or {}, b""

    def _dial(self) -> Stream:
        """Open the connection over which to speak, through a proxy if the environment has one."""
        portal = self._portal
        proxies = getproxies()
        proxy = proxies.get("https" if portal.is_secure else "http") or proxies.get("all")
        if not proxy or proxy_bypass(f"{portal.host}:{portal.port}"):
            return dial(portal.host, portal.port, self._stop, DIAL_TIMEOUT)
        try:
            split = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            host, port = split.hostname, split.port or 80
        except ValueError:
            host = None
        if host is None or split.scheme != "http":
            raise StreamError("the proxy in the environment is not http://HOST:PORT")
        try:
            stream = dial(host, port, self._stop, DIAL_TIMEOUT)
        except StreamError as error:
            raise StreamError(f"the proxy: {error}") from error
        self._stream = stream
        stream.allow(HANDSHAKE_TIMEOUT, LARGEST_ANSWER)
        _tunnel(stream, portal, split)
        return stream

    def _disconnect(self) -> None:
        """Close the connection; where it still works, with a word."""
        websocket, stream = self._websocket, self._stream
        self._websocket = self._stream = None
        if websocket is not None and stream is not None and websocket.connected:
            with suppress(Stopped, StreamError, OSError, WebSocketException):
                stream.allow(0, 0)  # if it cannot be said at once, it is left unsaid
                websocket.send_close()
        if stream is not None:
            stream.close()


def _tunnel(stream: Stream, portal: Endpoint, proxy: SplitResult) -> None:
    """Ask an HTTP proxy for a connection to the portal. RFC 9110 §9.3.6."""
    host = f"[{portal.host}]" if ":" in portal.host else portal.host
    lines = [f"CONNECT {host}:{portal.port} HTTP/1.1", f"Host: {host}:{portal.port}"]
    if proxy.username is not None:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {b64encode(login.encode()).decode()}")
    _send_all(stream, "\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)  # no further: what follows is the portal's
        if not byte:
            raise StreamError("the proxy closed the connection")
        answer += byte
    status_line = answer.partition(b"\r\n")[0].decode(errors="replace")
    if not _is_success(status_line.split(" ", 2)):
        raise StreamError(f"the proxy says {status_line!r}")


def _is_success(status_line: Sequence[str]) -> bool:
    return len(status_line) > 1 and status_line[1][:1] == "2"


def _send_all(stream: Stream, data: bytes) -> None:
    while data:
        data = data[stream.send(data) :]


def _close_reason(data: bytes) -> str:
    """Describe a close frame: a code of 16 bits, then text. RFC 6455 §5.5.1."""
    code = str(int.from_bytes(data[:2], "big")) if len(data) >= 2 else ""
    text = "".join(c for c in data[2:].decode(errors="replace") if c.isprintable())
    return f"{code} {text}".strip()


def _reason(error: Exception) -> str:
    if isinstance(error, WebSocketConnectionClosedException):
        return "it closed the connection"
    strerror: str | None = getattr(error, "strerror", None)
    reason = strerror or str(error) or type(error).__name__
    if not isinstance(error, EXPECTED):
        reason = f"{type(error).__name__}: {reason}"
    return "".join(c if c.isprintable() else " " for c in reason[:LONGEST_REASON])
