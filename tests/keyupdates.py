"""A client of TLS that asks for new keys over and over, which Python's ssl cannot.

By OpenSSL itself, on buffers in memory. RFC 8446 §4.6.3.
"""

import ctypes
import ctypes.util
import socket
from typing import Final

import pytest

_REQUESTED: Final = 1  # SSL_KEY_UPDATE_REQUESTED
_FUNCTIONS: Final = {
    "TLS_client_method": (ctypes.c_void_p, []),
    "SSL_CTX_new": (ctypes.c_void_p, [ctypes.c_void_p]),
    "SSL_CTX_free": (None, [ctypes.c_void_p]),
    "SSL_new": (ctypes.c_void_p, [ctypes.c_void_p]),
    "SSL_free": (None, [ctypes.c_void_p]),
    "SSL_set_bio": (None, [ctypes.c_void_p] * 3),
    "SSL_set_connect_state": (None, [ctypes.c_void_p]),
    "SSL_do_handshake": (ctypes.c_int, [ctypes.c_void_p]),
    "SSL_key_update": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    "BIO_s_mem": (ctypes.c_void_p, []),
    "BIO_new": (ctypes.c_void_p, [ctypes.c_void_p]),
    "BIO_read": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]),
    "BIO_write": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]),
}


class KeyUpdater:
    """One session, over a socket that does not block."""

    def __init__(self, sock: socket.socket) -> None:
        name = ctypes.util.find_library("ssl")
        if name is None:
            pytest.skip("there is no libssl")
        self._ssl = ctypes.CDLL(name)
        for function, (result, arguments) in _FUNCTIONS.items():
            getattr(self._ssl, function).restype = result
            getattr(self._ssl, function).argtypes = arguments
        self._socket = sock
        self._context = self._ssl.SSL_CTX_new(self._ssl.TLS_client_method())
        self._session = self._ssl.SSL_new(self._context)
        memory = self._ssl.BIO_s_mem()
        self._incoming, self._outgoing = self._ssl.BIO_new(memory), self._ssl.BIO_new(memory)
        self._ssl.SSL_set_bio(self._session, self._incoming, self._outgoing)
        self._ssl.SSL_set_connect_state(self._session)

    def close(self) -> None:
        self._ssl.SSL_free(self._session)  # its buffers go with it
        self._ssl.SSL_CTX_free(self._context)

    def shakes_hands(self) -> bool:
        """Go on with the handshake; return whether it is done."""
        try:
            received = self._socket.recv(1 << 16)
        except BlockingIOError:
            received = b""
        self._ssl.BIO_write(self._incoming, received, len(received))
        is_done: bool = self._ssl.SSL_do_handshake(self._session) == 1
        self._socket.send(self._output())
        return is_done

    def updates(self, count: int) -> bytes:
        """Return records that ask for new keys, so many."""
        for _ in range(count):
            assert self._ssl.SSL_key_update(self._session, _REQUESTED) == 1
            self._ssl.SSL_do_handshake(self._session)
        return self._output()

    def _output(self) -> bytes:
        buffer = ctypes.create_string_buffer(1 << 20)
        size = self._ssl.BIO_read(self._outgoing, buffer, len(buffer))
        return buffer.raw[: max(size, 0)]
