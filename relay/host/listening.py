"""The sockets that clients talk to: handed over by systemd, or bound here."""

import logging
import os
import socket
from typing import Final

from relay.config.model import Config, ConfigError
from relay.host import systemd
from relay.net.offload import Offload
from relay.net.udp import ListeningSocket, Lost, adopt, listen
from relay.stun.address import family_of, format_endpoint
from relay.stun.const import Family

logger = logging.getLogger("relay.host")

ACTIVATED: Final = "turn"  # FileDescriptorName= of these sockets


def open_listeners(
    config: Config, buffer: memoryview, lost: Lost, offload: Offload
) -> dict[Family, ListeningSocket]:
    """Return a socket for each family there is. They read into *buffer*, and report to *lost*.

    Raises OSError, with the address as its filename, and ConfigError for what systemd has
    handed over.
    """
    handed_over = _handed_over(config)
    listeners = {
        family: _adopt(handed_over.pop(family), buffer, lost, offload)
        for family in config.bind_hosts
        if family in handed_over
    }
    for family, sock in handed_over.items():
        logger.info("not listening for %s: there is no public address of it", family.name)
        sock.close()
    for family, host in config.bind_hosts.items():
        if family not in listeners:
            try:
                listeners[family] = listen(host, config.listen_port, buffer, lost, offload)
            except OSError as error:
                error.filename = format_endpoint(host, config.listen_port)
                raise
    return listeners


def _handed_over(config: Config) -> dict[Family, socket.socket]:
    try:
        inherited = systemd.inherited_sockets(os.environ, os.getpid())
    except systemd.ActivationError as error:
        raise ConfigError(f"systemd: {error}") from error
    found: dict[Family, socket.socket] = {}
    for name, sock in inherited:
        is_udp = sock.family in {socket.AF_INET, socket.AF_INET6} and sock.type == socket.SOCK_DGRAM
        is_ours = name == ACTIVATED and is_udp and sock.getsockname()[1] == config.listen_port
        if is_ours and (family := family_of(sock.getsockname()[0])) not in found:
            found[family] = sock
        else:  # the name or port of another, or one address too many of a family
            _leave_out(sock, name)
    return found


def _adopt(
    sock: socket.socket, buffer: memoryview, lost: Lost, offload: Offload
) -> ListeningSocket:
    try:
        return adopt(sock, buffer, lost, offload)
    except ValueError as error:
        raise ConfigError(f"systemd has handed over {error}") from error


def _leave_out(sock: socket.socket, name: str) -> None:
    kind = {socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}.get(sock.type, "other")
    address = sock.getsockname()
    where = format_endpoint(*address[:2]) if isinstance(address, tuple) else "a socket"
    logger.warning("not used: %s (%s), handed over by systemd as %r", where, kind, name)
    sock.close()
