"""Health checks, metrics and the status page over HTTP, from one thread.

It cannot hurt the data path.

A thread that computes keeps the interpreter's lock from the reactor, however short its work.
So all of HTTP has one thread, and after a slice of work it rests for many times the CPU time
that this took. Whatever comes in, the reactor gives up a few per cent, a millisecond
at a time; what comes faster has to wait.

Whoever waits too long for /healthz may restart a relay that is well. So probes are answered
first, and after each slice of other answers there is a look for new probes: under a flood of
other requests, MAX_CONNECTIONS of them at a time, a probe waits for about 0.1 s. Under one of
probes, or of more connections, it waits for its turn: about 8 ms for each that came before
it, and BACKLOG of them make 4 s. If there are still more, the kernel lets newcomers try
again after a second.

Each connection is good for one request, and for a bounded time. If there are too many the
oldest has to go, so that those which sit there never keep a newcomer out.
"""

import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from math import inf
from typing import Any, Final
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer

from relay.observe.exposition import RelayCollector, Status
from relay.observe.history import PERIOD
from relay.observe.statuspage import (
    FRESH,
    LASTING,
    PAGE,
    SAFETY,
    About,
    Headers,
    StatusPage,
    as_json,
    is_known,
    is_ours,
)

logger = logging.getLogger("relay.observe")

SLICE: Final = 0.001  # seconds of CPU time without a rest; what has begun is finished
REST: Final = 35  # times the CPU time used: 2.8 % of a core at most
MAKING_REST: Final = 200  # times the CPU time to make an answer, until it is made again: 0.5 %
METRICS_AGE: Final = 1.0  # seconds for which /metrics says the same, at least
STATUS_AGE: Final = 1.0  # likewise /status.json
MAX_CONNECTIONS: Final = 256
BACKLOG: Final = 512  # connections that wait to be accepted
ACCEPTS_AT_ONCE: Final = 16
LEAVE_TIMEOUT: Final = 1.0  # seconds
REQUEST_TIMEOUT: Final = 10.0  # seconds from the accept to the last byte of the answer
LARGEST_HEADER: Final = 4096  # bytes
LARGEST_BODY: Final = 1024  # bytes; nobody looks at it
READ_SIZE: Final = 1024  # bytes at a time, of a connection

METHODS: Final = ("GET", "HEAD")
PROBES: Final = ("/healthz", "/readyz")
_BY_NAME: Final = (
    "This page is for the operator: ask for it by address, or as localhost "
    "(ssh -L 8080:127.0.0.1:8080 HOST, and then http://localhost:8080/). By a name, a page of "
    "somebody else could have a browser read it."
)

Answer = tuple[str, Headers, bytes]


class HealthServer:
    """Answers /healthz, /readyz and /metrics, and people at / (statuspage.py)."""

    def __init__(
        self,
        host: str,
        port: int,
        status: Callable[[], Status],
        *,
        version: str,
        cpu_time: Callable[[], float] = time.process_time,
        on_start: Callable[[], None] = lambda: None,
        request_timeout: float = REQUEST_TIMEOUT,
        metrics_age: float = METRICS_AGE,
        listening: socket.socket | None = None,
    ) -> None:
        """Listen on *host*, a literal address, and *port*. Raises OSError.

        A socket that is *listening* there already is used.
        ``::`` is every address of the machine, those of IPv4 included.
        *status*, *cpu_time* (in seconds, of the process), and *on_start* before anything else, are
        called in the thread of this server; :meth:`start` waits for the last one.
        """
        registry = CollectorRegistry()
        registry.register(RelayCollector(status, version=version))
        _ProcessCollector(registry=registry)
        self._on_start = on_start
        self._stopping = threading.Event()
        self._may_serve = threading.Event()
        self._is_leaving = False
        self._is_closed = False
        self._used = 0.0  # CPU time of the thread up to its last rest
        self.status_page = StatusPage(status, version=version, cpu_time=cpu_time)
        self._pages = _Pages(
            status, version, make_wsgi_app(registry), metrics_age, self.status_page
        )
        self._server = _Server(
            _listen(host, port) if listening is None else listening,
            self._pages,
            self._rest,
            request_timeout,
        )
        self.address: tuple[str, int] = self._server.socket.getsockname()[:2]
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self, *, serves: bool = True) -> None:
        """Start the thread. Raises RuntimeError if the system allows no more threads.

        It *serves* at once, or once :meth:`serve` says so.
        """
        if serves:
            self.serve()
        self._thread.start()
        self._has_started.wait()

    def show(self, about: About) -> None:
        """Show what is configured from here on."""
        self.status_page.about = about

    def serve(self) -> None:
        """Accept connections from here on."""
        self._may_serve.set()

    def leave(self) -> None:
        """Answer those who are connected, and leave who comes from here on to another process.

        Takes a moment at most.
        """
        self._is_leaving = True
        self._server.pull_trigger()
        if self._thread.ident is not None:
            self._thread.join(LEAVE_TIMEOUT)

    @property
    def socket(self) -> socket.socket:
        """The listening socket."""
        listening: socket.socket = self._server.socket
        return listening

    def stop(self) -> None:
        """End the thread and close every connection."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stopping.set()
        self._may_serve.set()
        self._server.pull_trigger()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.close_all()

    def _run(self) -> None:
        try:
            self._on_start()
        finally:
            self._has_started.set()
        self._may_serve.wait()
        try:
            while not self._stopping.is_set():
                if self._is_leaving and self._server.has_left():
                    break
                self._sample_if_due()
                history = self.status_page.history
                self._server.serve_some(history.seconds_left(time.monotonic()))
                self._rest()
        except Exception:
            logger.exception("the thread for HTTP is stopped by a bug")

    def _sample_if_due(self) -> None:
        """Take a sample for the charts. If it fails there is one less, and probes go on."""
        try:
            self.status_page.history.sample_if_due(time.monotonic())
        except Exception:
            logger.exception("no sample for the status page; this is a bug")

    def _rest(self) -> bool:
        """Leave the interpreter to the reactor, if it is time, and tell if it was.

        Called after each piece of work. What is kept for a while needs no rest, so rarely is it
        made: /metrics and what the status page asks for.
        """
        used = time.thread_time() - self._pages.making - self._used
        if used < SLICE:
            return False
        self._stopping.wait(REST * used)
        self._used = time.thread_time() - self._pages.making
        return True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":  # whatever net.ipv6.bindv6only says
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host, port))
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


class _ProcessCollector(ProcessCollector):
    """Looks at /proc/self only: the rest of /proc may be hidden (ProcSubset=pid)."""

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


# --- What is answered -----------------------------------------------------------------------


class _Pages:
    """The WSGI application."""

    def __init__(
        self,
        status: Callable[[], Status],
        version: str,
        prometheus: Callable[..., Iterable[bytes]],
        metrics_age: float,
        status_page: StatusPage,
    ) -> None:
        self._status = status
        self._version = version
        self._prometheus = prometheus
        self._metrics = _Kept(self._render, metrics_age)
        self._now = _Kept(lambda: _json(status_page.now()), STATUS_AGE)
        self._last_hour = _Kept(lambda: _json(status_page.last_hour()), PERIOD)
        self._pages = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics.answer,
        }
        self._for_people = {
            "/": self._page,
            "/status.json": self._now.answer,
            "/history.json": self._last_hour.answer,
        }

    @property
    def making(self) -> float:
        """CPU time that took so far what is kept, in seconds."""
        return self._metrics.making + self._now.making + self._last_hour.making

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        page = self._pages.get(path) or self._for_people.get(path)
        if page is None:
            status, headers, body = _text(HTTPStatus.NOT_FOUND, "not found")
        elif method not in METHODS:
            status, headers, body = _text(HTTPStatus.METHOD_NOT_ALLOWED, "read only")
            headers.append(("Allow", ", ".join(METHODS)))
        elif path in self._for_people and not is_ours(environ.get("HTTP_HOST")):
            status, headers, body = _text(HTTPStatus.FORBIDDEN, _BY_NAME)
            headers += SAFETY
        elif path == "/" and is_known(environ.get("HTTP_IF_NONE_MATCH")):
            start_response(_line(HTTPStatus.NOT_MODIFIED), [*SAFETY, *LASTING])
            return []
        else:
            status, headers, body = page()
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]

    def _page(self) -> Answer:
        return _PAGE

    def _healthz(self) -> Answer:
        """Tell if the loop turns. Nothing else: whoever asks may restart the relay."""
        stuck = self._status().stuck
        if stuck is None:
            return _text(HTTPStatus.OK, "ok")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, stuck)

    def _readyz(self) -> Answer:
        reason = self._status().unready
        answer = {"ready": reason is None, "reason": reason, "version": self._version}
        return _answer(
            HTTPStatus.OK if reason is None else HTTPStatus.SERVICE_UNAVAILABLE,
            "application/json",
            json.dumps(answer),
        )

    def _render(self) -> Answer:
        """Ask for one format, whatever the request says, as the answer is not for it alone.

        To compress would cost more than to send, and an Accept header may hold what raises
        in there.
        """
        started: list[tuple[str, Headers]] = []

        def start_response(status: str, headers: Headers) -> None:
            started.append((status, headers))

        request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}
        body = b"".join(self._prometheus(request, start_response))
        ((status, headers),) = started
        return status, headers, body


class _Kept:
    """An answer that is made rarely, whoever asks: to make it takes more than to send it."""

    def __init__(self, make: Callable[[], Answer], age: float) -> None:
        self.making = 0.0  # CPU time that took so far
        self._make = make
        self._age = age
        self._until = 0.0  # monotonic seconds
        self._answer: Answer | None = None

    def answer(self) -> Answer:
        """Return the answer, made anew if it is too old."""
        if self._answer is None or time.monotonic() >= self._until:
            began = time.thread_time()
            self._answer = self._make()
            used = time.thread_time() - began
            self.making += used
            self._until = time.monotonic() + max(self._age, MAKING_REST * used)
        return self._answer


def _text(status: HTTPStatus, line: str) -> Answer:
    return _answer(status, "text/plain; charset=utf-8", line)


def _json(value: object) -> Answer:
    return _answer(HTTPStatus.OK, "application/json", as_json(value), (*SAFETY, *FRESH))


def _answer(
    status: HTTPStatus, content_type: str, text: str, more: Iterable[tuple[str, str]] = ()
) -> Answer:
    headers = [("Content-Type", content_type), *more]
    return _line(status), headers, f"{text}\n".encode()


def _line(status: HTTPStatus) -> str:
    return f"{status} {status.phrase}"


_PAGE: Final = _answer(HTTPStatus.OK, "text/html; charset=utf-8", PAGE, (*SAFETY, *LASTING))


# --- How it is served -----------------------------------------------------------------------


class _Server(TcpWSGIServer):  # type: ignore[misc]  # waitress has no types
    """waitress without threads of its own, and with connections that end."""

    def __init__(
        self,
        sock: socket.socket,
        pages: _Pages,
        rest: Callable[[], bool],
        request_timeout: float,
    ) -> None:
        self.rest = rest
        self._listening = sock
        self.request_timeout = request_timeout
        self.channel_class = _Connection
        self._probes: deque[_Connection] = deque()  # with a complete request
        self._others: deque[_Connection] = deque()
        super().__init__(
            pages,
            _sock=sock,
            bind_socket=False,
            sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
            dispatcher=object(),  # or there would be threads
            adj=Adjustments(
                sockets=[sock],
                backlog=BACKLOG,
                connection_limit=2 * MAX_CONNECTIONS,  # which is never reached
                recv_bytes=READ_SIZE,
                max_request_header_size=LARGEST_HEADER,
                max_request_body_size=LARGEST_BODY,
                ident=None,
                log_socket_errors=False,
            ),
        )

    def serve_some(self, longest: float) -> None:
        """Wait for connections and read from each once; answer all probes, and some others.

        It waits for *longest* seconds at most.
        """
        patience = 0.0 if self._others else min(longest, self._patience())
        wasyncore.loop(patience, use_poll=True, map=self._map, count=1)
        while self._probes:
            self._probes.popleft().answer()
            self.rest()
        self._end_connections()
        while self._others:
            self._others.popleft().answer()
            if self.rest():
                break

    def has_left(self) -> bool:
        """Accept nobody any more; return whether nobody is left who was."""
        self._map.pop(self._fileno, None)
        return not self.active_channels

    def add_task(self, connection: "_Connection") -> None:
        """Queue a connection with a complete request. Called by waitress."""
        request = connection.requests[0]
        is_probe = not request.error and request.path in PROBES
        (self._probes if is_probe else self._others).append(connection)

    def handle_accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            held = len(self.active_channels)
            super().handle_accept()
            if len(self.active_channels) == held:  # nobody waits, or there are no descriptors
                break
        self.rest()

    def _patience(self) -> float:
        """Return the seconds until the oldest connection has to go."""
        oldest = next(iter(self.active_channels.values()), None)
        return inf if oldest is None else max(0.0, oldest.expires_at - time.monotonic())

    def _end_connections(self) -> None:
        """Close those whose time is over, and the oldest if there are too many."""
        now = time.monotonic()
        for connection in list(self.active_channels.values()):  # in the order of their accept
            if connection.expires_at > now and len(self.active_channels) <= MAX_CONNECTIONS:
                break
            connection.handle_close()

    def close_all(self) -> None:
        """Close every connection and the listening socket."""
        for connection in list(self.active_channels.values()):
            connection.handle_close()
        wasyncore.close_all(self._map)
        self._listening.close()  # which may have been left


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Reads the one request of a connection."""

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        return len(data) if self.completed else consumed  # what follows is not looked at

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # such as an address that urllib does not take
            raise ParsingError("cannot be understood") from error
        self.headers["CONNECTION"] = "close"  # whatever it says


class _Connection(HTTPChannel):  # type: ignore[misc]
    """One connection."""

    parser_class = _Parser

    def __init__(self, server: _Server, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.expires_at = time.monotonic() + server.request_timeout
        super().__init__(server, *args, **kwargs)

    def received(self, data: bytes) -> None:
        super().received(data)
        if self.requests:  # complete; there is nothing to look at before it is answered
            self._map.pop(self._fileno, None)
        self.server.rest()

    def answer(self) -> None:
        """Answer the request, and send as much of that as goes at once."""
        if self.connected:  # it may have had to go meanwhile
            self.add_channel()
            self.service()
            self.handle_write()
