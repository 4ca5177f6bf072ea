"""What the server must know of its surroundings, and what the operator limits."""

from dataclasses import dataclass

from relay.stun.const import Family


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the server. A reload brings others; *public_hosts* and *ports* stay the same."""

    public_hosts: dict[Family, str]  # the hosts of relayed addresses, IPv4 first
    ports: range  # those that allocations may get, but for the listening port
    listen_port: int
    max_allocations: int
    max_sockets: int  # relay ports, counted once per family: what descriptors allow
    max_channels: int
    max_permissions: int
    channel_numbers: range
    one_allocation_per_username: bool
    send_indications: bool  # if permissions have any effect
    max_allocations_per_username: int | None = None
    max_allocations_per_ip: int | None = None  # for IPv6, per /64
    max_channels_per_allocation: int | None = None  # and as many permissions
    ignores_refused_peers: bool = False  # say "success" where a peer is forbidden, not 403
    unauthenticated_rate_per_prefix: int = 0  # units of work per second; 0: no limit
    unauthenticated_rate: int = 0  # likewise, in all
    software: str | None = None
