"""Linux: the epoll loop, UDP sockets, signals and the mailbox for other threads.

The only package that knows sockets. It knows nothing of TURN.
"""
