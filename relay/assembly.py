"""From a ``Config`` to the parts of a relay, connected."""

import errno
import logging
import os
import platform
import random
import secrets
import socket
import time
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from relay.config.differences import differences
from relay.config.model import Config, ConfigError
from relay.datapath.clientside import NotServing
from relay.datapath.datapath import DataPath
from relay.datapath.destination import ClientDestination
from relay.datapath.workspace import Workspace
from relay.host import systemd
from relay.host.inherited import Place, inherited_listeners
from relay.host.limits import raise_descriptor_limit
from relay.host.sandbox import name_thread
from relay.host.supervision import Supervision
from relay.net.addresses import pack
from relay.net.hostaddresses import HostAddresses, Union, host_addresses
from relay.net.listening import ListeningSocket, adopt, inherit, listen
from relay.net.mailbox import Mailbox
from relay.net.offload import Offload
from relay.net.porthosts import PortHosts
from relay.net.reactor import Reactor, log_bug
from relay.net.stream import STREAM_FULL, End
from relay.net.streams import Limits, Streams, adopt_tcp, listen_tcp
from relay.net.udp import USUAL_LOSSES, PortOpener, PortSocket, Receiver, Shared
from relay.observe.counters import STREAM_TRANSPORTS, Connections, Counters
from relay.observe.http import HealthServer
from relay.observe.monitor import Monitor
from relay.observe.statuspage import About
from relay.portal.client import PortalClient
from relay.portal.endpoint import endpoint
from relay.portal.phoenix import PortalEvent
from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.const import Family
from relay.turn.auth import Authenticator, AuthFailure
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Drop,
    InstallPermissions,
    UnbindChannel,
    connection_of,
)
from relay.turn.peers import RULES, PeerPolicy
from relay.turn.server import Server
from relay.turn.settings import Settings
from relay.version import __version__
from relay.xdp import XdpError

if TYPE_CHECKING:
    from relay.xdp.attach import KernelPath
    from relay.xdp.routes import LostControl, RouteMap

# What is said here is said once, at start, and must not fall under the rate limit of the log.
logger = logging.getLogger("relay.daemon")

SPARE_DESCRIPTORS: Final = 32  # for everything but relay ports and HTTP
HTTP_DESCRIPTORS: Final = 288
MAX_CONNECTIONS: Final = 10_000  # unless somebody says otherwise
MAX_CHANNELS: Final = 1 << 18  # at about 1,250 bytes each

# What is worth a 0 before it is counted.
KNOWN_DROPS: Final = (*(reason.value for reason in Drop), *USUAL_LOSSES, STREAM_FULL)
KNOWN_AUTH_FAILURES: Final = tuple(reason.value for reason in AuthFailure)


class DaemonError(Exception):
    """The relay cannot start, or cannot go on. *exit_code* is the one to end with."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class Parts:
    """The parts of a relay. Its sockets are bound; nothing of it runs yet."""

    reactor: Reactor
    mailbox: Mailbox[PortalEvent]
    counters: Counters
    listeners: dict[Family, ListeningSocket]
    streams: Streams | None  # None: neither TCP nor TLS
    server: Server
    authenticator: Authenticator
    datapath: DataPath
    opener: PortOpener  # of relay ports
    kernel_path: "KernelPath | None"  # None: nothing is to be relayed there
    monitor: Monitor
    supervision: Supervision
    addresses: HostAddresses | None  # None: the kernel does not tell
    own_hosts: Container[bytes]  # the addresses of this host, packed, as of now
    peer_policy: PeerPolicy  # which asks for them
    port_hosts: PortHosts
    health: HealthServer | None
    portal: PortalClient | None
    descriptors: int  # the limit of open files
    max_sockets: int  # for relay ports: what the limit of open files leaves
    secret: str = field(repr=False)  # of which credentials are made
    salt: str  # for the credential that is made at start

    def abandon(self) -> None:
        """End every thread; all sockets are another process's, and close with this one."""
        if self.portal is not None:
            self.portal.close()
        if self.health is not None:
            self.health.stop()

    def close(self) -> None:
        """Close every socket and end every thread."""
        if self.portal is not None:
            self.portal.close()
        if self.health is not None:
            self.health.stop()
        if self.kernel_path is not None:
            self.kernel_path.close()
        if self.streams is not None:
            self.streams.close()
        self.datapath.close()
        for listener in self.listeners.values():
            listener.close()
        if self.addresses is not None:
            self.addresses.close()
        self.mailbox.close()
        self.reactor.close()
        self.supervision.close()


@dataclass(slots=True)
class Inherited:
    """What another process has, and this one is to go on with; until then that one uses it."""

    secret: str = field(repr=False)
    salt: str
    nonce_key: bytes = field(repr=False)
    clients: dict[Family, socket.socket]  # listening sockets
    per_address: dict[Family, dict[bytes, socket.socket]]  # of these where they are wildcards
    streams: dict[Place, dict[Family, socket.socket]]  # those for connections
    http: tuple[Address, socket.socket] | None
    in_kernel: tuple[Mapping[str, Any], list[int]] | None  # see KernelPath.dump
    has_lost_portal: bool  # which has taken the relay, and is away


def assemble(
    config: Config,
    on_portal_event: Callable[[PortalEvent], None],
    on_addresses: Callable[[bool], None],
    inherited: Inherited | None = None,
) -> Parts:
    """Bind the listening sockets and build everything behind them.

    ``on_addresses(is_any_new)`` is called when the addresses of this host have changed. What is
    *inherited* is used, and owned, instead of anything new; nothing is read from it yet.
    Raises DaemonError if the system refuses something, ConfigError for what systemd hands over.
    """
    counters = Counters(KNOWN_DROPS)
    reactor = Reactor(on_bug=partial(_on_bug, counters))
    mailbox: Mailbox[PortalEvent] = Mailbox(on_portal_event)
    rng = secrets.SystemRandom() if config.rng_seed is None else _seeded(config.rng_seed)
    secret, salt, nonce_key = rng.randbytes(32).hex(), rng.randbytes(8).hex(), rng.randbytes(32)
    if inherited is not None:
        secret, salt, nonce_key = inherited.secret, inherited.salt, inherited.nonce_key
    secret = config.relay_secret or secret
    descriptors = raise_descriptor_limit()

    offload = Offload(wanted=config.offload)
    workspace = Workspace(counters, rng.getrandbits(96))
    handed_over = _handed_over(config) if inherited is None else inherited.streams
    listeners = _listeners(config, workspace, offload, handed_over, inherited)
    listening = [sock for listener in listeners.values() for sock in listener.sockets]
    inherits = inherited is not None
    streams = _streams(config, reactor, counters, handed_over, descriptors, inherits=inherits)
    max_sockets = descriptors - _other_descriptors(config, len(listening), streams)
    addresses = host_addresses()
    own_hosts = Union(frozenset(map(pack, config.public_hosts.values())), addresses)
    port_hosts = PortHosts(
        addresses, public=_by_number(config.public_hosts), bind=_by_number(config.bind_hosts)
    )
    peer_policy = peer_policy_of(config, own_hosts)
    authenticator = Authenticator(config.all_users(secret), nonce_key=nonce_key)
    server = Server(
        settings_of(config, max_sockets),
        authenticator=authenticator,
        peer_policy=peer_policy,
        randbelow=rng.randrange,
        now=reactor.clock(),
    )
    _check_descriptors(config, max_sockets, descriptors)
    for_ports = Shared(workspace.for_peers, counters.lost, offload, config.copy_tos)
    opener = PortOpener(reactor, port_hosts.current, for_ports, "each relay port")
    datapath = DataPath(
        server,
        workspace,
        reach_client=partial(_reach_client, listeners),
        open_socket=partial(_open_port, port_hosts, opener),
        public_hosts=config.public_hosts,
        relay_ports=config.ports,
        channel_numbers=config.channel_numbers,
        timers=reactor,
        unix_clock=time.time,
        is_relay_host=lambda host: port_hosts.are_sources_of(family_of(host), host),
    )
    datapath.routes.watchers.append(_MarkWatcher(listeners))
    for sock in listening:
        reactor.register(sock, sock.reader.on_readable, comes_first=True)
    reactor.register(mailbox, mailbox.deliver, comes_first=True)
    live = addresses if isinstance(addresses, HostAddresses) else None
    if live is not None:
        live.on_change = partial(_on_change, port_hosts, on_addresses)
        reactor.register(live, live.on_readable)
    kernel_path = _kernel_path(config, listeners, datapath, addresses, inherited)
    monitor = Monitor(
        server,
        counters,
        reactor,
        [*listening, opener.queues],
        KNOWN_AUTH_FAILURES,
        RULES,
        None if kernel_path is None else kernel_path.status,
        None if streams is None else partial(_connections, streams),
    )
    return Parts(
        reactor=reactor,
        mailbox=mailbox,
        counters=counters,
        listeners=listeners,
        streams=streams,
        server=server,
        authenticator=authenticator,
        datapath=datapath,
        opener=opener,
        kernel_path=kernel_path,
        monitor=monitor,
        supervision=_supervision(reactor, monitor),
        addresses=live,
        own_hosts=own_hosts,
        peer_policy=peer_policy,
        port_hosts=port_hosts,
        health=_health_server(config, monitor, inherited),
        portal=_portal_client(config, secret, mailbox, inherited),
        descriptors=descriptors,
        max_sockets=max_sockets,
        secret=secret,
        salt=salt,
    )


def settings_of(config: Config, max_sockets: int) -> Settings:
    """Return what the server is to know, at start and after a reload."""
    quotas = config.quotas
    return Settings(
        public_hosts=config.public_hosts,
        ports=config.ports,
        listen_port=config.listen_port,
        max_allocations=config.max_allocations or len(config.ports),
        max_sockets=max_sockets,
        max_channels=MAX_CHANNELS,
        max_permissions=MAX_CHANNELS,
        channel_numbers=config.channel_numbers,
        one_allocation_per_username=config.allows_takeover,
        send_indications=config.serves_send_indications,
        max_allocations_per_username=quotas.allocations_per_user,
        max_allocations_per_ip=quotas.allocations_per_ip,
        max_channels_per_allocation=quotas.channels_per_allocation,
        ignores_refused_peers=config.ignores_refused_peers,
        unauthenticated_rate_per_prefix=config.unauthenticated_rate_per_prefix,
        unauthenticated_rate=config.unauthenticated_rate,
        software=config.software,
    )


def peer_policy_of(config: Config, own_hosts: Container[bytes]) -> PeerPolicy:
    """Return which peers may be reached. *own_hosts* has this host's addresses, as of now."""
    serving_at = {*config.public_hosts.values(), *config.bind_hosts.values()}
    own = {(host, config.listen_port) for host in serving_at}
    if config.http_addr is not None:
        own.add(config.http_addr)
    return PeerPolicy(config.allow_peers, config.deny_peers, own=own, own_hosts=own_hosts)


def _on_bug(counters: Counters, error: Exception) -> None:
    counters.bugs += 1
    log_bug(error)


def _seeded(seed: int) -> random.Random:
    logger.warning("rng-seed is set: secrets, nonces and ports can be predicted")
    return random.Random(seed)  # noqa: S311 - asked for, and warned about


# --- Sockets ---------------------------------------------------------------------------------


def _handed_over(config: Config) -> dict[Place, dict[Family, socket.socket]]:
    """Return the sockets that systemd hands over, by kind and port, then by family."""
    places = [(socket.SOCK_DGRAM, config.listen_port)]
    places += [(socket.SOCK_STREAM, port) for port in _stream_ports(config).values()]
    try:
        handed_over = inherited_listeners(places)
    except systemd.ActivationError as error:
        raise ConfigError(f"systemd: {error}") from error
    for by_family in handed_over.values():
        for family in by_family.keys() - config.bind_hosts.keys():
            logger.info("not listening for %s: there is no public address of it", family.name)
            by_family.pop(family).close()
    return handed_over


def _listeners(
    config: Config,
    workspace: Workspace,
    offload: Offload,
    handed_over: dict[Place, dict[Family, socket.socket]],
    inherited: Inherited | None,
) -> dict[Family, ListeningSocket]:
    """Open a socket for the clients of each family: inherited, handed over by systemd, or our own.

    Until somebody else is to receive what they read, all of that is dropped.
    """
    given = handed_over.get((socket.SOCK_DGRAM, config.listen_port), {})
    shared = Shared(workspace.for_clients, workspace.counters.lost, offload, config.copy_tos)
    receiver = NotServing(workspace)
    listeners: dict[Family, ListeningSocket] = {}
    if inherited is not None:
        for family, sock in inherited.clients.items():
            per_address = inherited.per_address.get(family, {})
            listeners[family] = inherit(sock, per_address, shared, receiver)
    for family, sock in given.items():
        try:
            listeners[family] = adopt(sock, shared, receiver)
        except ValueError as error:
            raise ConfigError(f"systemd has handed over {error}") from error
    for family, host in config.bind_hosts.items():
        if family not in listeners:
            try:
                public = config.public_hosts[family]
                listeners[family] = listen(
                    host, config.listen_port, shared, receiver, public=public
                )
            except OSError as error:
                raise _cannot_listen(host, config.listen_port, "UDP", error) from error
    return listeners


def _stream_ports(config: Config) -> dict[str, int]:
    """Return where connections are taken, by transport."""
    ports = {"tcp": config.tcp_port, "tls": config.tls_port}
    return {transport: port for transport, port in ports.items() if port is not None}


def _streams(
    config: Config,
    reactor: Reactor,
    counters: Counters,
    handed_over: dict[Place, dict[Family, socket.socket]],
    descriptors: int,
    *,
    inherits: bool,
) -> Streams | None:
    """Open sockets for connections at the addresses that UDP listens on; nobody is accepted yet."""
    ports = _stream_ports(config)
    if not ports:
        _close_all(handed_over)
        return None
    limits = limits_of(config, descriptors)
    if config.max_connections is None and limits.connections < MAX_CONNECTIONS:
        logger.info(
            "there is room for %d connections: the limit of open files is %d (ulimit -Hn, "
            "LimitNOFILE=)",
            limits.connections,
            descriptors,
        )
    streams = Streams(reactor, limits, counters.lost, config.tls_identity)
    for transport, port in ports.items():
        given = handed_over.pop((socket.SOCK_STREAM, port), {})
        try:
            for sock in given.values():
                streams.add(adopt_tcp(sock), transport, is_inherited=inherits)
        except ValueError as error:
            raise ConfigError(f"systemd has handed over {error}") from error
        for family, host in config.bind_hosts.items():
            if family not in given:
                try:
                    streams.add(listen_tcp(host, port), transport)
                except OSError as error:
                    raise _cannot_listen(host, port, transport.upper(), error) from error
    _close_all(handed_over)
    return streams


def _close_all(unused: dict[Place, dict[Family, socket.socket]]) -> None:
    """Close what was inherited for connections, and is not served any more."""
    for (kind, _), by_family in unused.items():
        if kind == socket.SOCK_STREAM:
            for sock in by_family.values():
                sock.close()


def limits_of(config: Config, descriptors: int) -> Limits:
    """Return how many connections there may be, at start and after a reload."""
    return Limits(
        connections=config.max_connections or min(MAX_CONNECTIONS, max(descriptors // 4, 1)),
        per_address=config.max_connections_per_ip or None,
        proxies=config.proxies,
    )


def _connections(streams: Streams) -> Connections:
    """Say how the connections are, to any thread."""
    return Connections(
        open=dict.fromkeys(STREAM_TRANSPORTS, 0) | dict(streams.open),
        accepted=dict.fromkeys(STREAM_TRANSPORTS, 0) | dict(streams.accepted),
        ended={why.value: 0 for why in End} | {w.value: n for w, n in dict(streams.ended).items()},
        queued=streams.queued,
        certificate_expires=streams.certificate_expires,
    )


def _cannot_listen(host: str, port: int, protocol: str, error: OSError) -> DaemonError:
    problem = f"cannot listen on {format_endpoint(host, port)} ({protocol}): {error.strerror}"
    match error.errno:
        case errno.EADDRINUSE:
            return DaemonError(os.EX_CANTCREAT, problem)
        case errno.EACCES:  # to try again would not help
            return DaemonError(
                os.EX_CONFIG,
                f"{problem}. To open port {port} takes a privilege: have systemd open it, by a "
                "socket unit, or give CAP_NET_BIND_SERVICE (AmbientCapabilities=), or lower "
                "net.ipv4.ip_unprivileged_port_start by sysctl",
            )
        case _:
            return DaemonError(os.EX_OSERR, problem)


class _MarkWatcher:
    """Has the sockets for clients look for DSCP and ECN whenever a flow may begin."""

    def __init__(self, listeners: dict[Family, ListeningSocket]) -> None:
        self._listeners = listeners

    def bound(self, bind: BindChannel) -> None:
        """Expect data from a client."""
        self._look(bind.client)

    def unbinding(self, unbind: UnbindChannel) -> None:
        """Expect nothing."""

    def closing(self, close: ClosePort) -> None:
        """Expect nothing."""

    def permitted(self, install: InstallPermissions) -> None:
        """Expect data from a client."""
        self._look(install.client)

    def _look(self, client: ClientAddress) -> None:
        if connection_of(client) is None:
            self._listeners[family_of(client[0][0])].look_for_marks()


def _reach_client(
    listeners: dict[Family, ListeningSocket], client: ClientAddress
) -> ClientDestination:
    address, local = client
    assert isinstance(local, bytes)
    return listeners[family_of(address[0])].reach((address, local))


def _client_side(
    listeners: dict[Family, ListeningSocket], client: ClientAddress
) -> tuple[str, int]:
    """Return the address of ours that a client writes to, with the port."""
    address, local = client
    assert isinstance(local, bytes)
    return listeners[family_of(address[0])].local_address((address, local))


def _by_number(hosts: dict[Family, str]) -> dict[int, str]:
    return {int(family): host for family, host in hosts.items()}


def _open_port(
    hosts: PortHosts, opener: PortOpener, family: int, port: int, receiver: Receiver
) -> PortSocket:
    return hosts.open(family, partial(opener.open, family, port, receiver))


def _on_change(
    port_hosts: PortHosts,
    on_addresses: Callable[[bool], None],
    touched: Collection[bytes],
    is_any_new: bool,
) -> None:
    port_hosts.on_change(touched)
    on_addresses(is_any_new)


def _other_descriptors(config: Config, listening: int, streams: Streams | None) -> int:
    """Return how many descriptors have to be left for what is no relay port."""
    needed = listening + SPARE_DESCRIPTORS + (HTTP_DESCRIPTORS if config.http_addr else 0)
    return needed if streams is None else needed + streams.most_descriptors


def _check_descriptors(config: Config, max_sockets: int, descriptors: int) -> None:
    """Say how many allocations the limit of open files leaves room for, if it bounds them."""
    settings = settings_of(config, max_sockets)
    room = max_sockets // len(settings.public_hosts)
    limit = f"the limit of open files is {descriptors} (ulimit -Hn, LimitNOFILE=)"
    if room < 1:
        raise DaemonError(os.EX_OSERR, f"no allocation would be possible: {limit}")
    if room < min(settings.max_allocations, len(settings.ports)):
        logger.info("there is room for %d allocations of all families: %s", room, limit)


# --- In the kernel ---------------------------------------------------------------------------


def _kernel_path(
    config: Config,
    listeners: dict[Family, ListeningSocket],
    datapath: DataPath,
    addresses: Container[bytes],
    inherited: Inherited | None,
) -> "KernelPath | None":
    """Have the kernel relay channels, too, if that is wanted. Raises DaemonError.

    A successor goes on with what there is: to attach something takes privileges, as a rule, and
    what is attached must not relay what another process still sees to.
    """
    if config.xdp is None:
        if inherited is not None and inherited.in_kernel is not None:
            for descriptor in inherited.in_kernel[1]:  # the last ones detach it
                os.close(descriptor)
        return None
    try:
        # Only here: it takes ctypes, which not every Python has, or may use.
        from relay.xdp.attach import KernelPath  # noqa: PLC0415
        from relay.xdp.devices import usual_devices  # noqa: PLC0415
        from relay.xdp.routes import KernelRoutes  # noqa: PLC0415
    except (ImportError, MemoryError, OSError) as error:
        leave_to_sockets(config, XdpError(f"it takes ctypes: {error}"))
        return None

    def make_routes(routes: "RouteMap", *, on_lost_control: "LostControl") -> KernelRoutes:
        return KernelRoutes(
            routes,
            client_side=partial(_client_side, listeners),
            port_host=lambda port, family: datapath.ports[port].host(family),
            public_hosts=config.public_hosts,
            relay_ports=config.ports,
            is_own_host=lambda host: pack(host) in addresses,
            copies_tos=config.copy_tos != "off",
            on_lost_control=on_lost_control,
        )

    hosts = (*config.public_hosts.values(), *config.bind_hosts.values())
    path = KernelPath(
        config.xdp,
        config.xdp_devices or usual_devices(hosts),
        make_routes,
        are_named=bool(config.xdp_devices),
    )
    try:
        if inherited is None:
            path.start(config.public_hosts)
        elif inherited.in_kernel is None:
            raise XdpError("nothing is in the kernel so far, and to begin with it takes a restart")
        else:
            path.inherit(*inherited.in_kernel)
    except XdpError as error:
        path.close()
        leave_to_sockets(config, error)
    else:
        assert path.routes is not None
        datapath.routes.watchers.append(path.routes)
    return path


def leave_to_sockets(config: Config, error: XdpError) -> None:
    """Say that the kernel relays nothing, and why. Raises DaemonError if it has to."""
    if config.xdp == "require":
        raise DaemonError(os.EX_OSERR, f"xdp: {error} (--xdp auto leaves it to the sockets)")
    logger.warning("xdp: %s; the sockets relay everything", error)


# --- Around them -----------------------------------------------------------------------------


def _supervision(reactor: Reactor, monitor: Monitor) -> Supervision:
    watchdog = systemd.watchdog_interval(os.environ, os.getpid())
    return Supervision(systemd.Notifier(os.environ), watchdog, reactor, monitor.line)


def _health_server(
    config: Config, monitor: Monitor, inherited: Inherited | None
) -> HealthServer | None:
    address = config.http_addr
    listening = None
    if inherited is not None and inherited.http is not None:
        if inherited.http[0] == address:
            listening = inherited.http[1]
        else:
            inherited.http[1].close()
    if address is None:
        return None
    try:
        server = HealthServer(
            *address,
            monitor.status,
            version=__version__,
            on_start=partial(name_thread, "health"),
            listening=listening,
        )
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        problem = f"cannot serve HTTP on {format_endpoint(*address)}: {error.strerror}"
        if config.http_addr_given:
            raise DaemonError(os.EX_CANTCREAT if in_use else os.EX_OSERR, problem) from error
        logger.warning("%s; there is no health check and no metrics", problem)
        return None
    server.show(about(config))
    return server


def about(config: Config) -> About:
    """Return what the status page shows of the configuration."""
    return About(config.urls, differences(config))


def _portal_client(
    config: Config, secret: str, mailbox: Mailbox[PortalEvent], inherited: Inherited | None
) -> PortalClient | None:
    if config.token is None:
        return None
    parameters = {
        "name": config.name,
        "ipv4": config.public_ip4,
        "ipv6": config.public_ip6,
        "port": config.listen_port,
    }
    return PortalClient(
        endpoint(config.api_url, parameters),
        token=config.token,
        secret=secret,
        # The portal looks for a word that begins with relay/.
        user_agent=f"{platform.system()}/{platform.release()} relay/{__version__}",
        post=mailbox.post,
        on_start=partial(name_thread, "portal"),
        has_joined=inherited is not None and inherited.has_lost_portal,
    )
