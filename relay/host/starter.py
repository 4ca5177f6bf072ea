"""A helper that stays root where the relay does not: all it can do is start the relay anew.

Who is started by root becomes another user before it serves anybody, for good. A successor has to
be able to do what the first process could: run a program and read a configuration that only root
can read, and bind a port below 1024. So a child is forked while there is nothing in the process
yet, and waits. What it runs, with which arguments, variables and directory, is settled by then;
the relay can ask for it, and can say over which socket the two processes are to talk, and where
to notify. It ends when nobody is left who could ask.
"""

import json
import os
import re
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from relay.host.keeper import PASSED_ON

KEEPERS: Final = re.compile("@[0-9a-f]{5}")
"""Where a keeper listens: what the kernel calls a socket that nobody has named."""

ALARM: Final = 330  # seconds until the program ends, unless it has got somewhere (alarm(2))
_LONGEST_REQUEST: Final = 1024  # bytes


class Starter:
    """The relay's end of the helper."""

    def __init__(self, sock: socket.socket) -> None:
        """Own *sock*, which leads to it."""
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor; whoever has a copy of it can ask, too."""
        return self._sock.fileno()

    def start(self, channel: int, variables: Mapping[str, str]) -> None:
        """Have the program started, with the descriptor *channel* and some more variables.

        Raises OSError.
        """
        socket.send_fds(self._sock, [json.dumps(dict(variables)).encode()], [channel])


def fork_starter(
    command: Sequence[str], environment: Mapping[str, str], directory: str, variable: str
) -> Starter:
    """Fork the helper, in a process without threads. Raises OSError.

    *variable* is the one that tells the program which descriptor it has been given.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            # What else there is would go on to each process that is started.
            os.closerange(3, its.fileno())
            os.closerange(its.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            _wait(its, list(command), dict(environment), directory, variable)
        finally:
            os._exit(os.EX_SOFTWARE)
    its.close()
    return Starter(ours)


def _wait(
    sock: socket.socket,
    command: list[str],
    environment: dict[str, str],
    directory: str,
    variable: str,
) -> NoReturn:
    with suppress(OSError), open("/proc/self/comm", "w") as name:  # noqa: PTH123
        name.write("relay-starter")
    for number in PASSED_ON:  # to the relay, and not for us
        signal.signal(number, signal.SIG_IGN)
    while True:
        request, descriptors, _, _ = socket.recv_fds(sock, _LONGEST_REQUEST, 1)
        if not request:
            os._exit(os.EX_OK)
        try:
            more = _allowed(json.loads(request))
            if descriptors:
                _start(command, environment | more, directory, variable, descriptors[0])
        except (OSError, ValueError):
            pass  # who has asked hears that its socket is closed
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _allowed(variables: object) -> dict[str, str]:
    """Return what may be added to the environment. Raises ValueError."""
    if not isinstance(variables, dict) or variables.keys() - {"NOTIFY_SOCKET"}:
        raise ValueError("not a variable that may be set")
    if not all(isinstance(v, str) and KEEPERS.fullmatch(v) for v in variables.values()):
        raise ValueError("not a socket that has no name")
    return variables


def _start(
    command: list[str],
    environment: dict[str, str],
    directory: str,
    variable: str,
    channel: int,
) -> None:
    """Start the program as an orphan: whoever gets orphans here will hear of its end."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if os.fork():
            os._exit(os.EX_OK)
        with suppress(OSError):
            os.setpgid(0, 0)  # a terminal's signals are for who was started there
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.alarm(ALARM)
        os.set_inheritable(channel, True)
        os.chdir(directory)
        os.execve(  # noqa: S606 - a shell would be one more thing that can be confused
            command[0], command, environment | {variable: str(channel)}
        )
    finally:
        os._exit(os.EX_UNAVAILABLE)
