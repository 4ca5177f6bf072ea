"""Starting the program anew from disk: the same command, in the same place."""

import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from relay.host import keeper
from relay.host.sandbox import adopt_orphans, name_thread
from relay.host.starter import KEEPERS, Starter, fork_starter
from relay.upgrade.channel import Channel

VARIABLE: Final = "FIREZONE_RELAY_UPGRADE"
"""Which descriptor a successor has been given to talk over."""

_PID_1: Final = 1
_KEPT: Final = ("LD_LIBRARY_PATH",)
# Meant for the process that they were given to.
_NOT_INHERITED: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", VARIABLE)


class Launcher:
    """Knows how this process was started, and starts the next one likewise."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Note what there is at the start, before anything is given up."""
        # The path as it is: behind it may be another Python by then, and another program.
        self._command = [sys.executable, *sys.orig_argv[1:]]
        self._directory = str(Path.cwd())
        self._environment = {
            name: value for name, value in environment.items() if name not in _NOT_INHERITED
        }
        try:
            self._keeper = inspect.getsource(keeper).encode()
        except OSError:  # installed without sources
            self._keeper = b""
        self._notifications: socket.socket | None = None
        self._starter: Starter | None = None
        # Without a manager that is told, whoever watches this process would take it for ended.
        self.is_to_stay = os.getpid() == _PID_1 or not environment.get("NOTIFY_SOCKET")

    @property
    def has_keeper(self) -> bool:
        """Whether another process is the one that was started, and follows this one."""
        name = self._environment.get("NOTIFY_SOCKET", "")
        return not self.is_to_stay and bool(KEEPERS.fullmatch(name))

    @property
    def is_kept(self) -> bool:
        """Whether the process that was started stays, be it this one or a keeper."""
        return self.is_to_stay or self.has_keeper

    @property
    def starter(self) -> Starter | None:
        """Who starts the program as root, if this process is not that any more."""
        return self._starter

    def use(self, starter: Starter) -> None:
        """Have *starter* start the program from here on."""
        self._starter = starter

    def stay_root_elsewhere(self) -> None:
        """Fork who starts the program as root when this process is that no more. Raises OSError."""
        self._starter = fork_starter(self._command, self._environment, self._directory, VARIABLE)

    def start(self) -> tuple[Channel, "subprocess.Popen[bytes] | None"]:
        """Start the program; return our end of the channel, and the child if it is ours.

        Raises OSError.
        """
        more = {}
        if self.is_to_stay:
            more["NOTIFY_SOCKET"] = self._notify_socket()
        elif self.has_keeper:
            more["NOTIFY_SOCKET"] = self._environment["NOTIFY_SOCKET"]
        ours, its = Channel.pair()
        try:
            if self._starter is not None:
                adopt_orphans()  # so this process hears of the end of one that fails
                self._starter.start(its.fileno(), more)
                return ours, None
            os.set_inheritable(its.fileno(), True)
            child = subprocess.Popen(  # noqa: S603 - what this process was started with
                self._command,
                cwd=self._directory,
                env=self._environment | more | {VARIABLE: str(its.fileno())},
                stdin=subprocess.DEVNULL,
                # All others are closed on exec, and to look for them takes long if they are many.
                close_fds=False,
                process_group=0 if self.is_to_stay else None,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
        return ours, child

    def stay(self, main: int) -> NoReturn:
        """Be nothing but the keeper of process *main* from here on."""
        assert self._notifications is not None
        descriptor = self._notifications.fileno()
        os.set_inheritable(descriptor, True)
        manager = self._environment.get("NOTIFY_SOCKET", "")  # outside of a container
        if not self._keeper:
            keeper.keep(descriptor, main, manager)
        program = os.memfd_create("relay-keeper", 0)
        os.write(program, self._keeper)
        # Python itself may need the one; of secrets it is to have none.
        kept = {name: self._environment[name] for name in _KEPT if name in self._environment}
        arguments = ["-I", "-S", f"/proc/self/fd/{program}", str(descriptor), str(main), manager]
        for python in (sys.executable, getattr(sys, "_base_executable", sys.executable)):
            try:
                os.execve(python, [python, *arguments], kept)  # noqa: S606
            except OSError:
                continue  # it is where this user may not look
        name_thread(keeper.NAME)
        keeper.keep(descriptor, main, manager)
        raise AssertionError("it never comes back")

    def _notify_socket(self) -> str:
        """Return where successors are to notify this process, for NOTIFY_SOCKET."""
        adopt_orphans()
        if self._notifications is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.bind("")  # the kernel finds a name
            # From here on: a process that is told of before we listen is told with credentials.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._notifications = sock
        name = self._notifications.getsockname()
        return "@" + bytes(name[1:]).decode()
