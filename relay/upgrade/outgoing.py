"""The running process's side of an upgrade.

While it serves, its loop sends what the successor asks for, a portion at a time. At the end it
stops for as long as the last portion takes, some milliseconds, and if the successor does not say
that it serves, goes on as if nothing had happened.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from relay.assembly import Parts
from relay.config.model import Config
from relay.datapath.relayport import RelayPort
from relay.net.stream import End, Stream
from relay.net.udp import PortSocket
from relay.turn.commands import ClientAddress
from relay.turn.records import FORMAT, dump_client
from relay.upgrade.channel import Closed, Message
from relay.upgrade.launch import Launcher
from relay.version import __version__

logger = logging.getLogger("relay.upgrade")

TIME_LIMIT: Final = 300.0  # seconds for all of it: a launcher may have to install something first
SWITCH_TIME_LIMIT: Final = 2.0  # seconds in which nobody serves, at most
# Allocations in one message: it takes a millisecond to write them, in which no datagram is relayed.
PORTION: Final = 32
STREAMS_AT_ONCE: Final = 100
FEW: Final = 16  # that have changed since they were sent: then it is time to switch
MOST_ROUNDS: Final = 8  # or if there always are more
SHORTEST_WAIT: Final = 0.001  # seconds
REAPING_INTERVAL: Final = 0.05  # seconds
PATIENCE: Final = 5.0  # seconds for a successor that has failed to end by itself
BRIEF_PATIENCE: Final = 0.5
_PID_1: Final = 1


@dataclass(slots=True)
class _Portion:
    """What goes into one message."""

    body: dict[str, list[Any]] = field(
        default_factory=lambda: {
            "gone": [],  # connections
            "streams": [],  # new connections
            "clients": [],  # whose they are, and others that came before
            "changed": [],  # clients: what came of them before counts no more
            "allocations": [],
        }
    )
    descriptors: list[int] = field(default_factory=list)


class Outgoing:
    """One upgrade, from the start of the successor to its end or ours."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        launcher: Launcher,
        *,
        uid: int,
        is_serving: bool,
        requests: socket.socket | None,
        on_failed: Callable[[str], None],
        on_replaced: Callable[[int], None],
    ) -> None:
        """Start a successor, which is to listen to *requests* for the next. Raises OSError.

        At the end either ``on_failed(reason)`` is called, or ``on_replaced(pid)``: then this
        process is to serve nobody any more.
        """
        self._config = config
        self._parts = parts
        self._launcher = launcher
        self._uid = uid
        self._is_serving = is_serving
        self._requests = requests
        self._on_failed = on_failed
        self._on_replaced = on_replaced
        self._transfer = parts.server.transfer
        self.is_to_reload = False  # the configuration may be newer than what the successor has
        self._pid = 0
        self._has_begun = False
        self._rounds = 0
        self._unsent: list[ClientAddress] = []
        self._known: set[ClientAddress] = set()  # whose allocations it has
        self._ports: dict[int, RelayPort] = {}  # whose sockets it has
        self._holders: dict[int, ClientAddress] = {}  # whose it takes them to be
        self._stream_ids: dict[Stream, int] = {}  # those it has
        self._strangers: set[Stream] = set()  # of which it does not know the client
        self._new_streams: list[Stream] = []
        self._stream_changes = -1  # how many there were when that was true
        self._next_stream_id = 0
        self._is_over = False
        self._deadline = self._switch_ends = 0.0
        if launcher.starter is not None:
            _bury_orphans()
        self._channel, self._child = launcher.start()
        self._channel.wait_at_most(SWITCH_TIME_LIMIT)
        reactor = parts.reactor
        reactor.register(self._channel, self._on_message)
        reactor.call_later(TIME_LIMIT, self._time_out)

    def cancel(self, reason: str) -> None:
        """Have no successor."""
        self._fail(reason)

    def say_farewell(self) -> None:
        """Let the successor know that the service manager knows of it."""
        with suppress(Closed, OSError):
            self._channel.send("farewell")
        self._parts.reactor.retire(self._channel)

    # --- What the successor says -------------------------------------------------------------

    def _on_message(self) -> None:
        try:
            message = self._channel.receive()
            message.close()  # none of its messages has descriptors
            self._serve(message)
        except Closed:
            self._fail("")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._fail(f"what the new process says cannot be read: {error}")
        except Exception:
            self._fail("it is stopped by a bug")
            raise

    def _serve(self, message: Message) -> None:
        match message.kind:
            case "hello":
                self._pid = int(message.body["pid"])
                if self._pid <= _PID_1:
                    raise ValueError(f"it is process {self._pid}")
                if FORMAT not in message.body["formats"]:
                    self._fail(
                        f"the new program, {message.body['version']}, cannot read the state of "
                        f"this one, {__version__}: it is of format {FORMAT}"
                    )
                    return
                self._begin()
            case "next":
                self._send_more()
            case "failed":
                self._fail(str(message.body), ends_itself=True)
            case other:
                self._fail(f"the new process says {other!r}, out of order")

    # --- While all goes on -------------------------------------------------------------------

    def _begin(self) -> None:
        """Tell what a successor has to know first, and hand it the sockets that all share."""
        parts, config = self._parts, self._config
        sockets: list[dict[str, Any]] = []
        descriptors: list[int] = []

        def add(descriptor: int, **use: object) -> None:
            sockets.append(use)
            descriptors.append(descriptor)

        for family, listener in parts.listeners.items():
            add(listener.fileno(), use="clients", family=family)
            for local, each in listener.per_address.items():
                add(each.fileno(), use="clients", family=family, local=local.hex())
        if parts.streams is not None:
            for sock, _ in parts.streams.listeners:
                add(sock.fileno(), use="streams")
        if parts.health is not None:
            assert config.http_addr is not None
            add(parts.health.socket.fileno(), use="http", address=config.http_addr)
        starter = self._launcher.starter
        if starter is not None:
            add(starter.fileno(), use="starter")
        if self._requests is not None:
            add(self._requests.fileno(), use="requests")
        in_kernel = None if parts.kernel_path is None else parts.kernel_path.dump()
        if in_kernel is not None:
            descriptors += in_kernel[1]
        self._channel.send(
            "begin",
            {
                "format": FORMAT,
                "uid": self._uid,
                "secret": parts.secret,
                "salt": parts.salt,
                "nonce_key": parts.authenticator.nonce_key.hex(),
                "is_serving": self._is_serving,
                "portal": parts.monitor.portal_connected,
                "public_hosts": list(config.public_hosts.items()),
                "bind_hosts": list(config.bind_hosts.items()),
                "listen_port": config.listen_port,
                "sockets": sockets,
                "in_kernel": None if in_kernel is None else in_kernel[0],
            },
            descriptors,
        )

    def _send_more(self) -> None:
        """Send the next portion; when there is little left, have the loop stop and switch."""
        if not self._has_begun:
            self._has_begun = True
            self._unsent = self._transfer.begin()
        if not self._unsent and not self._new_streams:
            if self._transfer.changed <= FEW or self._rounds == MOST_ROUNDS:
                # When all events of this iteration are served.
                self._parts.reactor.call_at_end(self._switch)
                return
            self._rounds += 1
            self._unsent = self._transfer.take_changed()
        self._send_portion()

    def _send_portion(self) -> None:
        portion = _Portion()
        self._add_streams(portion)
        if not self._new_streams:  # else some of what follows may refer to those left
            now, self._unsent = self._unsent[:PORTION], self._unsent[PORTION:]
            for client in now:
                self._add_allocation(portion, client)
        self._channel.send("portion", portion.body, portion.descriptors)

    def _add_allocation(self, portion: _Portion, client: ClientAddress) -> None:
        """Add what a client has now; what the successor knows of it counts no more."""
        if client in self._known:
            portion.body["changed"].append(dump_client(client))
            self._known.remove(client)
        record = self._transfer.dump(client)
        if record is None:
            return
        self._known.add(client)
        holder = self._holders.get(record["port"])
        if holder is not None and holder != client and holder in self._known:
            portion.body["changed"].append(dump_client(holder))  # it has ended, which comes later
            self._known.remove(holder)
        self._holders[record["port"]] = client
        port = self._parts.datapath.ports[record["port"]]
        families: list[int] | None = None
        if self._ports.get(port.number) is not port:
            self._ports[port.number] = port
            families = [*port.sockets]
            for sock in port.sockets.values():
                assert isinstance(sock, PortSocket)
                portion.descriptors.append(sock.fileno())
        path = self._parts.kernel_path
        in_kernel = {} if path is None or path.routes is None else path.routes.dump(client)
        portion.body["allocations"].append(
            {"record": record, "sockets": families, "in_kernel": in_kernel}
        )

    # --- Connections -------------------------------------------------------------------------

    def _look_at_streams(self) -> list[int]:
        """Note which connections are new, and return the numbers of those that are gone."""
        streams = self._parts.streams
        if streams is None or streams.changes == self._stream_changes:
            return []
        self._stream_changes = streams.changes
        movable = dict.fromkeys(streams.movable())
        gone = [stream for stream in self._stream_ids if stream not in movable]
        self._strangers.difference_update(gone)
        self._new_streams = [stream for stream in movable if stream not in self._stream_ids]
        return [self._stream_ids.pop(stream) for stream in gone]

    def _add_streams(self, portion: _Portion) -> None:
        """Add some connections that are new to the successor, and those that are gone."""
        portion.body["gone"] += self._look_at_streams()
        now = self._new_streams[:STREAMS_AT_ONCE]
        self._new_streams = self._new_streams[STREAMS_AT_ONCE:]
        for stream in now:
            self._stream_ids[stream] = number = self._next_stream_id
            self._next_stream_id += 1
            self._strangers.add(stream)
            portion.body["streams"].append(
                {"id": number, "address": list(stream.address), "transport": stream.transport}
            )
            portion.descriptors.append(stream.fileno())
        for stream in [one for one in self._strangers if one.client is not None]:
            self._strangers.remove(stream)
            client = dump_client(stream.client)
            portion.body["clients"].append([self._stream_ids[stream], client])

    # --- The switch --------------------------------------------------------------------------

    def _switch(self) -> None:
        """Serve nobody, tell what is left, and wait for the successor to serve."""
        if self._is_over:
            return
        self._switch_ends = time.monotonic() + SWITCH_TIME_LIMIT
        try:
            self._unsent = self._transfer.take_changed()
            self._send_portion()
            self._expect("next")
            while self._unsent or self._new_streams:
                self._send_portion()
                self._expect("next")
            self._send_rest()
            self._expect("serving")
        except Closed:
            self._decide("")
        except (OSError, ValueError) as error:
            self._decide(f"the new process does not take over: {error}")
        except Exception:
            self._decide("it is stopped by a bug")
            raise
        else:
            self._succeed()

    def _decide(self, reason: str) -> None:
        """Settle which of both serves: from here on the successor cannot say any more that it does.

        It may have said so a moment ago.
        """
        if self._channel.last_word() == "serving":
            self._succeed()
        else:
            self._fail(reason)

    def _succeed(self) -> None:
        self._is_over = True
        self._parts.reactor.cancel(self._time_out)
        took = time.monotonic() - self._switch_ends + SWITCH_TIME_LIMIT
        logger.info(
            "replaced by process %d, which took %.0f ms to take over", self._pid, took * 1000
        )
        self._on_replaced(self._pid)

    def _expect(self, kind: str) -> None:
        """Wait for the successor to say so. Raises Closed, OSError; ValueError if it does not."""
        self._channel.wait_at_most(max(self._switch_ends - time.monotonic(), SHORTEST_WAIT))
        message = self._channel.receive()
        message.close()
        if message.kind != kind:
            raise ValueError(str(message.body) if message.kind == "failed" else message.kind)

    def _send_rest(self) -> None:
        parts, streams = self._parts, self._parts.streams
        portion = _Portion()
        self._add_streams(portion)
        assert not portion.body["streams"]
        ended = {} if streams is None else {why.value: n for why, n in streams.ended.items()}
        if streams is not None:  # those that will have ended by then
            replaced = len(streams) - len(self._stream_ids)
            ended[End.REPLACED.value] = ended.get(End.REPLACED.value, 0) + replaced
        path = parts.kernel_path
        self._channel.send(
            "switch",
            {
                "gone": portion.body["gone"],
                "clients": portion.body["clients"],
                "rest": self._transfer.dump_rest(),
                "counters": parts.counters.dump(),
                "queues": parts.opener.queues.overflows(),
                "portal_reconnects": parts.monitor.portal_reconnects,
                "unfinished": [
                    [number, stream.dump()] for stream, number in self._stream_ids.items()
                ],
                "next_connection": parts.datapath.stream_clients.next_number,
                "accepted": {} if streams is None else dict(streams.accepted),
                "ended": ended,
                "next_route": 0 if path is None or path.routes is None else path.routes.next_id,
                "is_attached": path is not None and path.is_attached,
                "is_to_reload": self.is_to_reload,
            },
        )

    # --- Failure -----------------------------------------------------------------------------

    def _time_out(self) -> None:
        self._fail(f"the new process has not taken over within {TIME_LIMIT:.0f} s")

    def _fail(self, reason: str, *, ends_itself: bool = False) -> None:
        """Go on as before; an empty *reason* means that the successor has gone without a word."""
        if self._is_over:
            return
        self._is_over = True
        self._transfer.end()
        self._parts.reactor.cancel(self._time_out)
        self._parts.reactor.retire(self._channel)
        # Of one that somebody else has started, and that has said nothing, we may never hear.
        is_known = self._child is not None or self._pid
        self._deadline = time.monotonic() + (PATIENCE if is_known else BRIEF_PATIENCE)
        if reason:
            if not ends_itself:
                self._kill()
            self._on_failed(reason)
            self._reap()
        else:
            self._reap(tell=self._on_failed)

    def _reap(self, tell: Callable[[str], None] | None = None) -> None:
        """Wait for the successor to end, and *tell* how it has; if it does not, make it."""
        code = self._exit_code()
        if code is None and time.monotonic() < self._deadline:
            self._parts.reactor.call_later(REAPING_INTERVAL, partial(self._reap, tell))
            return
        if code is None:
            self._kill()  # and it is buried with the next one
        if tell is not None:
            how = "" if not code else f", with {_in_words(code)}"
            tell(f"the new process has ended before it served{how}")

    def _exit_code(self) -> int | None:
        """Return how the successor has ended; None if it has not, 0 if that cannot be known."""
        if self._child is not None:
            return self._child.poll()
        try:
            ended, status = os.waitpid(self._pid or -1, os.WNOHANG)
        except ChildProcessError:  # it is somebody else's, or was never there
            return None if self._pid and _is_there(self._pid) else 0
        return os.waitstatus_to_exitcode(status) if ended else None

    def _kill(self) -> None:
        with suppress(OSError):  # one that has not given up its privileges ends by its alarm
            if self._child is not None:
                self._child.kill()
            elif self._pid:
                os.kill(self._pid, signal.SIGKILL)


def _bury_orphans() -> None:
    """Forget how successors of earlier upgrades have ended, if we were told too late."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _in_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
