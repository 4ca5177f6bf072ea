"""``Config``: what the operator wants, checked once when it is built, trusted afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from relay.net.tls import Chain, Identity, hosts_of
from relay.stun.address import Address, format_endpoint
from relay.stun.const import Family
from relay.turn.users import DEFAULT_REALM, Password, Users


class ConfigError(ValueError):
    """The configuration is wrong. The text names the option, the value and where it is from."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much one of the many may take, so that the others have something left. None: no limit."""

    allocations_per_user: int | None
    allocations_per_ip: int | None  # for IPv6, per /64
    channels_per_allocation: int | None


# Without a portal anybody may have a credential: these are shares of 1/64 and 1/16 of the ports,
# and of a quarter of the channels for one user, which nobody needs who only makes calls. A portal
# knows whom it sends: one user has one allocation, and a gateway a channel to each of its clients.
STANDALONE_QUOTAS: Final = Quotas(256, 1024, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be configured. Hosts are spelled as the kernel spells them.

    Raises ConfigError if two values do not go together.
    """

    public_ip4: str | None
    public_ip6: str | None
    bind_ip4: str
    bind_ip6: str
    listen_port: int
    tcp_port: int | None  # None: no TCP
    tls_port: int | None
    tls_chain: Chain | None
    tls_key: str | None = field(repr=False)  # PEM
    proxies: tuple[str, ...]  # CIDR: from where the PROXY protocol is spoken
    lowest_port: int
    highest_port: int
    token: str | None = field(repr=False)  # for the portal; without one there is no portal
    api_url: str
    name: str | None
    relay_secret: str | None = field(repr=False)
    auth_secrets: tuple[str, ...] | None = field(repr=False)  # of the TURN REST convention
    users: dict[str, Password] | None = field(repr=False)  # static ones, by name
    realm: str
    print_credential: bool | None  # None: where somebody sees it, and nobody keeps it
    allow_peers: tuple[str, ...]  # CIDR
    deny_peers: tuple[str, ...]
    one_allocation_per_username: bool | None  # None: as the portal's presence says
    max_allocations: int | None  # None: as many as ports and descriptors allow
    max_allocations_per_username: int | None  # 0: no limit. None: as the portal's presence says
    max_allocations_per_ip: int | None  # likewise; for IPv6, per /64
    max_channels_per_allocation: int | None  # likewise
    max_connections: int | None  # over TCP and TLS. None: as descriptors allow
    max_connections_per_ip: int  # for IPv6, per /64; 0: no limit
    ignore_refused_peers: bool | None  # None: as the portal's presence says
    send_indications: bool | None  # None: as the portal's presence says
    unauthenticated_rate: int  # requests per second; 0: no limit
    unauthenticated_rate_per_prefix: int  # likewise
    channel_numbers: range
    log_format: str
    log_levels: dict[str, int]  # by logger
    http_addr: Address | None
    http_addr_given: bool = field(compare=False)  # False: nobody insists on it
    harden: str
    user: str | None  # whom root becomes; None: an unprivileged one
    offload: bool  # GRO and GSO, where the kernel has them
    copy_tos: Literal["auto", "on", "off"]  # DSCP and ECN
    xdp: Literal["auto", "require", "generic"] | None  # None: nothing is relayed in the kernel
    xdp_devices: tuple[str, ...]  # none: those of the default routes and of our addresses
    drain_timeout: int  # seconds
    software: str | None
    rng_seed: int | None
    # Every option that has a value, as it could be written.
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.lowest_port > self.highest_port:
            raise ConfigError(
                f"lowest-port {self.lowest_port} is above highest-port {self.highest_port}"
            )
        if self.lowest_port == self.highest_port == self.listen_port:
            raise ConfigError(
                f"the only relay port, {self.lowest_port}, is the listen-port: none is left"
            )
        if self.tls_port is not None:
            if self.tls_chain is None or self.tls_key is None:
                missing = "tls-cert" if self.tls_chain is None else "tls-key"
                raise ConfigError(f"tls-port {self.tls_port}: there is no {missing}")
            if self.tls_port == self.tcp_port:
                raise ConfigError(f"tls-port {self.tls_port} is the tcp-port, too")
        if self.token is not None and self.realm != DEFAULT_REALM:
            raise ConfigError(
                f"realm {self.realm!r}: with a token it is {DEFAULT_REALM!r}, for Firezone's "
                "clients sign for that before they are told of another"
            )
        if self.public_ip4 is None and self.public_ip6 is None:
            why = "with a token" if self.token else "on a machine without a route or loopback"
            raise ConfigError(f"public-ip4-addr or public-ip6-addr is needed {why}")

    @property
    def allows_takeover(self) -> bool:
        """Whether an Allocate ends what the same username holds on another socket."""
        if self.one_allocation_per_username is None:
            return self.token is not None
        return self.one_allocation_per_username

    @property
    def has_firezones_users(self) -> bool:
        """Whether there are users of Firezone's kind: unless there are only others."""
        return (
            self.token is not None
            or self.relay_secret is not None
            or (self.auth_secrets is None and self.users is None)
        )

    def all_users(self, secret: str) -> Users:
        """Return who there is; *secret* is the relay's own, which may be configured or drawn."""
        return Users(
            realm=self.realm,
            secret=secret if self.has_firezones_users else None,
            rest_secrets=self.auth_secrets or (),
            static=self.users,
        )

    @property
    def ignores_refused_peers(self) -> bool:
        """Whether a client that asks for a forbidden peer hears "success"."""
        if self.ignore_refused_peers is None:
            return self.token is not None
        return self.ignore_refused_peers

    @property
    def serves_send_indications(self) -> bool:
        """Whether permissions, Send and Data indications relay; else only channels do."""
        if self.send_indications is None:
            return self.token is None
        return self.send_indications

    @property
    def quotas(self) -> Quotas:
        """What one user, one address and one allocation may take."""
        default = Quotas(None, None, None) if self.token is not None else STANDALONE_QUOTAS
        return Quotas(
            _quota(self.max_allocations_per_username, default.allocations_per_user),
            _quota(self.max_allocations_per_ip, default.allocations_per_ip),
            _quota(self.max_channels_per_allocation, default.channels_per_allocation),
        )

    @property
    def ports(self) -> range:
        """The ports for allocations."""
        return range(self.lowest_port, self.highest_port + 1)

    @property
    def public_hosts(self) -> dict[Family, str]:
        """The public address of each family there is, IPv4 first."""
        both = {Family.IPV4: self.public_ip4, Family.IPV6: self.public_ip6}
        return {family: host for family, host in both.items() if host is not None}

    @property
    def bind_hosts(self) -> dict[Family, str]:
        """The address to bind for each family that has a public address."""
        both = {Family.IPV4: self.bind_ip4, Family.IPV6: self.bind_ip6}
        return {family: both[family] for family in self.public_hosts}

    @property
    def urls(self) -> list[str]:
        """The TURN URIs of this relay. RFC 7065.

        For TLS it is the name in the certificate that clients look for.
        """
        hosts = [*self.public_hosts.values()]
        urls = [_turn_uri("turn", host, self.listen_port, "udp") for host in hosts]
        if self.tcp_port is not None:
            urls += [_turn_uri("turn", host, self.tcp_port, "tcp") for host in hosts]
        if self.tls_port is not None:
            assert self.tls_chain is not None
            names = hosts_of(self.tls_chain, hosts)
            urls += [_turn_uri("turns", name, self.tls_port, "tcp") for name in names]
        return urls

    @property
    def tls_identity(self) -> Identity | None:
        """The certificate with its key, if TLS is served. They need not belong together yet."""
        if self.tls_port is None or self.tls_chain is None or self.tls_key is None:
            return None
        return Identity(self.tls_chain, self.tls_key)


def _turn_uri(scheme: str, host: str, port: int, transport: str) -> str:
    return f"{scheme}:{format_endpoint(host, port)}?transport={transport}"


def _quota(given: int | None, default: int | None) -> int | None:
    return default if given is None else given or None


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What came of reading the configuration again."""

    config: Config  # for the running relay: only what can change without a restart has changed
    changed: tuple[str, ...]  # the options that have
    needs_restart: tuple[str, ...]  # those that would have
