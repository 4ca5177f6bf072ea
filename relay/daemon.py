"""Builds the parts and connects them; starts, reloads, drains and stops. Holds no protocol."""

import errno
import logging
import os
import platform
import random
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, assert_never

from relay.config.model import Config, ConfigError, Reloaded
from relay.datapath.forwarder import LARGEST_DATAGRAM, Forwarder
from relay.host import sandbox, systemd
from relay.host.listening import open_listeners
from relay.net.addresses import WILDCARDS, is_local, local_addresses
from relay.net.mailbox import Mailbox
from relay.net.offload import Offload
from relay.net.reactor import Reactor, log_bug
from relay.net.signals import Signals
from relay.net.udp import ListeningSocket, RelayPorts
from relay.observe import logs
from relay.observe.counters import Counters
from relay.observe.http import HealthServer
from relay.observe.monitor import AUTH_FAILURE_REASONS, DROP_REASONS, Monitor
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
from relay.turn.auth import Authenticator, as_json, mint
from relay.turn.channeldata import HEADER_SIZE
from relay.turn.commands import Drop
from relay.turn.peers import PeerPolicy
from relay.turn.server import Server, Settings
from relay.version import __version__

logger = logging.getLogger("relay.daemon")

CAUGHT: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SPARE_DESCRIPTORS: Final = 32  # for everything but relay ports and HTTP
HTTP_DESCRIPTORS: Final = 288
MAX_CHANNELS: Final = 1 << 18  # at about 1,200 bytes each
WELCOME_LIFETIME: Final = 24 * 3600  # seconds for which the credential printed at start is good
STATUS_INTERVAL: Final = 10.0  # seconds between the lines for systemd
MIN_FEEDING: Final = 0.05  # seconds between two messages for its watchdog, at least
GRACE: Final = 30.0  # seconds that systemd is asked for beyond what something should take
# Whenever the loop calls the system another thread may run Python; it has to let the loop go on
# after this many seconds. With the default of 5 ms one scrape would hold up every datagram.
SWITCH_INTERVAL: Final = 0.0002


class DaemonError(Exception):
    """The relay cannot start, or cannot go on. *exit_code* is the one to end with."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Daemon:
    """A relay with its sockets bound, ready to run. Raises DaemonError if it cannot be."""

    def __init__(self, config: Config, reread: Callable[[Config], Reloaded] | None = None) -> None:
        """Bind the listening sockets and build everything behind them.

        ``reread(config)`` reads the configuration again; it may raise ConfigError.
        """
        self._config = config
        self._reread = reread
        self.counters = Counters()
        self.reactor = Reactor(on_bug=self._on_bug)
        self.mailbox: Mailbox[PortalEvent] = Mailbox(self._on_mail)
        self._serving = self._draining = False
        self._is_named = {name: threading.Event() for name in ("health", "portal")}  # threads
        self._failure: DaemonError | None = None
        rng = secrets.SystemRandom() if config.rng_seed is None else _seeded(config.rng_seed)
        self._secret = config.relay_secret or rng.randbytes(32).hex()
        self._welcome_salt = rng.randbytes(8).hex()
        self._descriptors = _raise_descriptor_limit()
        self._notifier = systemd.Notifier(os.environ)
        self._watchdog = systemd.watchdog_interval(os.environ, os.getpid())

        self._offload = Offload(wanted=config.offload)
        self._buffer = bytearray(HEADER_SIZE + LARGEST_DATAGRAM)
        self._listeners = self._listen()
        self._relay_hosts: dict[int, str] = {
            family: self._relay_host(family) for family in config.public_hosts
        }
        self.server = Server(
            self._settings(),
            authenticator=Authenticator(self._secret, nonce_key=rng.randbytes(32)),
            peer_policy=self._peer_policy(),
            randbelow=rng.randrange,
            now=self.reactor.clock(),
        )
        self._check_descriptors()
        self.monitor = Monitor(self.server, self.counters, self.reactor, self._listeners.values())
        self.forwarder = Forwarder(
            self.server,
            buffer=self._buffer,
            listeners=dict(self._listeners),
            open_port=RelayPorts(
                self.reactor,
                self._relay_hosts,
                memoryview(self._buffer)[HEADER_SIZE:],
                self.counters.lost,
                self._offload,
            ).open,
            public_hosts=config.public_hosts,
            relay_ports=config.ports,
            channel_numbers=config.channel_numbers,
            timers=self.reactor,
            unix_clock=time.time,
            is_relay_host=self._is_relay_host,
            counters=self.counters,
        )
        for listener in self._listeners.values():
            for sock in listener.sockets:
                self.reactor.register(
                    sock, partial(sock.receive, self._not_yet, self._not_yet_either)
                )
        self.reactor.register(self.mailbox, self.mailbox.deliver)
        self._health = self._health_server()
        self._portal = None if config.token is None else self._portal_client(config.token)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT and the end of draining, then close everything.

        For the main thread. Raises DaemonError if the portal ends it, or the sandbox fails.
        """
        try:
            with Signals(CAUGHT, self._on_signal) as signals:
                self.reactor.register(signals, signals.deliver)
                self._start()
                self.reactor.run()
        except sandbox.SandboxError as error:
            raise DaemonError(os.EX_OSERR, str(error)) from error
        finally:
            if self._portal is not None:
                self._portal.stop()
            if self._health is not None:
                self._health.stop()
            self.forwarder.close()
            for listener in self._listeners.values():
                listener.close()
            self.mailbox.close()
            self.reactor.close()
            self._notifier.close()
            self._farewell()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Refuse new allocations and end when there are none; asked again, end at once."""
        self.monitor.not_ready = "draining"
        self._notifier.stopping()
        if self._draining or not self.server.allocations:
            self.reactor.stop()
            return
        self._draining = True
        self._notifier.extend_timeout(self._config.drain_timeout + GRACE)
        if self._portal is not None:
            self._portal.stop()  # it must not send us anyone new
            self.monitor.portal_connected = False
        self.server.drain()
        self.forwarder.on_last_port_closed = self.reactor.stop
        self.reactor.call_later(self._config.drain_timeout, self.reactor.stop)
        logger.info(
            "draining: %d allocations left, at most %d s",
            self.server.allocations,
            self._config.drain_timeout,
        )

    def reload(self) -> None:
        """Read the configuration again and go on with it, or, if it is wrong, as before."""
        if self._reread is None or self._draining:
            logger.warning("not reloaded: %s", "draining" if self._draining else "nothing to read")
            return
        if self._serving:  # before that, READY would say too much
            self._notifier.reloading()
        try:
            reloaded = self._reread(self._config)
        except ConfigError as error:
            logger.error("not reloaded, all stays as it was: %s", error)  # noqa: TRY400
        else:
            self._go_on_with(reloaded)
        finally:
            if self._serving:
                self._notifier.ready()

    def _start(self) -> None:
        """Give up privileges, start the threads, and look at what they may do; then serve."""
        confined = sandbox.enter(self._config.harden)  # before there is any other thread
        sys.setswitchinterval(SWITCH_INTERVAL)
        if self._health is not None:
            self._start_thread(self._health.start, "health")
        if self._portal is not None:
            self.monitor.not_ready = "waiting for the portal"
            self.monitor.portal_connected = False
            self._start_thread(self._portal.start, "portal")
        confined.verify()
        if self._notifier.is_active:
            self._tell_systemd()
        if self._watchdog is not None:
            self._feed_watchdog()
        if self._portal is None:
            self._welcome()
            self._begin()
        else:
            logger.info("waiting for the portal at %s", self._config.api_url)

    def _tell_systemd(self) -> None:
        if not self._serving:  # that the portal is away is no reason to start us anew
            self._notifier.extend_timeout(STATUS_INTERVAL + GRACE)
        self._notifier.status(self.monitor.line())
        self.reactor.call_later(STATUS_INTERVAL, self._tell_systemd)

    def _feed_watchdog(self) -> None:
        """Tell systemd that the loop turns. Nobody else may: a stuck one is to be restarted."""
        assert self._watchdog is not None
        self._notifier.watchdog()
        self.reactor.call_later(max(self._watchdog / 3, MIN_FEEDING), self._feed_watchdog)

    def _go_on_with(self, reloaded: Reloaded) -> None:
        before, config = self._config, reloaded.config
        self._config = config
        logger.info("reloaded; changed: %s", ", ".join(reloaded.changed) or "nothing")
        if reloaded.needs_restart:
            logger.warning("needs a restart to change: %s", ", ".join(reloaded.needs_restart))
        if (config.log_format, config.log_levels) != (before.log_format, before.log_levels):
            logs.configure(config.log_format, config.log_levels)
        self.server.change_settings(self._settings())
        # Whatever has changed: the addresses of this host, which it protects, may be others now.
        self.forwarder.change_peer_policy(self._peer_policy())

    def _on_mail(self, event: PortalEvent) -> None:
        match event:
            case PortalReady():
                self.monitor.portal_joined()
                self._begin()
            case PortalLost(detail):
                self.monitor.portal_connected = False
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
        self.monitor.not_ready = None
        serve = (self.forwarder.on_client_datagram, self.forwarder.on_client_train)
        for listener in self._listeners.values():
            for sock in listener.sockets:
                self.reactor.reassign(sock, partial(sock.receive, *serve))
        listening = [format_endpoint(*one.address[:2]) for one in self._listeners.values()]
        logger.info(
            "relaying: listening on %s, allocations on ports %d-%d",
            " and ".join(listening),
            self._config.lowest_port,
            self._config.highest_port,
        )
        self._notifier.ready()
        self._notifier.status(self.monitor.line())

    def _not_yet(self, _size: int, _client: object) -> None:
        """Drop a datagram: the portal has not said that we may serve."""
        self.counters.dropped[Drop.NOT_SERVING.value] += 1

    def _not_yet_either(self, size: int, segment: int, _client: object) -> int:
        """Drop a train of *size* bytes, in datagrams of *segment*."""
        self.counters.dropped[Drop.NOT_SERVING.value] += -(-size // segment)
        return 0

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
            on_start=partial(self._name_thread, "portal"),
        )

    def _start_thread(self, start: Callable[[], None], name: str) -> None:
        """Start a thread, and wait until it is called *name*. Raises DaemonError."""
        try:
            start()
        except RuntimeError as error:  # RLIMIT_NPROC, TasksMax=
            raise DaemonError(os.EX_OSERR, f"cannot start a thread: {error}") from error
        self._is_named[name].wait()

    def _name_thread(self, name: str) -> None:
        """Name the calling thread, which has just been started."""
        sandbox.name_thread(name)
        self._is_named[name].set()

    def _health_server(self) -> HealthServer | None:
        address = self._config.http_addr
        if address is None:
            return None
        try:
            return HealthServer(
                *address,
                self.monitor.status,
                version=__version__,
                on_start=partial(self._name_thread, "health"),
                drop_reasons=DROP_REASONS,
                auth_failure_reasons=AUTH_FAILURE_REASONS,
            )
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            problem = f"cannot serve HTTP on {format_endpoint(*address)}: {error.strerror}"
            if self._config.http_addr_given:
                raise DaemonError(os.EX_CANTCREAT if in_use else os.EX_OSERR, problem) from error
            logger.warning("%s; there is no health check and no metrics", problem)
            return None

    def _settings(self) -> Settings:
        config = self._config
        spare = SPARE_DESCRIPTORS + (HTTP_DESCRIPTORS if config.http_addr is not None else 0)
        spare += sum(len(listener.sockets) for listener in self._listeners.values())
        return Settings(
            public_hosts=config.public_hosts,
            ports=config.ports,
            listen_port=config.listen_port,
            max_allocations=config.max_allocations or len(config.ports),
            max_sockets=self._descriptors - spare,
            max_channels=MAX_CHANNELS,
            channel_numbers=config.channel_numbers,
            one_allocation_per_username=config.allows_takeover,
            max_allocations_per_username=config.max_allocations_per_username,
            max_allocations_per_ip=config.max_allocations_per_ip,
            unauthenticated_rate_per_prefix=config.unauthenticated_rate_per_prefix,
            unauthenticated_rate=config.unauthenticated_rate,
            software=config.software,
        )

    def _check_descriptors(self) -> None:
        """Say how many allocations the limit of open files leaves room for, if it bounds them."""
        settings = self._settings()
        most = settings.max_sockets // len(settings.public_hosts)
        limit = f"the limit of open files is {self._descriptors} (ulimit -Hn, LimitNOFILE=)"
        if most < 1:
            raise DaemonError(os.EX_OSERR, f"no allocation would be possible: {limit}")
        if most < min(settings.max_allocations, len(settings.ports)):
            logger.info("there is room for %d allocations of all families: %s", most, limit)

    def _peer_policy(self) -> PeerPolicy:
        config = self._config
        own_hosts = {*config.public_hosts.values(), *config.bind_hosts.values(), *local_addresses()}
        own = {(host, config.listen_port) for host in own_hosts}
        if config.http_addr is not None:
            host, port = config.http_addr
            own |= {(one, port) for one in ({host, *own_hosts} if host in WILDCARDS else {host})}
        return PeerPolicy(config.allow_peers, config.deny_peers, own=own, own_hosts=own_hosts)

    def _on_signal(self, number: int) -> None:
        logger.info("caught %s", signal.Signals(number).name)
        match number:
            case signal.SIGHUP:
                self.reload()
            case signal.SIGUSR1:
                logger.info("summary: %s", self.monitor.summary())
            case _:
                self.stop()

    def _on_bug(self, error: Exception) -> None:
        self.counters.bugs += 1
        log_bug(error)

    def _listen(self) -> dict[Family, ListeningSocket]:
        try:
            return open_listeners(
                self._config, memoryview(self._buffer), self.counters.lost, self._offload
            )
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            raise DaemonError(
                os.EX_CANTCREAT if in_use else os.EX_OSERR,
                f"cannot listen on {error.filename} (UDP): {error.strerror}",
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
        """Print how to use this relay: for people, or, as the log is for machines, as JSON."""
        config = self._config
        expiry = int(time.time()) + WELCOME_LIFETIME
        username, password = mint(expiry, self._welcome_salt, self._secret)
        if config.log_format == "json":
            text = as_json(config.urls, username, password, expiry)
        else:
            until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expiry))
            lines = [f"TURN URL:   {url}" for url in config.urls]
            lines += [
                f"username:   {username}",
                f"credential: {password}",
                f"(good until {until}; --mint makes others)",
            ]
            text = "\n".join(lines)
        if not logs.write(sys.stdout, text):  # nobody reads it; that is no reason not to serve
            logger.warning("cannot print the credential: standard output takes nothing")

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
