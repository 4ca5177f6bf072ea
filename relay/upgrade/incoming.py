"""The successor's side of an upgrade: it takes what there is, and serves only once it has all.

Until it says "serving" it changes nothing about what the running process has; it may fail at any
moment, and ends then.
"""

import logging
import os
import select
import socket
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from relay.assembly import Inherited, Parts
from relay.config.model import Config
from relay.datapath.adoption import Adoption, Arrival
from relay.host.starter import Starter
from relay.net.stream import End, Stream
from relay.stun.address import family_of
from relay.stun.const import Family
from relay.turn.commands import connection_of
from relay.turn.records import READABLE, UnreadableState, load_client, require_readable
from relay.upgrade.channel import Channel, Closed, Message
from relay.upgrade.launch import VARIABLE
from relay.version import __version__

logger = logging.getLogger("relay.upgrade")

FIRST_WORD_TIMEOUT: Final = 30.0  # seconds
PORTAL_TIMEOUT: Final = 30.0  # seconds to join it, if the running process has


class UpgradeError(Exception):
    """The successor cannot go on where the running process is. The text says why."""


@dataclass(slots=True)
class _Running:
    """What the running process says of itself."""

    uid: int  # as which it serves
    is_serving: bool
    portal: bool | None  # whether it is connected; None: there is none
    hosts: dict[str, dict[Family, str]]  # public ones, and those that it listens at
    listen_port: int
    inherited: Inherited
    starter: Starter | None
    requests: socket.socket | None


class Incoming:
    """The way in: from the first word to the last."""

    def __init__(self, channel: Channel) -> None:
        """Talk over *channel*."""
        self._channel = channel
        self._running: _Running | None = None
        self._parts: Parts
        self._adoption: Adoption[socket.socket]
        self._streams: dict[int, Stream] = {}
        self._is_attached = False  # what is in the kernel
        self._next_route = 0
        self.is_to_reload = False  # the configuration has changed since it was read here

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> "Incoming | None":
        """Return it if this process is a successor. The variable that says so is taken out.

        Raises UpgradeError if it says nonsense.
        """
        text = environment.pop(VARIABLE, None)
        if text is None:
            return None
        try:
            sock = socket.socket(fileno=int(text))
        except (OSError, ValueError):
            raise UpgradeError(
                f"variable {VARIABLE} is {text!r}, which is no socket: only a relay sets it"
            ) from None
        sock.set_inheritable(False)
        return cls(Channel(sock))

    # --- Before anything is done -------------------------------------------------------------

    def begin(self) -> None:
        """Introduce this program, and hear of what there is. Raises UpgradeError."""
        self._channel.wait_at_most(FIRST_WORD_TIMEOUT)
        hello = {"pid": os.getpid(), "version": __version__, "formats": list(READABLE)}
        try:
            self._channel.send("hello", hello)
            message = self._channel.receive()
            require_readable(message.body["format"])
            self._running = _read_begin(message)
        except (Closed, OSError) as error:
            raise UpgradeError("the running process says nothing") from error
        except UnreadableState as error:
            raise UpgradeError(str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UpgradeError(f"the running process says what cannot be read: {error}") from error
        self._channel.wait_at_most(None)

    def check(self, config: Config, uid: int) -> None:
        """Raise UpgradeError if *config* is for another relay than the one that runs.

        *uid* is as which this process is to serve.
        """
        running = self._known
        if uid != running.uid:  # to which a keeper, of the user before, could pass on no signal
            raise UpgradeError(
                f"the relay runs as uid {running.uid}, and would run as {uid}: that takes a restart"
            )
        for kind, before, now in (
            ("public", running.hosts["public"], config.public_hosts),
            ("listening", running.hosts["bind"], config.bind_hosts),
        ):
            for family, host in before.items():
                if now.get(family) != host:
                    raise UpgradeError(
                        f"the {kind} address of {family.name} is {host}, and would be "
                        f"{now.get(family)}: that takes a restart"
                    )
        if config.listen_port != running.listen_port:
            raise UpgradeError(
                f"listen-port is {running.listen_port}, and would be {config.listen_port}: that "
                "takes a restart"
            )

    def failed(self, reason: str) -> bool:
        """Tell why nothing comes of it; return whether somebody hears that."""
        try:
            self._channel.wait_at_most(FIRST_WORD_TIMEOUT)
            self._channel.send("failed", reason)
        except (Closed, OSError):
            return False
        return True

    @property
    def inherited(self) -> Inherited:
        """What there is to go on with."""
        return self._known.inherited

    @property
    def starter(self) -> Starter | None:
        """Who can start the program as root, if there is somebody."""
        return self._known.starter

    @property
    def requests(self) -> socket.socket | None:
        """Where the process that was started is asked for upgrades."""
        return self._known.requests

    @property
    def was_serving(self) -> bool:
        """Whether the running process serves."""
        return self._known.is_serving

    @property
    def must_join_portal(self) -> bool:
        """Whether to take over only once the portal has been joined from here, too.

        Not if it is away. Where there was none, so far, it has to take the relay first.
        """
        return self._known.portal is not False

    @property
    def _known(self) -> _Running:
        assert self._running is not None
        return self._running

    # --- While the other one serves ----------------------------------------------------------

    def wait_for_portal(self, parts: Parts, is_over: Callable[[], bool]) -> None:
        """Hand on what the portal's thread posts until ``is_over()``. Raises UpgradeError."""
        poll = select.poll()
        poll.register(parts.mailbox, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        deadline = parts.reactor.clock() + PORTAL_TIMEOUT
        while not is_over():
            left = deadline - parts.reactor.clock()
            if left <= 0:
                raise UpgradeError(
                    f"the portal has not let the new process in within {PORTAL_TIMEOUT:.0f} s"
                )
            for descriptor, _ in poll.poll(left * 1000):
                if descriptor == self._channel.fileno():
                    raise UpgradeError("the running process wants no successor any more")
                parts.mailbox.deliver()

    def copy(self, parts: Parts) -> None:
        """Enter all that there is, up to the moment at which the other one serves no more.

        Raises UpgradeError.
        """
        self._parts = parts
        path = parts.kernel_path
        self._adoption = Adoption(
            parts.datapath,
            parts.server.transfer,
            parts.opener.adopt,
            None if path is None else path.routes,
        )
        if parts.streams is not None:
            parts.streams.receiver = parts.datapath.stream_clients
        try:
            while True:
                self._channel.send("next")
                message = self._channel.receive()
                if message.kind == "switch":
                    self._enter_rest(message.body)
                    return
                self._enter(message)
        except (Closed, OSError) as error:
            raise UpgradeError(f"the running process says no more: {error}") from error
        except UnreadableState as error:
            raise UpgradeError(str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UpgradeError(f"the running process says what cannot be read: {what}") from error

    def _enter(self, message: Message) -> None:
        """Enter a portion: connections first, for allocations refer to them."""
        body, descriptors = message.body, iter(message.descriptors)
        for number in body["gone"]:
            self._leave(number)
        for each in body["streams"]:
            self._adopt_stream(each, next(descriptors))
        for number, client in body["clients"]:
            self._know(number, client)
        arrivals = [_arrival(each, descriptors) for each in body["allocations"]]
        changed = map(load_client, body["changed"])
        self._adoption.apply(changed, [one for one in arrivals if self._can_reach(one)])
        self._parts.reactor.close_retired()  # what has ended there is not to live on here

    def _can_reach(self, arrival: Arrival[socket.socket]) -> bool:
        """Tell if there is a way to a client: not if TCP is not served here any more.

        Its connection ends with the running process, and its allocation with that.
        """
        client = load_client(arrival.record["client"])
        if connection_of(client) is None or self._parts.datapath.stream_clients.knows(client):
            return True
        for sock in (arrival.sockets or {}).values():
            sock.close()
        return False

    def _enter_rest(self, body: dict[str, Any]) -> None:
        parts = self._parts
        for number in body["gone"]:
            self._leave(number)
        for number, client in body["clients"]:
            self._know(number, client)
        for number, unfinished in body["unfinished"]:
            if number in self._streams:  # else TCP is not served here any more
                self._streams[number].load(unfinished)
        parts.server.transfer.load_rest(body["rest"])
        parts.counters.load(body["counters"])
        parts.opener.queues.add(int(body["queues"]))
        parts.monitor.portal_reconnects = int(body["portal_reconnects"])
        parts.datapath.stream_clients.next_number = int(body["next_connection"])
        if parts.streams is not None:
            parts.streams.accepted.update(body["accepted"])
            ended = body["ended"]
            parts.streams.ended.update({why: ended[why.value] for why in End if why.value in ended})
        self._is_attached, self._next_route = bool(body["is_attached"]), int(body["next_route"])
        self.is_to_reload = bool(body["is_to_reload"])

    # --- Connections -------------------------------------------------------------------------

    def _adopt_stream(self, written: dict[str, Any], descriptor: int) -> None:
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        streams = self._parts.streams
        if streams is None:
            sock.close()
            return
        stream = streams.adopt(sock, tuple(written["address"]), str(written["transport"]))
        self._streams[int(written["id"])] = stream

    def _leave(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            if stream.client is not None:
                self._parts.datapath.stream_clients.abandon(stream.client)
            stream.leave()

    def _know(self, number: int, written: Any) -> None:  # noqa: ANN401
        """Know whose a connection is."""
        stream, streams = self._streams.get(number), self._parts.streams
        if stream is not None and streams is not None:
            client = load_client(written)
            stream.address = client[0]
            streams.settle(stream, client)
            self._parts.datapath.stream_clients.adopt(client, stream)

    # --- Serving -----------------------------------------------------------------------------

    def serve(self, farewell: Callable[[], None]) -> None:
        """Say that this process serves; ``farewell()`` is called when the other one has left.

        Raises UpgradeError: then it has not heard of that, and goes on itself.
        """
        try:
            self._parts.reactor.register(self._channel, partial(self._on_farewell, farewell))
            self._channel.send("serving")
        except (Closed, OSError) as error:
            raise UpgradeError("the running process cannot be told") from error

    def take_over_routes(self) -> None:
        """See to what is in the kernel; the other process does so no more."""
        path = self._parts.kernel_path
        if path is not None:
            path.take_over(is_attached=self._is_attached, next_id=self._next_route)

    def _on_farewell(self, farewell: Callable[[], None]) -> None:
        with suppress(Closed, OSError, ValueError):
            self._channel.receive().close()
        self._parts.reactor.retire(self._channel)
        farewell()


def _arrival(written: dict[str, Any], descriptors: Iterator[int]) -> Arrival[socket.socket]:
    """Read an allocation, with the descriptors of its port if these are new."""
    sockets: dict[Family, socket.socket] | None = None
    if written["sockets"] is not None:
        sockets = {}
        for family in map(Family, written["sockets"]):
            kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
            sock = socket.socket(kind, socket.SOCK_DGRAM, fileno=next(descriptors))
            sock.setblocking(False)
            sockets[family] = sock
    return Arrival(written["record"], sockets, written["in_kernel"])


def _read_begin(message: Message) -> _Running:
    """Read the first message. Raises KeyError, TypeError, ValueError, OSError."""
    body, descriptors = message.body, iter(message.descriptors)
    inherited = Inherited(
        secret=str(body["secret"]),
        salt=str(body["salt"]),
        nonce_key=bytes.fromhex(body["nonce_key"]),
        clients={},
        per_address={},
        streams={},
        http=None,
        in_kernel=None,
        has_lost_portal=bool(body["is_serving"]) and body["portal"] is False,
    )
    starter: Starter | None = None
    requests: socket.socket | None = None
    for use in body["sockets"]:
        sock = socket.socket(fileno=next(descriptors))
        sock.setblocking(False)
        match use["use"]:
            case "clients" if "local" in use:
                by_local = inherited.per_address.setdefault(Family(use["family"]), {})
                by_local[bytes.fromhex(use["local"])] = sock
            case "clients":
                inherited.clients[Family(use["family"])] = sock
            case "streams":
                host, port = sock.getsockname()[:2]
                by_family = inherited.streams.setdefault((socket.SOCK_STREAM, port), {})
                by_family[family_of(host)] = sock
            case "http":
                host, port = use["address"]
                inherited.http = ((str(host), int(port)), sock)
            case "starter":
                sock.setblocking(True)
                starter = Starter(sock)
            case "requests":
                requests = sock
            case _:  # of a later version
                sock.close()
    if body["in_kernel"] is not None:
        inherited.in_kernel = (body["in_kernel"], list(descriptors))
    return _Running(
        uid=int(body["uid"]),
        is_serving=bool(body["is_serving"]),
        portal=body["portal"],
        hosts={
            kind: {Family(number): str(host) for number, host in body[f"{kind}_hosts"]}
            for kind in ("public", "bind")
        },
        listen_port=int(body["listen_port"]),
        inherited=inherited,
        starter=starter,
        requests=requests,
    )
