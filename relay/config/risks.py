"""What is not wrong in a configuration, but risky on this machine: for ``--check-config``.

:func:`risks` is pure: it is given the configuration and a :class:`System`, which :func:`look` takes
from the machine. Each risk names the option or setting, and says what would mend it.
"""

import logging
import resource
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from relay.config.model import Config
from relay.net.listening import LISTEN_BUFFER
from relay.net.udp import PORT_BUFFER

CERTIFICATE_DAYS: Final = 30  # fewer are near the end
SHORTEST_SECRET: Final = 16  # characters: what is shorter can be guessed from one credential
SHORTEST_PASSWORD: Final = 8
FEW_PORTS: Final = 100
SPARE_DESCRIPTORS: Final = 100  # beside those of relay ports and connections
_DAY: Final = 86400  # seconds
_PORT_RANGE: Final = "net.ipv4.ip_local_port_range"
_RESERVED: Final = "net.ipv4.ip_local_reserved_ports"
_BUFFERS: Final = ("net.core.rmem_max", "net.core.wmem_max")
_ALL: Final = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Who may do what with a file."""

    mode: int  # of permissions
    is_in_open_folder: bool  # in one where everybody can exchange it


@dataclass(frozen=True, slots=True)
class System:
    """The machine, as far as it matters here."""

    now: float  # Unix time
    descriptors: int  # that a process may have, by its hard limit
    settings: Mapping[str, str]  # sysctls by name, those that can be read
    files: Mapping[str, FileFacts] = field(default_factory=dict)  # by name, those that can be


@dataclass(frozen=True, slots=True)
class Risk:
    """One of them."""

    what: str  # the option, or the setting of the system
    text: str


def look(files: Iterable[str]) -> System:
    """Ask this machine about its settings, and *files*. What cannot be read is left out."""
    names = (_PORT_RANGE, _RESERVED, *_BUFFERS)
    settings = {name: text for name in names if (text := _setting(name)) is not None}
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {name: found for name in files if (found := _facts(Path(name))) is not None}
    return System(time.time(), descriptors, settings, facts)


def risks(config: Config, secret_files: Iterable[str], system: System) -> list[Risk]:
    """Return what is risky."""
    found: list[Risk] = []
    found += _of_addresses(config)
    found += _of_ports(config, system)
    found += _of_buffers(system)
    found += _of_quotas(config)
    found += _of_peers(config)
    found += _of_files(secret_files, system)
    found += _of_secrets(config)
    found += _of_certificate(config, system)
    found += _of_operation(config)
    return found


def _of_addresses(config: Config) -> Iterator[Risk]:
    for family, host in config.public_hosts.items():
        address = ip_address(host)
        option = f"public-{'ip4' if family.name == 'IPV4' else 'ip6'}-addr"
        if address.is_loopback:
            yield Risk(option, f"{host} is loopback: only this machine can reach it")
        elif not address.is_global:
            yield Risk(
                option,
                f"{host} is not public: nobody on the internet can reach it. Behind a NAT, as in "
                f"most clouds, give the public address: --{option} ADDR",
            )


def _of_ports(config: Config, system: System) -> Iterator[Risk]:
    ports = config.ports
    where = f"lowest-port {ports[0]}, highest-port {ports[-1]}"
    first, last = _numbers(system.settings.get(_PORT_RANGE, "")) or (0, -1)
    shared = range(max(first, ports[0]), min(last, ports[-1]) + 1)
    reserved = [*_ranges(system.settings.get(_RESERVED, ""))]
    if any(not any(port in each for each in reserved) for port in shared):
        yield Risk(
            where,
            f"other programs are given ports of this range ({_PORT_RANGE} is {first} to {last}), "
            f"and then an allocation is not: sysctl -w {_RESERVED}={ports[0]}-{ports[-1]}",
        )
    if len(ports) < FEW_PORTS:
        yield Risk(where, f"{len(ports)} ports are as many allocations: the next one is refused")
    most = min(config.max_allocations or len(ports), len(ports))
    families = len(config.public_hosts)
    if most * families + SPARE_DESCRIPTORS > system.descriptors > 0:
        carried = max(0, (system.descriptors - SPARE_DESCRIPTORS) // families)
        yield Risk(
            "descriptors",
            f"a process may have {system.descriptors}, which is enough for about {carried} "
            f"allocations, not for {most}: LimitNOFILE= of the unit, or ulimit -n",
        )


def _of_buffers(system: System) -> Iterator[Risk]:
    short = [
        name
        for name in _BUFFERS
        if (limit := _numbers(system.settings.get(name, ""))) and limit[0] < LISTEN_BUFFER
    ]
    if short:
        limits = " and ".join(f"{name} = {system.settings[name].strip()}" for name in short)
        yield Risk(
            "buffers",
            f"the relay asks for queues of {LISTEN_BUFFER} bytes, and of {PORT_BUFFER} for each "
            f"allocation; {limits}, so bursts may be lost: sysctl -w "
            + " ".join(f"{name}={LISTEN_BUFFER}" for name in short),
        )


def _of_quotas(config: Config) -> Iterator[Risk]:
    if config.token is not None:
        return  # a portal knows whom it sends
    quotas = config.quotas
    for option, quota, who in (
        ("max-allocations-per-username", quotas.allocations_per_user, "one user"),
        ("max-allocations-per-ip", quotas.allocations_per_ip, "one address"),
        ("max-channels-per-allocation", quotas.channels_per_allocation, "one allocation"),
    ):
        if quota is None:
            yield Risk(option, f"0 is no limit: {who} can take all that there is")
    for option, rate in (
        ("unauthenticated-rate", config.unauthenticated_rate),
        ("unauthenticated-rate-per-prefix", config.unauthenticated_rate_per_prefix),
    ):
        if not rate:
            yield Risk(option, "0 is no limit: a flood of requests takes the CPU from calls")


def _of_peers(config: Config) -> Iterator[Risk]:
    for prefix in config.allow_peers:
        network = ip_network(prefix)
        if prefix in _ALL:
            text = "opens everything to users: this host's networks, and its cloud's metadata"
        elif network.is_loopback:
            text = "opens services on this host to users"
        elif network.is_link_local:
            text = "opens what is on this host's links, such as its cloud's metadata, to users"
        elif not network.is_global:
            text = "opens a private network to users"
        else:
            continue
        yield Risk(f"allow-peer {prefix}", f"{text}. If that is meant, leave it")


def _of_files(names: Iterable[str], system: System) -> Iterator[Risk]:
    for name in names:
        facts = system.files.get(name)
        if facts is None:
            continue
        if facts.mode & stat.S_IROTH:
            yield Risk(name, f"every user of this machine can read the secret: chmod o= {name}")
        elif facts.mode & stat.S_IWOTH:
            yield Risk(name, f"every user of this machine can exchange it: chmod o= {name}")
        elif facts.is_in_open_folder:
            yield Risk(name, "every user of this machine can exchange it: its folder is open")


def _of_secrets(config: Config) -> Iterator[Risk]:
    if any(len(secret) < SHORTEST_SECRET for secret in config.auth_secrets or ()):
        yield Risk("auth-secret-file", _short("a secret", SHORTEST_SECRET))
    if config.relay_secret is not None and len(config.relay_secret) < SHORTEST_SECRET:
        yield Risk("relay-secret-file", _short("the secret", SHORTEST_SECRET))
    weak = sum(
        isinstance(password, str) and len(password) < SHORTEST_PASSWORD
        for password in (config.users or {}).values()
    )
    if weak:
        yield Risk("users-file", f"{weak} passwords have fewer than {SHORTEST_PASSWORD} characters")


def _of_certificate(config: Config, system: System) -> Iterator[Risk]:
    if config.tls_port is None or config.tls_chain is None:
        return
    days = (config.tls_chain.expires - system.now) / _DAY
    if days < 0:
        yield Risk("tls-cert", f"the certificate has ended {-days:.0f} days ago: renew it")
    elif days < CERTIFICATE_DAYS:
        yield Risk("tls-cert", f"the certificate ends in {days:.0f} days: renew it")


def _of_operation(config: Config) -> Iterator[Risk]:
    if config.http_addr is not None and not ip_address(config.http_addr[0]).is_loopback:
        host = config.http_addr[0]
        yield Risk("http-addr", f"{host} shows status and metrics to whoever can reach it")
    if config.harden == "off":
        yield Risk("harden", "off keeps privileges that the relay does not need")
    if config.user == "root":
        yield Risk("user", "root owns root's files, even without its privileges")
    if config.rng_seed is not None:
        yield Risk("rng-seed", "makes nonces and secrets predictable: for tests only")
    if any(level <= logging.DEBUG for level in config.log_levels.values()):
        levels = ",".join(config.texts.get("log-level", ()))
        yield Risk("log-level", f"{levels} writes addresses of clients, and of their peers")
    if any(prefix in _ALL for prefix in config.proxies):
        yield Risk("proxy-protocol-from", "whoever connects may claim to be at any address")


def _short(what: str, characters: int) -> str:
    return f"{what} has fewer than {characters} characters: openssl rand -hex 32 makes one"


def _setting(name: str) -> str | None:
    try:
        return Path("/proc/sys", *name.split(".")).read_text()
    except OSError:
        return None


def _facts(path: Path) -> FileFacts | None:
    try:
        mode = path.stat().st_mode
        folder = path.resolve().parent.stat().st_mode
    except OSError:
        return None
    if not stat.S_ISREG(mode):
        return None  # a pipe is gone after it was read
    is_open = bool(folder & stat.S_IWOTH) and not folder & stat.S_ISVTX
    return FileFacts(stat.S_IMODE(mode), is_open)


def _numbers(text: str) -> tuple[int, ...]:
    words = text.split()
    return tuple(map(int, words)) if words and all(word.isdigit() for word in words) else ()


def _ranges(text: str) -> Iterator[range]:
    """Read ``8080,49152-65535``."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            yield range(int(first), int(last or first) + 1)
