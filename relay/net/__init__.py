"""Linux: the event loop, UDP sockets, addresses, signals and the mailbox for other threads.

The only package that opens sockets for datagrams. It knows nothing of the protocol: what a socket
reads goes to a receiver, and who is to be sent to is a destination.
"""
