"""Every option, one row each: its names, its default, how its text is read, what it does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from relay.config.parsing import (
    api_url,
    choice,
    cidrs,
    devices,
    http_address,
    ipv4,
    ipv6,
    log_levels,
    number,
    optional_port,
    port,
    public,
    realm,
    relay_name,
    rest_secrets,
    secret,
    software,
    switch,
    token,
    user,
    users,
)
from relay.net.tls import read_chain, read_key
from relay.turn.channeldata import RFC5766_NUMBERS, RFC8656_NUMBERS
from relay.turn.users import DEFAULT_REALM

DEFAULT_FILE: Final = "/etc/firezone/relay.conf"

LOG_FORMATS: Final = ("human", "json")


@dataclass(frozen=True, slots=True)
class Option:
    """One option. *parse* turns its text into a value, or raises ValueError with the reason."""

    name: str  # --name on the command line, "name = value" in the file
    variable: str
    parse: Callable[[str], Any]
    help: str
    group: str
    field: str  # of Config, where its value is stored
    default: str | None = None  # None: unset
    metavar: str | None = None  # None: a switch, with a --no- form
    repeatable: bool = False
    reloads: bool = False  # SIGHUP changes it in the running relay
    in_file: bool = False  # its text names a file, and *parse* gets what is in there
    is_secret: bool = False  # what is in that file is nobody else's business
    is_private: bool = False  # its text is for the operator alone, not for the status page

    @property
    def dest(self) -> str:
        """The attribute under which the parsers keep its text."""
        return self.name.replace("-", "_")


ADDRESSES: Final = "Say where clients and peers reach it"
STREAMS: Final = "Serve clients over TCP and TLS"
PORTAL: Final = "Join Firezone's portal"
CREDENTIALS: Final = "Make credentials"
PEERS: Final = "Decide which peers may be reached"
LIMITS: Final = "Limit what clients and unauthenticated sources may take"
WATCHING: Final = "See how it is doing"
RUNNING: Final = "Confine it, and stop it"
SPECIAL: Final = "Serve special cases, and test"

OPTIONS: Final = (
    Option(
        "public-ip4-addr",
        "PUBLIC_IP4_ADDR",
        public(ipv4),
        "IPv4 address at which clients and peers reach this relay (default, without "
        "a token and if neither is given: what the routing table says, or loopback)",
        ADDRESSES,
        metavar="ADDR",
        field="public_ip4",
    ),
    Option(
        "public-ip6-addr",
        "PUBLIC_IP6_ADDR",
        public(ipv6),
        "the same for IPv6",
        ADDRESSES,
        metavar="ADDR",
        field="public_ip6",
    ),
    Option(
        "bind-ip4-addr",
        "BIND_IP4_ADDR",
        ipv4,
        "IPv4 address to listen on",
        ADDRESSES,
        default="0.0.0.0",  # noqa: S104
        metavar="ADDR",
        field="bind_ip4",
    ),
    Option(
        "bind-ip6-addr",
        "BIND_IP6_ADDR",
        ipv6,
        "IPv6 address to listen on",
        ADDRESSES,
        default="::",
        metavar="ADDR",
        field="bind_ip6",
    ),
    Option(
        "listen-port",
        "LISTEN_PORT",
        port,
        "UDP port for clients",
        ADDRESSES,
        default="3478",
        metavar="PORT",
        field="listen_port",
    ),
    Option(
        "lowest-port",
        "LOWEST_PORT",
        port,
        "first port of the range for allocations",
        ADDRESSES,
        default="49152",
        metavar="PORT",
        field="lowest_port",
    ),
    Option(
        "highest-port",
        "HIGHEST_PORT",
        port,
        "last port of that range, included",
        ADDRESSES,
        default="65535",
        metavar="PORT",
        field="highest_port",
    ),
    Option(
        "tcp-port",
        "TCP_PORT",
        optional_port,
        "TCP port for clients whose network lets no UDP through, at the same addresses, or off",
        STREAMS,
        default="off",
        metavar="PORT",
        field="tcp_port",
    ),
    Option(
        "tls-port",
        "TLS_PORT",
        optional_port,
        "the same with TLS, for turns: URLs; it takes a certificate",
        STREAMS,
        default="off",
        metavar="PORT",
        field="tls_port",
    ),
    Option(
        "tls-cert",
        "TLS_CERT",
        read_chain,
        "file with the certificate for --tls-port, and with those that lead to one which clients "
        "know (PEM)",
        STREAMS,
        metavar="FILE",
        field="tls_chain",
        reloads=True,
        in_file=True,
    ),
    Option(
        "tls-key",
        "TLS_KEY",
        read_key,
        "file with the private key of that certificate (PEM); ECDSA costs half as much as RSA",
        STREAMS,
        metavar="FILE",
        field="tls_key",
        reloads=True,
        in_file=True,
        is_secret=True,
    ),
    Option(
        "proxy-protocol-from",
        "PROXY_PROTOCOL_FROM",
        cidrs,
        "prefix of proxies whose connections begin with a header of the PROXY protocol, version 1 "
        "or 2, which says where the client is; repeatable, or a list with commas",
        STREAMS,
        metavar="CIDR",
        field="proxies",
        repeatable=True,
        reloads=True,
    ),
    Option(
        "token-file",
        "FIREZONE_TOKEN_FILE",
        token,
        "file with the token for Firezone's portal; it can also be in FIREZONE_TOKEN, itself or "
        "as a path. With a token the relay serves once the portal says so, without one at once",
        PORTAL,
        metavar="FILE",
        field="token",
        in_file=True,
        is_secret=True,
    ),
    Option(
        "api-url",
        "FIREZONE_API_URL",
        api_url,
        "where the portal is",
        PORTAL,
        default="wss://api.firezone.dev",
        metavar="URL",
        field="api_url",
    ),
    Option(
        "name",
        "FIREZONE_NAME",
        relay_name,
        "how the portal is to call this relay",
        PORTAL,
        metavar="NAME",
        field="name",
    ),
    Option(
        "relay-secret-file",
        "RELAY_SECRET_FILE",
        secret,
        "file with the secret that credentials are made from, so that they outlive a restart "
        "(default: a new secret at every start)",
        CREDENTIALS,
        metavar="FILE",
        field="relay_secret",
        in_file=True,
        is_secret=True,
    ),
    Option(
        "auth-secret-file",
        "AUTH_SECRET_FILE",
        rest_secrets,
        "file with the secret that a web service makes credentials from, by the TURN REST "
        "convention; several are all good, one per line",
        CREDENTIALS,
        metavar="FILE",
        field="auth_secrets",
        reloads=True,
        in_file=True,
        is_secret=True,
    ),
    Option(
        "users-file",
        "USERS_FILE",
        users,
        "file with users that are always the same: name:password, or name:0xKEY, one per line",
        CREDENTIALS,
        metavar="FILE",
        field="users",
        reloads=True,
        in_file=True,
        is_secret=True,
    ),
    Option(
        "realm",
        "REALM",
        realm,
        "realm of all credentials; Firezone's clients know only the default",
        CREDENTIALS,
        default=DEFAULT_REALM,
        metavar="TEXT",
        field="realm",
    ),
    Option(
        "print-credential",
        "PRINT_CREDENTIAL",
        switch,
        "print a credential that is good for a day at the start, without a token (default: where "
        "standard output is a terminal)",
        CREDENTIALS,
        field="print_credential",
    ),
    Option(
        "allow-peer",
        "ALLOW_PEER",
        cidrs,
        "let clients reach peers in this prefix, though it is not public; repeatable, or a list "
        "with commas",
        PEERS,
        metavar="CIDR",
        field="allow_peers",
        repeatable=True,
        reloads=True,
    ),
    Option(
        "deny-peer",
        "DENY_PEER",
        cidrs,
        "do not let clients reach peers in this prefix; repeatable, or a list with commas; of "
        "several prefixes the longest wins",
        PEERS,
        metavar="CIDR",
        field="deny_peers",
        repeatable=True,
        reloads=True,
    ),
    Option(
        "refused-peers",
        "REFUSED_PEERS",
        choice(error=False, ignore=True),
        "what a client hears that asks for a peer it may not reach: error is a 403, ignore a "
        "success by which nothing is relayed (default: ignore with a portal, else error)",
        PEERS,
        metavar="ANSWER",
        field="ignore_refused_peers",
        reloads=True,
    ),
    Option(
        "send-indications",
        "SEND_INDICATIONS",
        switch,
        "relay by permissions, Send and Data indications, as browsers do, and not by channels only "
        "(default: off with a portal, else on)",
        PEERS,
        field="send_indications",
        reloads=True,
    ),
    Option(
        "one-allocation-per-username",
        "ONE_ALLOCATION_PER_USERNAME",
        switch,
        "a client that comes back from another address takes over: what its username had "
        "allocated there ends (default: on with a portal, else off)",
        LIMITS,
        field="one_allocation_per_username",
        reloads=True,
    ),
    Option(
        "max-allocations",
        "MAX_ALLOCATIONS",
        number(1, None, "a number from 1 up"),
        "most allocations at a time (default: what ports and descriptors allow)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations",
        reloads=True,
    ),
    Option(
        "max-allocations-per-username",
        "MAX_ALLOCATIONS_PER_USERNAME",
        number(0, None, "a number"),
        "most allocations of one user at a time, by what follows the expiry in the username; 0 is "
        "no limit (default: 256, with a portal no limit)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations_per_username",
        reloads=True,
    ),
    Option(
        "max-allocations-per-ip",
        "MAX_ALLOCATIONS_PER_IP",
        number(0, None, "a number"),
        "most allocations of clients at one address, of IPv6 in one /64, at a time; everyone "
        "behind one NAT has one address; 0 is no limit (default: 1024, with a portal no limit)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations_per_ip",
        reloads=True,
    ),
    Option(
        "max-channels-per-allocation",
        "MAX_CHANNELS_PER_ALLOCATION",
        number(0, None, "a number"),
        "most channels of one allocation at a time; 0 is no limit (default: 256, with a portal no "
        "limit)",
        LIMITS,
        metavar="NUMBER",
        field="max_channels_per_allocation",
        reloads=True,
    ),
    Option(
        "max-connections",
        "MAX_CONNECTIONS",
        number(1, None, "a number from 1 up"),
        "most connections over TCP and TLS at a time; beyond it, the oldest without an allocation "
        "has to go (default: 10000, or a quarter of the descriptors if that is less)",
        LIMITS,
        metavar="NUMBER",
        field="max_connections",
    ),
    Option(
        "max-connections-per-ip",
        "MAX_CONNECTIONS_PER_IP",
        number(0, None, "a number"),
        "most connections of clients at one address, of IPv6 in one /64, at a time; 0 is no limit",
        LIMITS,
        default="1024",
        metavar="NUMBER",
        field="max_connections_per_ip",
        reloads=True,
    ),
    Option(
        "unauthenticated-rate",
        "UNAUTHENTICATED_RATE",
        number(0, 10**9, "a number of requests per second"),
        "most requests per second that are served to clients without an allocation, a signed one "
        "counting twice; what comes beyond that, and beyond a burst, is met with silence; 0 is no "
        "limit",
        LIMITS,
        default="15000",
        metavar="RATE",
        field="unauthenticated_rate",
        reloads=True,
    ),
    Option(
        "unauthenticated-rate-per-prefix",
        "UNAUTHENTICATED_RATE_PER_PREFIX",
        number(0, 10**9, "a number of requests per second"),
        "the same for each /24 of IPv4 and /56 of IPv6",
        LIMITS,
        default="2000",
        metavar="RATE",
        field="unauthenticated_rate_per_prefix",
        reloads=True,
    ),
    Option(
        "log-format",
        "LOG_FORMAT",
        choice(**{name: name for name in LOG_FORMATS}),
        "human or json",
        WATCHING,
        default="human",
        metavar="FORMAT",
        field="log_format",
        reloads=True,
    ),
    Option(
        "log-level",
        "LOG_LEVEL",
        log_levels,
        "debug, info, warning or error; per logger: info,relay.turn=debug",
        WATCHING,
        default="info",
        metavar="LEVELS",
        field="log_levels",
        reloads=True,
    ),
    Option(
        "http-addr",
        "HEALTH_CHECK_ADDR",
        http_address,
        "where to serve /healthz, /readyz and /metrics over HTTP: ADDRESS:PORT, [IPV6]:PORT or off",
        WATCHING,
        default="127.0.0.1:8080",
        metavar="ADDR",
        field="http_addr",
    ),
    Option(
        "harden",
        "HARDEN",
        choice(**{mode: mode for mode in ("auto", "require", "off")}),
        "give up privileges at start: auto warns of what cannot be given up, require ends instead, "
        "off keeps them",
        RUNNING,
        default="auto",
        metavar="MODE",
        field="harden",
    ),
    Option(
        "user",
        "RELAY_USER",
        user,
        "which user to become when started as root, by name or number; root stays root (default: "
        "nobody)",
        RUNNING,
        metavar="USER",
        field="user",
        is_private=True,  # it names an account of this machine
    ),
    Option(
        "drain-timeout",
        "DRAIN_TIMEOUT",
        number(0, 86400, "a number of seconds, at most 86400"),
        "how long to go on relaying after SIGTERM",
        RUNNING,
        default="30",
        metavar="SECONDS",
        field="drain_timeout",
        reloads=True,
    ),
    Option(
        "channel-range",
        "CHANNEL_RANGE",
        choice(rfc8656=RFC8656_NUMBERS, rfc5766=RFC5766_NUMBERS),
        "channel numbers: rfc8656 (0x4000-0x4FFF), or rfc5766 (0x4000-0x7FFF) for older clients",
        SPECIAL,
        default="rfc8656",
        metavar="RFC",
        field="channel_numbers",
    ),
    Option(
        "offload",
        "OFFLOAD",
        choice(auto=True, off=False),
        "auto: read and send many datagrams at once where the kernel can (UDP_GRO, "
        "UDP_SEGMENT); off: one by one",
        SPECIAL,
        default="auto",
        metavar="WHEN",
        field="offload",
    ),
    Option(
        "copy-tos",
        "COPY_TOS",
        choice(auto="auto", on="on", off="off"),
        "on: relay each datagram with the DSCP and ECN that it came with; auto: where there are "
        "any; off: with none",
        SPECIAL,
        default="auto",
        metavar="WHEN",
        field="copy_tos",
    ),
    Option(
        "xdp",
        "XDP",
        choice(off=None, auto="auto", require="require", generic="generic"),
        "relay channels in the kernel, by an XDP program at the network devices, past the host's "
        "firewall: auto where that can be, require everywhere or end, generic also where the "
        "driver has no place for it",
        SPECIAL,
        default="off",
        metavar="WHEN",
        field="xdp",
    ),
    Option(
        "xdp-device",
        "XDP_DEVICE",
        devices,
        "network device for --xdp; repeatable, or a list with commas (default: those of the "
        "default routes and of the addresses that are given)",
        SPECIAL,
        metavar="NAME",
        field="xdp_devices",
        repeatable=True,
    ),
    Option(
        "software",
        "SOFTWARE",
        software,
        "text of a SOFTWARE attribute in every answer",
        SPECIAL,
        metavar="TEXT",
        field="software",
        reloads=True,
    ),
    Option(
        "rng-seed",
        "RNG_SEED",
        number(0, None, "a number"),
        "make everything random predictable, for tests",
        SPECIAL,
        metavar="NUMBER",
        field="rng_seed",
        is_private=True,  # from which follows the secret of all credentials
    ),
)
