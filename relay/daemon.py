"""The life of a relay: it starts, serves, reloads, is upgraded, drains and stops. No protocol."""

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, assert_never

from relay.assembly import (
    DaemonError,
    about,
    assemble,
    leave_to_sockets,
    limits_of,
    peer_policy_of,
    settings_of,
)
from relay.config.credentials import as_json, as_text
from relay.config.model import Config, ConfigError, Reloaded
from relay.host import sandbox
from relay.host.identity import require_possible
from relay.host.keeper import PASSED_ON
from relay.net.signals import Signals
from relay.observe import logs
from relay.observe.monitor import listed
from relay.portal.phoenix import (
    PortalEvent,
    PortalLost,
    PortalReady,
    PortalRefused,
    PortalUnavailable,
)
from relay.stun.address import format_endpoint
from relay.turn.users import mint, mint_rest
from relay.upgrade.incoming import Incoming, UpgradeError
from relay.upgrade.launch import Launcher
from relay.upgrade.outgoing import Outgoing
from relay.upgrade.request import DONE, Requests
from relay.xdp import XdpError

logger = logging.getLogger("relay.daemon")

CAUGHT: Final = PASSED_ON  # what the process that was started passes on, if that is another
ECHO: Final = 1.0  # seconds in which the same signal is no second one
DAY: Final = 24 * 3600  # seconds
CREDENTIAL_LIFETIME: Final = DAY  # for which the one printed at start is good
LARGEST_RSA: Final = (
    2048  # bits; one of 4,096 takes ten times as long to sign (bench/test_handshake.py)
)
CERTIFICATE_WARNING: Final = 14 * DAY  # before its end
# Of the garbage collector: how many objects more make it look at the young ones, how many of those
# looks at the middle-aged ones, and how many of these at all. The last it never should: with 16,000
# allocations and 200,000 channels that takes a fifth of a second, in which no datagram is relayed
# (bench/stalls.py). What comes and goes with clients is freed without it, for it makes no cycles.
GC_THRESHOLDS: Final = (2_000, 10, 1 << 30)
# Seconds until channels are checked again after the host has got an address: more often come
# several at once.
RECHECK_DELAY: Final = 1.0
# Whenever the loop calls the system another thread may run Python; it has to let the loop go on
# after this many seconds. With the default of 5 ms one scrape would hold up every datagram.
SWITCH_INTERVAL: Final = 0.0002


class Daemon:
    """A relay with its sockets bound, ready to run. Raises DaemonError if it cannot be."""

    def __init__(
        self,
        config: Config,
        reread: Callable[[Config], Reloaded] | None = None,
        files: Iterable[str] = (),
        launcher: Launcher | None = None,
        incoming: Incoming | None = None,
    ) -> None:
        """Bind and build what *config* asks for. Raises DaemonError, ConfigError, UpgradeError.

        ``reread(config)`` reads the configuration again, from *files* among others; it may raise
        ConfigError. *launcher* starts a successor when that is wanted. With *incoming* this process
        is one, and goes on where another is.
        """
        try:
            require_possible(config.user)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._config = config
        self._reread = reread
        self._files = tuple(files)
        self._launcher = launcher
        self._incoming = incoming
        self._outgoing: Outgoing | None = None
        self.successor: int | None = None  # the process that goes on in place of this one
        self._has_joined = False  # the portal
        self._ended_by, self._ended_at = 0, 0.0  # the last signal to stop, and when it came
        self._is_copying = self._awaits_farewell = incoming is not None
        self._uid = sandbox.user_wanted(config.harden, config.user)
        if launcher is not None:
            _prepare_starter(self._uid, launcher, incoming)
        if incoming is not None:
            incoming.check(config, self._uid)
        self._parts = assemble(
            config,
            self._on_portal_event,
            self._on_addresses,
            None if incoming is None else incoming.inherited,
        )
        self.reactor = self._parts.reactor
        self._requests = Requests(
            self.reactor, self.upgrade, None if incoming is None else incoming.requests
        )
        self._is_serving = self._is_draining = self._is_recheck_due = False
        self._failure: DaemonError | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT and the end of draining, then close everything.

        Or until a :attr:`successor` serves. For the main thread. Raises DaemonError if the portal
        ends it, or the sandbox fails; UpgradeError if the process before this one is to go on.
        """
        try:
            with Signals(CAUGHT, self._on_signal) as signals:
                self.reactor.register(signals, signals.deliver, comes_first=True)
                self._start()
                self.reactor.run()
                if self.successor is not None:
                    self._pass_on(signals.take(), self.successor)
        except sandbox.SandboxError as error:
            raise DaemonError(os.EX_OSERR, str(error)) from error
        finally:
            self._requests.close()
            if self._is_copying:
                self._parts.abandon()
            else:
                if self.successor is not None and self._parts.health is not None:
                    self._parts.health.leave()
                self._parts.close()
                self._say_goodbye()
        if self.successor is not None and self._launcher and not self._launcher.is_to_stay:
            self._pass_on(_pending(), self.successor)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Refuse new allocations and end when there are none; asked again, end at once."""
        parts, timeout = self._parts, self._config.drain_timeout
        is_second, self._is_draining = self._is_draining, True
        if self._outgoing is not None:
            self._outgoing.cancel("the relay is to stop")
        self._say_if_ready()
        parts.supervision.stopping()
        if is_second or not parts.server.allocations:
            self.reactor.stop()
            return
        parts.supervision.will_take(timeout)
        if parts.portal is not None:
            parts.portal.stop()  # it must not send us anyone new
            parts.monitor.portal_connected = False
        parts.server.drain()
        parts.datapath.when_empty(self.reactor.stop)
        self.reactor.call_later(timeout, self.reactor.stop)
        logger.info(
            "draining: %d allocations left, at most %d s", parts.server.allocations, timeout
        )

    def reload(self) -> None:
        """Read the configuration again and go on with it, or, if it is wrong, as before."""
        if self._reread is None or self._is_draining:
            why = "draining" if self._is_draining else "nothing to read"
            logger.warning("not reloaded: %s", why)
            return
        if self._outgoing is not None:
            self._outgoing.is_to_reload = True  # it may have read the configuration before that
        self._parts.supervision.reloading()
        try:
            reloaded = self._reread(self._config)
        except ConfigError as error:
            logger.error("not reloaded, all stays as it was: %s", error)  # noqa: TRY400
        else:
            self._go_on_with(reloaded)
        finally:
            self._parts.supervision.reloaded()

    def upgrade(self) -> str | None:
        """Start the program anew from disk, and have it go on from here; or go on as before.

        Returns why there is nothing to wait for, or None.
        """
        why = None
        if self._is_draining:
            why = "draining"
        elif self._outgoing is not None:
            why = "an upgrade is under way"
        if why is not None or self._launcher is None:
            logger.warning("not upgraded: %s", why or "nothing to start")
            return why
        logger.info("upgrading: the program is started anew, and is to go on from here")
        try:
            self._outgoing = Outgoing(
                self._config,
                self._parts,
                self._launcher,
                uid=self._uid,
                is_serving=self._is_serving,
                requests=self._requests.first if self._launcher.is_kept else None,
                on_failed=self._on_upgrade_failed,
                on_replaced=self._on_replaced,
            )
        except OSError as error:
            reason = f"the program cannot be started: {error}"
            self._on_upgrade_failed(reason)
            return reason
        return None

    def _on_upgrade_failed(self, reason: str) -> None:
        self._outgoing = None
        logger.error("not upgraded, all stays as it was: %s", reason)
        self._requests.answer(f"not {reason}")

    def _on_replaced(self, successor: int) -> None:
        """Leave: from here on nothing may be sent that the successor will send."""
        assert self._outgoing is not None
        assert self._launcher is not None
        self.reactor.stop()
        self.successor = successor
        # What comes in from here on waits to be passed on.
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        if not self._launcher.is_to_stay:
            self._parts.supervision.replaced_by(successor)
        if self._parts.streams is not None:
            self._parts.streams.leave()
        self._outgoing.say_farewell()
        self._requests.answer(f"{DONE} process {successor} serves")

    def _pass_on(self, numbers: Iterable[int], successor: int) -> None:
        """Let the successor have the signals that came when nobody looked any more."""
        assert self._launcher is not None
        # A service manager sends those to every process of the service.
        from_manager = () if self._launcher.is_kept else (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            if number not in from_manager:
                with suppress(OSError):
                    os.kill(successor, number)

    def _say_goodbye(self) -> None:
        counters = self._parts.counters
        if self.successor is None:
            logger.info("stopped; datagrams dropped: %s", listed(self._parts.monitor.dropped()))
            if counters.bugs:
                logger.error("%d handlers failed: these are bugs", counters.bugs)

    def _take_over(self, incoming: Incoming) -> None:
        """Go on where the other process is, as soon as all is here. Raises UpgradeError."""
        parts = self._parts
        if incoming.must_join_portal and parts.portal is not None:
            incoming.wait_for_portal(parts, self._has_joined_portal)
        incoming.copy(parts)
        if incoming.was_serving or self._has_joined:
            self._begin_to_serve()
        gc.freeze()
        incoming.serve(self._on_farewell)
        self._is_copying = False
        for listener in parts.listeners.values():
            listener.take_over()
        incoming.take_over_routes()
        signal.alarm(0)  # which was to end this process if it came to nothing
        if incoming.is_to_reload:
            self.reactor.call_later(0.0, self.reload)
        # What is relayed was held against the rules and addresses of the other process.
        self.reactor.call_later(RECHECK_DELAY, self._check_peers)

    def _has_joined_portal(self) -> bool:
        """Tell if the portal knows this process. Raises UpgradeError if it never will."""
        if self._failure is not None:
            raise UpgradeError(str(self._failure))
        return self._has_joined

    def _on_farewell(self) -> None:
        """Speak for the relay: the service manager knows of this process by now."""
        self._awaits_farewell = False
        if self._launcher is not None and self._launcher.has_keeper:
            self._parts.supervision.on_alone = self._on_keeper_gone
        self._parts.supervision.start()
        if self._is_serving:
            self._parts.supervision.ready()

    def _on_keeper_gone(self) -> None:
        """End as well: whoever has started the relay takes it for ended."""
        logger.error("the process that was started is gone: it drains, and ends")
        self.stop()

    def _start(self) -> None:
        """Give up privileges, start the threads, and look at what they may do; then serve."""
        parts = self._parts
        readable = [path for path in self._files if os.access(path, os.R_OK)]
        # Before there is any other thread.
        confined = sandbox.enter(self._config.harden, self._config.user)
        for path in readable:
            if not os.access(path, os.R_OK):
                logger.warning(
                    "a reload will fail: %s can be read by root, but not by uid %d, as which the "
                    "relay goes on",
                    path,
                    os.geteuid(),
                )
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.collect()
        gc.freeze()  # what there is by now stays, so it need not be looked at again
        gc.set_threshold(*GC_THRESHOLDS)
        # Signals are for this thread only, which can then hold them back for all.
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        try:
            if parts.health is not None:
                parts.health.start(serves=self._incoming is None)
            if parts.portal is not None:
                parts.monitor.portal_connected = False
                self._say_if_ready()
                parts.portal.start()
        except RuntimeError as error:  # RLIMIT_NPROC, TasksMax=
            raise DaemonError(os.EX_OSERR, f"cannot start a thread: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        confined.verify()
        if parts.kernel_path is not None and self._incoming is None:
            try:
                parts.kernel_path.verify()
            except XdpError as error:
                leave_to_sockets(self._config, error)
        if self._incoming is not None:
            self._take_over(self._incoming)
            self._requests.start()
            if parts.health is not None:
                parts.health.serve()
            self._look_at_certificate()
            if self._is_serving:
                self._say_where()
            return
        self._requests.start()
        parts.supervision.start()
        self._look_at_certificate()
        if parts.portal is None:
            if self._config.print_credential or (
                self._config.print_credential is None and os.isatty(1)
            ):
                self._print_credential()
            else:
                logger.info(
                    "credentials: with a secret from a file --mint prints one; --print-credential "
                    "prints one at the start"
                )
            self._serve()
        else:
            logger.info("waiting for the portal at %s", self._config.api_url)

    def _serve(self) -> None:
        """Answer and relay from here on. Once is enough: the portal says init on every join."""
        if self._is_serving:
            return
        self._begin_to_serve()
        self._say_where()
        if not self._awaits_farewell:
            self._parts.supervision.ready()

    def _begin_to_serve(self) -> None:
        self._is_serving = True
        self._say_if_ready()
        for listener in self._parts.listeners.values():
            listener.hand_to(self._parts.datapath.clients)
        if self._parts.streams is not None:
            self._parts.streams.start(self._parts.datapath.stream_clients)

    def _say_where(self) -> None:
        listeners, streams = self._parts.listeners.values(), self._parts.streams
        places = [format_endpoint(*one.address[:2]) for one in listeners]
        if streams is not None:
            places += [
                f"{format_endpoint(*address)} ({transport.upper()})"
                for transport, address in streams.addresses
            ]
        logger.info(
            "relaying: listening on %s, allocations on ports %d-%d",
            " and ".join(places),
            self._config.lowest_port,
            self._config.highest_port,
        )

    def _go_on_with(self, reloaded: Reloaded) -> None:
        before, config = self._config, reloaded.config
        self._config = config
        logger.info("reloaded; changed: %s", ", ".join(reloaded.changed) or "nothing")
        if reloaded.needs_restart:
            logger.warning("needs a restart to change: %s", ", ".join(reloaded.needs_restart))
        if (config.log_format, config.log_levels) != (before.log_format, before.log_levels):
            logs.configure(config.log_format, config.log_levels)
        if self._parts.health is not None:
            self._parts.health.show(about(config))
        self._parts.server.change_settings(settings_of(config, self._parts.max_sockets))
        if (config.auth_secrets, config.users) != (before.auth_secrets, before.users):
            self._parts.authenticator.change_users(config.all_users(self._parts.secret))
        streams = self._parts.streams
        if streams is not None:
            streams.change_limits(limits_of(config, self._parts.descriptors))
            identity = config.tls_identity
            if identity is not None and identity != before.tls_identity:
                streams.change_identity(identity)
                self._look_at_certificate()
        self._parts.port_hosts.look_at_all()
        self._say_if_ready()
        self._parts.peer_policy = peer_policy_of(config, self._parts.own_hosts)
        self._check_peers()

    def _look_at_certificate(self) -> None:
        """Warn if the certificate for TLS ends soon, today and on each day from now on."""
        identity = self._config.tls_identity
        if identity is None:
            return
        self.reactor.call_later(DAY, self._look_at_certificate)
        if identity.chain.rsa_bits > LARGEST_RSA:
            logger.warning(
                "the certificate's key is RSA of %d bits: each handshake of TLS holds up all "
                "datagrams for some milliseconds; with ECDSA (P-256) it is a fifth of one",
                identity.chain.rsa_bits,
            )
        left = identity.chain.expires - time.time()
        end = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(identity.chain.expires))
        if left <= 0:
            logger.error("the certificate for TLS has ended: %s", end)
        elif left < CERTIFICATE_WARNING:
            logger.warning("the certificate for TLS ends in %d days: %s", left // DAY, end)

    def _on_addresses(self, is_any_new: bool) -> None:
        """Go on with other addresses of this host: a peer of today may be one of them now."""
        self._say_if_ready()
        if is_any_new and not self._is_recheck_due:
            self._is_recheck_due = True
            self.reactor.call_later(RECHECK_DELAY, self._check_peers)

    def _check_peers(self) -> None:
        """Have every channel held against the rules and addresses that there are now."""
        self._is_recheck_due = False
        self._parts.datapath.change_peer_policy(self._parts.peer_policy)

    def _say_if_ready(self) -> None:
        """Tell probes if clients may be sent here, and if not, why."""
        missing = self._parts.port_hosts.missing
        if self._is_draining:
            reason = "draining"
        elif not self._is_serving:
            reason = "starting" if self._parts.portal is None else "waiting for the portal"
        else:
            reason = f"this host has lost {missing}" if missing else ""
        self._parts.monitor.not_ready = reason or None

    def _on_portal_event(self, event: PortalEvent) -> None:
        monitor = self._parts.monitor
        if self._is_draining:  # it has been left: what it said before that comes too late
            return
        match event:
            case PortalReady():
                monitor.portal_joined()
                self._has_joined = True
                if not self._is_copying:
                    self._serve()
            case PortalLost(detail):
                monitor.portal_connected = False
                logger.warning("%s%s", detail, "; relaying meanwhile" if self._is_serving else "")
            case PortalRefused(detail):
                self._fail(os.EX_NOPERM, detail)
            case PortalUnavailable(detail):
                self._fail(os.EX_UNAVAILABLE, detail)
            case _:
                assert_never(event)

    def _fail(self, exit_code: int, detail: str) -> None:
        """End with an exit code, once the calls that there are have ended or had their time.

        Whoever has served is to be started again, whatever the portal says: if that is meant, it
        says it again at the start.
        """
        if self._is_serving:
            exit_code = os.EX_UNAVAILABLE
            logger.error("%s: it drains, and ends", detail)
        self._failure = DaemonError(exit_code, detail)
        if not self._is_copying:
            self.stop()

    def _on_signal(self, number: int) -> None:
        logger.info("caught %s", signal.Signals(number).name)
        match number:
            case signal.SIGHUP:
                self.reload()
            case signal.SIGUSR1:
                logger.info("summary: %s", self._parts.monitor.summary())
            case signal.SIGUSR2:
                self.upgrade()
            case _:
                self._on_end(number)

    def _on_end(self, number: int) -> None:
        """Stop, unless that is the same signal once more.

        Where a keeper passes on what it gets, and whoever sends it sends it to all of us, it comes
        twice.
        """
        now = self.reactor.clock()
        is_echo = number == self._ended_by and now - self._ended_at < ECHO
        self._ended_by, self._ended_at = number, now
        has_keeper = self._launcher is not None and self._launcher.has_keeper
        if not (is_echo and has_keeper):
            self.stop()

    def _print_credential(self) -> None:
        """Print how to use this relay: for people, or, as the log is for machines, as JSON."""
        config, expiry = self._config, int(time.time()) + CREDENTIAL_LIFETIME
        if config.has_firezones_users:
            username, password = mint(expiry, self._parts.salt, self._parts.secret)
        elif config.auth_secrets is not None:
            username, password = mint_rest(expiry, self._parts.salt, config.auth_secrets[0])
        else:
            logger.info("TURN URL: %s; users: those of --users-file", " ".join(config.urls))
            return
        write = as_json if config.log_format == "json" else as_text
        if not logs.write(sys.stdout, write(config.urls, username, password, expiry)):
            # Nobody reads it, which is no reason not to serve.
            logger.warning("cannot print the credential: standard output takes nothing")


def _pending() -> list[int]:
    """Return the signals that are blocked and have come."""
    numbers = []
    while (info := signal.sigtimedwait(CAUGHT, 0)) is not None:
        numbers.append(info.si_signo)
    return numbers


def _prepare_starter(uid: int, launcher: Launcher, incoming: Incoming | None) -> None:
    """See to it that a successor can be started as root, if this process is to become *uid*."""
    if incoming is not None and incoming.starter is not None:
        launcher.use(incoming.starter)
    elif uid != os.geteuid():
        try:
            launcher.stay_root_elsewhere()
        except OSError as error:
            raise DaemonError(os.EX_OSERR, f"cannot fork: {error.strerror}") from error
