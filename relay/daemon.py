"""Builds the parts and connects them; starts, drains and stops. Holds no protocol."""

import errno
import logging
import os
import platform
import random
import resource
import secrets
import signal
import time
from functools import partial
from typing import Final, assert_never

from relay import sandbox
from relay.config import Config
from relay.forwarder import LARGEST_DATAGRAM, Forwarder
from relay.metrics import Counters
from relay.net.addresses import WILDCARDS, is_local, local_addresses
from relay.net.mailbox import Mailbox
from relay.net.reactor import Reactor, log_bug
from relay.net.signals import Signals
from relay.net.udp import ListeningSocket, RelayPorts, listen
from relay.portal.client import PortalClient
from relay.portal.endpoint import endpoint
from relay.portal.phoenix import (
    PortalEvent,
    PortalLost,
    PortalReady,
    PortalRefused,
    PortalUnavailable,
)
from relay.stun.address import family_of, format_endpoint
from relay.stun.const import Family
from relay.turn.auth import Authenticator, mint
from relay.turn.channeldata import HEADER_SIZE
from relay.turn.peers import PeerPolicy
from relay.turn.server import Server, Settings
from relay.version import __version__

logger = logging.getLogger("relay.daemon")

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SPARE_DESCRIPTORS: Final = 32  # for everything but relay ports
MAX_CHANNELS: Final = 1 << 18  # at about 1,200 bytes each
WELCOME_LIFETIME: Final = 24 * 3600  # seconds for which the credential printed at start is good


class DaemonError(Exception):
    """The relay cannot start, or cannot go on. *exit_code* is the one to end with."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Daemon:
    """A relay with its sockets bound, ready to run. Raises DaemonError if it cannot be."""

    def __init__(self, config: Config) -> None:
        """Bind the listening sockets and build everything behind them."""
        self._config = config
        self.counters = Counters()
        self.reactor = Reactor(on_bug=self._on_bug)
        self.mailbox: Mailbox[PortalEvent] = Mailbox(self._on_mail)
        self._serving = self._draining = False
        self._failure: DaemonError | None = None
        rng = secrets.SystemRandom() if config.rng_seed is None else _seeded(config.rng_seed)
        self._secret = config.relay_secret or rng.randbytes(32).hex()
        self._welcome_salt = rng.randbytes(8).hex()
        descriptors = _raise_descriptor_limit()

        self._buffer = bytearray(HEADER_SIZE + LARGEST_DATAGRAM)
        self._listeners = {family: self._listen(host) for family, host in config.bind_hosts.items()}
        self._relay_hosts: dict[int, str] = {
            family: self._relay_host(family) for family in config.public_hosts
        }
        ports = range(config.lowest_port, config.highest_port + 1)
        own_hosts = {*config.public_hosts.values(), *config.bind_hosts.values(), *local_addresses()}
        self.server = Server(
            Settings(
                public_hosts=config.public_hosts,
                ports=ports,
                listen_port=config.listen_port,
                max_allocations=config.max_allocations or len(ports),
                max_sockets=descriptors - SPARE_DESCRIPTORS,
                max_channels=MAX_CHANNELS,
                channel_numbers=config.channel_numbers,
                one_allocation_per_username=config.one_allocation_per_username,
                software=config.software,
            ),
            authenticator=Authenticator(self._secret, nonce_key=rng.randbytes(32)),
            peer_policy=PeerPolicy(
                config.allow_peers,
                config.deny_peers,
                own={(host, config.listen_port) for host in own_hosts},
                own_hosts=own_hosts,
            ),
            randbelow=rng.randrange,
            now=self.reactor.clock(),
        )
        self.forwarder = Forwarder(
            self.server,
            buffer=self._buffer,
            listeners=dict(self._listeners),
            open_port=RelayPorts(
                self.reactor,
                self._relay_hosts,
                memoryview(self._buffer)[HEADER_SIZE:],
                self.counters.lost,
            ).open,
            public_hosts=config.public_hosts,
            relay_ports=ports,
            channel_numbers=config.channel_numbers,
            timers=self.reactor,
            unix_clock=time.time,
            is_relay_host=self._is_relay_host,
            counters=self.counters,
        )
        for listener in self._listeners.values():
            self.reactor.register(listener, partial(listener.receive, self._not_yet))
        self.reactor.register(self.mailbox, self.mailbox.deliver)
        self._portal = None if config.token is None else self._portal_client(config.token)

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or SIGHUP and the end of draining. For the main thread.

        Raises DaemonError if the portal ends it.
        """
        sandbox.enter()  # before there is any other thread
        with Signals(ENDING, self._on_signal) as signals:
            self.reactor.register(signals, signals.deliver)
            self.serve()

    def serve(self) -> None:
        """Serve until :meth:`stop` and the end of draining, then close everything.

        Raises DaemonError if the portal ends it.
        """
        try:
            if self._portal is None:
                self._welcome()
                self._begin()
            else:
                logger.info("waiting for the portal at %s", self._config.api_url)
                self._portal.start()
            self.reactor.run()
        finally:
            if self._portal is not None:
                self._portal.stop()
            self.forwarder.close()
            for listener in self._listeners.values():
                listener.close()
            self.mailbox.close()
            self.reactor.close()
            self._farewell()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Refuse new allocations and end when there are none; asked again, end at once."""
        if self._draining or not self.server.allocations:
            self.reactor.stop()
            return
        if self._portal is not None:
            self._portal.stop()  # it must not send us anyone new
        self._draining = True
        self.server.drain()
        self.forwarder.on_last_port_closed = self.reactor.stop
        self.reactor.call_later(self._config.drain_timeout, self.reactor.stop)
        logger.info(
            "draining: %d allocations left, at most %d s",
            self.server.allocations,
            self._config.drain_timeout,
        )

    def _on_mail(self, event: PortalEvent) -> None:
        match event:
            case PortalReady():
                self._begin()
            case PortalLost(detail):
                logger.warning("%s%s", detail, "; relaying meanwhile" if self._serving else "")
            case PortalRefused(detail):
                self._fail(os.EX_NOPERM, detail)
            case PortalUnavailable(detail):
                self._fail(os.EX_UNAVAILABLE, detail)
            case _:
                assert_never(event)

    def _fail(self, exit_code: int, detail: str) -> None:
        self._failure = DaemonError(exit_code, detail)
        self.reactor.stop()

    def _begin(self) -> None:
        """Answer and relay from here on. Once is enough: the portal says init on every join."""
        if self._serving:
            return
        self._serving = True
        for listener in self._listeners.values():
            self.reactor.reassign(
                listener, partial(listener.receive, self.forwarder.on_client_datagram)
            )
        listening = [format_endpoint(*one.address[:2]) for one in self._listeners.values()]
        logger.info(
            "relaying: listening on %s, allocations on ports %d-%d",
            " and ".join(listening),
            self._config.lowest_port,
            self._config.highest_port,
        )

    def _not_yet(self, _size: int, _client: object) -> None:
        """Drop a datagram: the portal has not said that we may serve."""
        self.counters.dropped["not_serving"] += 1

    def _portal_client(self, token: str) -> PortalClient:
        config = self._config
        parameters = {
            "name": config.name,
            "ipv4": config.public_ip4,
            "ipv6": config.public_ip6,
            "port": config.listen_port,
        }
        return PortalClient(
            endpoint(config.api_url, parameters),
            token=token,
            secret=self._secret,
            # The portal looks for a word that begins with relay/.
            user_agent=f"{platform.system()}/{platform.release()} relay/{__version__}",
            post=self.mailbox.post,
            on_start=partial(sandbox.name_thread, "portal"),
        )

    def _on_signal(self, number: int) -> None:
        logger.info("caught %s", signal.Signals(number).name)
        self.stop()

    def _on_bug(self, error: Exception) -> None:
        self.counters.bugs += 1
        log_bug(error)

    def _listen(self, host: str) -> ListeningSocket:
        port = self._config.listen_port
        try:
            return listen(host, port, memoryview(self._buffer), self.counters.lost)
        except OSError as error:
            where = format_endpoint(host, port)
            in_use = error.errno == errno.EADDRINUSE
            raise DaemonError(
                os.EX_CANTCREAT if in_use else os.EX_OSERR,
                f"cannot listen on {where} (UDP): {error.strerror}",
            ) from error

    def _is_relay_host(self, host: str) -> bool:
        """Tell if relay ports send from *host*: the one they are bound to, or any of ours."""
        bound = self._relay_hosts[family_of(host)]
        return is_local(host) if bound in WILDCARDS else host == bound

    def _relay_host(self, family: Family) -> str:
        """Choose where relay ports are bound: peers must see them at the public address.

        On a host with several addresses only binding to it makes the kernel send from it.
        Behind a 1:1 NAT it is not ours to bind, and the listening address has to do.
        """
        public, bind = self._config.public_hosts[family], self._config.bind_hosts[family]
        return public if bind in WILDCARDS and is_local(public) else bind

    def _welcome(self) -> None:
        config = self._config
        expiry = int(time.time()) + WELCOME_LIFETIME
        username, password = mint(expiry, self._welcome_salt, self._secret)
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expiry))
        lines = [f"TURN URL:   {url}" for url in config.urls]
        lines += [
            f"username:   {username}",
            f"credential: {password}",
            f"(good until {until}; --mint makes others)",
        ]
        try:
            print("\n".join(lines), flush=True)
        except OSError as error:  # nobody reads it; that is no reason not to serve
            logger.warning("cannot print the credential: %s", error.strerror)

    def _farewell(self) -> None:
        dropped = ", ".join(f"{count} {why}" for why, count in self.counters.dropped.items())
        logger.info("stopped; datagrams dropped: %s", dropped or "none")
        if self.counters.bugs:
            logger.error("%d handlers failed: these are bugs", self.counters.bugs)


def _seeded(seed: int) -> random.Random:
    logger.warning("rng-seed is set: secrets, nonces and ports can be predicted")
    return random.Random(seed)  # noqa: S311 - asked for, and warned about


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
