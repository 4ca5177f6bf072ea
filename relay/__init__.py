"""A STUN and TURN relay for Linux. This page is the map of the package.

======================  ====================================================
``cli``                 flags, environment and file become a ``Config``; exit codes
``options``             every option, one row each
``config``              ``Config``: checked once when built, trusted afterwards
``logs`` ``logbrake``   log formats and levels; a brake on lines that repeat
``daemon``              builds the parts, connects them; starts, reloads, drains
``listening``           the sockets for clients: bound here, or by systemd
``monitor``             what the relay says of itself
``health``              /healthz, /readyz and /metrics, in a thread of their own
``exposition``          the metrics as Prometheus wants them
``systemd``             readiness, status, watchdog; inherited sockets
``forwarder``           where TURN meets the sockets. **Read this first**
``metrics``             what is counted
``stun``                RFC 8489: bytes to messages and back. Pure
``turn``                RFC 8656: the server as a state machine. Pure
``timerwheel``          deadlines in one-second slots. Pure
``net``                 Linux: epoll, UDP sockets, signals, the mailbox
``portal``              Firezone's portal: Phoenix channels, in a thread of their own
``sandbox``             what the process gives up before it serves anyone
======================  ====================================================

*Pure* means: bytes, time and randomness are handed in, commands come out; no
socket, clock, thread, file or dice. Imports point down only::

    cli -> daemon -> forwarder -> turn -> stun
                 |           |       '--> timerwheel
                 |           '--> net --> timerwheel
                 '--> portal

This module imports nothing. It has to exist even so: with it, ``import relay``
finds this package before the launcher ``relay.py`` that lies beside it.
"""
