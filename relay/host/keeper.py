"""What the process that was started first becomes, where somebody watches it: it keeps its number.

A shell, a container's runtime, runit and the like know the relay by the process that they started,
and PID 1 of a container must not end. So when a successor serves, that process stays, and does
nothing but this: signals that it gets go to the one that serves, and it ends as that one ends. To
the successors it is a service manager: they tell it by ``MAINPID=`` who is the next (sd_notify(3)).

Its whole program is this file, run by itself: it imports nothing but the standard library, and
holds no secret and no socket but the one that it listens to.
"""

import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NAME = "relay-keeper"  # as ps shows it; the kernel keeps 15 bytes
LOOK_INTERVAL = 10_000  # milliseconds until it is looked if there is still somebody who serves
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


class Keeper:
    """Follows the process that serves."""

    def __init__(self, notifications: socket.socket, main: int, manager: str = "") -> None:
        """Listen to *notifications*; *main* is the process that serves now, a child of ours.

        What it says goes on to the *manager* that there is outside of a container, if there is one:
        the value of its ``NOTIFY_SOCKET``. To that, this process is the one that serves.
        """
        self.main = main
        self._manager = manager.replace("@", "\0", 1) if manager.startswith("@") else manager
        self._notifications = notifications
        notifications.setblocking(False)
        notifications.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def run(self) -> int:
        """Return how the last one has ended, as waitpid(2) tells it."""
        wakeups, wakeup = socket.socketpair()
        for end in (wakeups, wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*PASSED_ON, signal.SIGCHLD))
        poll = select.poll()
        for source in (wakeups, self._notifications):
            poll.register(source, select.POLLIN)
        while (status := self._reap()) is None:
            poll.poll(LOOK_INTERVAL)
            received = b""
            with suppress(BlockingIOError):
                received = wakeups.recv(4096)
            self._listen()  # first: who was to get a signal may have left
            for caught in dict.fromkeys(received):
                if caught in PASSED_ON:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(self.main, caught)
        return status

    def _listen(self) -> None:
        """Take what successors say. Only the one that serves may name the next."""
        room = socket.CMSG_SPACE(_CREDENTIALS.size)
        while True:
            try:
                message, ancillary, _, _ = self._notifications.recvmsg(4096, room)
            except OSError:
                return
            senders = [
                _CREDENTIALS.unpack(data)[0]
                for level, kind, data in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            ]
            if senders != [self.main]:
                continue
            name, _, value = message.partition(b"=")
            if name == b"MAINPID" and value.isdigit():
                self.main = int(value)
            elif self._manager:
                with suppress(OSError):
                    self._notifications.sendto(message, self._manager)

    def _reap(self) -> int | None:
        """Bury children that have ended; return how the one that serves has, if it has."""
        ended = {}
        with suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG))[0]:
                ended[child[0]] = child[1]
        self._listen()
        try:
            os.kill(self.main, 0)
        except ProcessLookupError:  # if it was no child of ours, nobody knows how it has ended
            return ended.get(self.main, 0)
        except PermissionError:
            pass
        return ended.get(self.main)


def end_like(status: int) -> None:
    """End as a process has that ended with *status*."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        if os.getpid() != 1:  # which no signal ends
            os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.waitstatus_to_exitcode(status))


def keep(descriptor: int, main: int, manager: str) -> None:
    """Keep the process until its relay ends, and end likewise. Does not return."""
    with suppress(OSError), open("/proc/self/comm", "w") as name:  # noqa: PTH123
        name.write(NAME)
    end_like(Keeper(socket.socket(fileno=descriptor), main, manager).run())


if __name__ == "__main__":
    keep(int(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1])
