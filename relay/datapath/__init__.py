"""Where TURN meets the sockets: what arrives, and where it goes. Read this first.

====================  ===================================================================
``clientside``        what clients send: ChannelData and Send indications go to their peer,
                      STUN to the server
``relayport``         what peers send to a relay port: it goes to the client that has it
``permitted``         what goes there from peers without a channel: as Data indications
``routes``            which channel leads where, and which hosts are permitted; written by five
                      commands only
``hairpin``           from one allocation of this relay to another, inside the process
``control``           drives the server: requests and time go in, commands are carried out
``destination``       how somebody is reached
``workspace``         the buffer that every datagram lies in, and the counters
``datapath``          all of these, put together
====================  ===================================================================

A relayed datagram is one look into a table of routes and one call. The server is not involved:
it wrote the route when the channel was bound, by ``BindChannel``, and removes it by
``UnbindChannel``, or with the port by ``ClosePort``. So whatever is not bound right now is not
relayed. With indications it is the same, but for the first datagram to each peer:
``InstallPermissions`` and ``RemovePermissions`` are about hosts, so the server is asked once
whether that peer may be reached.
"""
