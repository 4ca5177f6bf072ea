"""What may be between a client and a server: it looks at each datagram, and does as it is told."""

import select
import socket
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from relay.stun.address import Address

Hook = Callable[[bytes], Iterable[bytes]]
"""What becomes of a datagram: nothing, itself, or others."""


def unchanged(datagram: bytes) -> Iterable[bytes]:
    return (datagram,)


def nothing(_datagram: bytes) -> Iterable[bytes]:
    return ()


class Middlebox:
    """Passes datagrams between a server and its clients, each of which has a port of its own.

    *to_server* and *to_client* are asked for each datagram; *replies* for what goes back to a
    client at once, by the datagram that it has sent.
    """

    def __init__(
        self,
        server: Address,
        *,
        to_server: Hook = unchanged,
        to_client: Hook = unchanged,
        replies: Hook = nothing,
    ) -> None:
        self._server = server
        self._to_server, self._to_client, self._replies = to_server, to_client, replies
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address: Address = self._socket.getsockname()
        self._clients: dict[Address, socket.socket] = {}
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.close()
        self._thread.join()
        for sock in (self._socket, self._ended, *self._clients.values()):
            sock.close()

    def _run(self) -> None:
        while True:
            by_socket = {sock: client for client, sock in self._clients.items()}
            ready, _, _ = select.select([self._ended, self._socket, *by_socket], [], [])
            if self._ended in ready:
                return
            for sock in ready:
                if sock is self._socket:
                    self._from_client(*self._socket.recvfrom(65536))
                else:
                    for datagram in self._to_client(sock.recv(65536)):
                        self._socket.sendto(datagram, by_socket[sock])

    def _from_client(self, datagram: bytes, client: Address) -> None:
        if client not in self._clients:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))  # peers may send there, too
            self._clients[client] = sock
        for reply in self._replies(datagram):
            self._socket.sendto(reply, client)
        for forwarded in self._to_server(datagram):
            self._clients[client].sendto(forwarded, self._server)
