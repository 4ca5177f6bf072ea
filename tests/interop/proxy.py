"""Between a client and the relay: hands datagrams on, and remembers what the client has sent."""

import selectors
import socket
import threading
from types import TracebackType
from typing import Any, Final, Self

from relay.datapath.clientside import LAST_STUN_BYTE
from relay.stun.address import Address
from relay.stun.attributes import Attr
from relay.stun.const import Kind
from relay.stun.message import Message, decode

_ROOM: Final = 65536


class Recorder:
    """A UDP port on loopback that leads to a server, from another port for each client."""

    def __init__(self, server: Address) -> None:
        self._server = server
        self.sent: list[bytes] = []  # by clients
        self._socket = _bound()
        self.port: int = self._socket.getsockname()[1]
        self._ways: dict[Any, socket.socket] = {}
        self._stop, self._stopped = socket.socketpair()
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
        self._stop.send(b"!")
        self._thread.join()
        for sock in (self._socket, self._stop, self._stopped, *self._ways.values()):
            sock.close()

    def signed_requests(self) -> list[Message]:
        """Return the requests of clients that have a nonce."""
        messages = [decode(one).message for one in self.sent if one[0] <= LAST_STUN_BYTE]
        requests = [message for message in messages if message.kind is Kind.REQUEST]
        return [request for request in requests if request.get(Attr.NONCE) is not None]

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stopped:
                        return
                    if key.fileobj is self._socket:
                        self._from_client(selector)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._socket.sendto(key.fileobj.recv(_ROOM), key.data)

    def _from_client(self, selector: selectors.BaseSelector) -> None:
        datagram, client = self._socket.recvfrom(_ROOM)
        self.sent.append(datagram)
        way = self._ways.get(client)
        if way is None:
            way = self._ways[client] = _bound()
            way.connect(self._server)
            selector.register(way, selectors.EVENT_READ, client)
        way.send(datagram)


def _bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock
