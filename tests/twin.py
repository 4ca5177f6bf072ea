"""Two servers side by side: what one is asked, so is the other, and their answers must be equal.

The second one can be replaced by one that is made of what it has written, all at once or while
requests go on. Nobody outside may ever notice.
"""

from collections.abc import Callable, Mapping
from typing import Any

from relay.stun.const import Family
from relay.turn.auth import Authenticator
from relay.turn.commands import (
    ClientAddress,
    ClosePort,
    Command,
    Drop,
    PeerAddress,
    PortFailure,
)
from relay.turn.peers import PeerPolicy
from relay.turn.ports import FreePorts
from relay.turn.server import Server
from relay.turn.settings import Settings
from tests.written import decode, encode


class TwinServer(Server):
    """A server, and another that is to be indistinguishable from it."""

    def __init__(
        self,
        settings: Settings,
        *,
        authenticator: Authenticator,
        peer_policy: PeerPolicy,
        randbelow: Callable[[int], int],
        now: float,
    ) -> None:
        self._peer_policy, self._authenticator = peer_policy, authenticator
        self._settings = settings
        self._draws = _Draws(randbelow)
        super().__init__(
            settings,
            authenticator=authenticator,
            peer_policy=peer_policy,
            randbelow=self._draws.first,
            now=now,
        )
        self._draws.of_first = self._tables.free_ports
        self._pending: list[Command] = []
        self._install(self._make(now))
        self._successor: Server | None = None

    def _make(self, now: float) -> Server:
        return Server(
            self._settings,
            authenticator=self._authenticator,
            peer_policy=self._peer_policy,
            randbelow=self._draws.second,
            now=now,
        )

    def _install(self, second: Server) -> None:
        self._second = second
        self._draws.of_second = second._tables.free_ports

    # --- The second one moves ----------------------------------------------------------------

    def begins_to_move(self, now: float) -> None:
        """Copy what there is, while all goes on."""
        old, self._successor = self._second.transfer, self._make(now)
        written = encode(filter(None, map(old.dump, old.begin())))
        for record in decode(written):
            self._successor.transfer.load(record)
        _commands(self._successor)

    def moves(self, now: float) -> None:
        """Copy what has changed, and the rest; then let the copy go on."""
        if self._successor is None:
            self.begins_to_move(now)
        old, new = self._second.transfer, self._successor
        assert new is not None
        changed = old.take_changed()
        written = encode(filter(None, map(old.dump, changed)))
        rest = encode([old.dump_rest()])
        for client in changed:
            new.transfer.evict(client)
        for record in decode(written):
            new.transfer.load(record)
        new.transfer.load_rest(decode(rest)[0])
        _commands(new)
        new.check()
        self._install(new)
        self._successor = None

    # --- What both are asked -----------------------------------------------------------------

    def handle_request(
        self, datagram: bytes, client: ClientAddress, *, now: float, unix_now: float
    ) -> Drop | None:
        drop = super().handle_request(datagram, client, now=now, unix_now=unix_now)
        other = self._second.handle_request(datagram, client, now=now, unix_now=unix_now)
        assert drop == other
        self._compare()
        return drop

    def handle_port_opened(
        self, port: int, failures: Mapping[Family, PortFailure], *, now: float
    ) -> None:
        super().handle_port_opened(port, failures, now=now)
        self._second.handle_port_opened(port, failures, now=now)
        self._compare()

    def handle_timeout(self, now: float) -> None:
        super().handle_timeout(now)
        self._second.handle_timeout(now)
        self._compare()

    def change_peer_policy(self, peer_policy: PeerPolicy, *, now: float) -> None:
        self._peer_policy = peer_policy
        super().change_peer_policy(peer_policy, now=now)
        self._second.change_peer_policy(peer_policy, now=now)
        self._compare()
        if self._successor is not None:
            self._successor.change_peer_policy(peer_policy, now=now)
            _commands(self._successor)

    def reaches_outside(self, peer: PeerAddress) -> bool | None:
        outside = super().reaches_outside(peer)
        assert outside is self._second.reaches_outside(peer)
        return outside

    def next_command(self) -> Command | None:
        return self._pending.pop(0) if self._pending else None

    def check(self) -> None:
        super().check()
        self._second.check()
        for name in ("allocations", "channels", "permissions", "responses", "auth_failures"):
            assert getattr(self, name) == getattr(self._second, name)

    def _compare(self) -> None:
        """Take what both want done. What ends at the same moment may end in any order."""
        ours: list[Command] = []
        while (command := super().next_command()) is not None:
            ours.append(command)
        assert sorted(map(_text, ours)) == sorted(map(_text, _commands(self._second)))
        self._pending += ours


class _Draws:
    """Has the second server draw what the first one has drawn: of ports the same ones."""

    def __init__(self, randbelow: Callable[[int], int]) -> None:
        self._randbelow = randbelow
        self._drawn: list[tuple[int, Any]] = []
        self.of_first: FreePorts
        self.of_second: FreePorts

    def first(self, below: int) -> int:
        drawn = self._randbelow(below)
        ports = self.of_first._ports
        self._drawn.append((below, ports[drawn] if below == len(ports) else drawn))
        return drawn

    def second(self, below: int) -> int:
        expected, drawn = self._drawn.pop(0)
        assert below == expected
        ports = self.of_second._ports
        return ports.index(drawn) if below == len(ports) else drawn


def _commands(server: Server) -> list[Command]:
    commands: list[Command] = []
    while (command := server.next_command()) is not None:
        commands.append(command)
    return commands


def _text(command: Command) -> str:
    if isinstance(command, ClosePort):
        command.channels.sort()
    return repr(command)
