"""Is a STUN or TURN server all right, seen from here? The command ``firezone-relay probe``.

``client``        a client's end of one 5-tuple. Pure
``target``        which server: URLs, credentials
``link``          the client on a socket: UDP, TCP, TLS; and a peer that knows no TURN
``findings``      what was found, and how bad it is
``checks``        what a user would ask: reachable, authenticated, relayed, by whom not
``traffic``       latency, jitter, loss, and the rate at which it begins
``rules``         what RFC 8489 and RFC 8656 demand, one rule each; ``lab`` is where they are tried
``output``        lines for people, JSON for machines
``command``       the command line

Nothing here is needed by a relay that runs, and nothing here knows how this one is made: it is a
client like any other.
"""
