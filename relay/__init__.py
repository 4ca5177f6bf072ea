"""A STUN and TURN relay for Linux. This page is the map of the package.

=============  ================================================================
``cli``        the command: options, exit codes
``daemon``     the life of a relay: it starts, reloads, drains and stops
``assembly``   from a ``Config`` to the parts of a relay, connected
``config``     what the operator says: options, files, ``Config``
``datapath``   what arrives, and where it goes. **Read this first**
``turn``       RFC 8656: the server as a state machine. Pure
``stun``       RFC 8489: bytes to messages and back. Pure
``net``        Linux: event loop, UDP, addresses, signals; knows no TURN
``portal``     Firezone's portal: Phoenix channels, in a thread of their own
``observe``    counters, metrics, health checks, logs
``host``       systemd, inherited sockets, privileges, limits
=============  ================================================================

*Pure* means: bytes, time and randomness are handed in, commands come out; no
socket, clock, thread, file or randomness of its own. Imports point down only::

    cli ─► daemon ─► assembly ─► datapath ─► turn ─► stun
     │        │         │            ├─► net.udp  (how datagrams are received and sent)
     │        │         │            └─► observe.counters
     │        │         └─► net, portal, observe, host: each knows of no other
     └────────┴─► config ─► net.addresses, and a few names of portal, turn and stun

This module imports nothing. It has to exist even so: with it, ``import relay``
finds this package before the launcher ``relay.py`` in the same directory.
"""
