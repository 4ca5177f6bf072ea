"""The data path in the kernel: channels are relayed where their datagrams arrive.

``turn.bpf.c`` is the program, an XDP program for network devices, and ``turn.bpf.o`` what became of
it; ``bpf.py`` loads it by bpf(2). ``routes.py`` tells it of each channel, ``attach.py`` puts it to
work at the devices, and says why where that cannot be. What the program hands up is relayed by the
sockets, as if there were none: it is quicker where it is there, and nowhere needed.
"""


class XdpError(Exception):
    """The program cannot be loaded or attached. The text says why, and what to do about it."""
