"""RFC 8656, TURN: a server that is a pure state machine.

===============  ===============================================================
``server``       the entrance: limits, decodes, and hands each request to its handler
``admission``    who is let in: signature, nonce, credential, in the RFC's order
``allocate``     Allocate and Refresh
``channels``     CreatePermission and ChannelBind
``request``      a request, its refusal, its answer
``state``        what the handlers share
``tables``       allocations, channels and every index; the only writer of them
``ended``        transactions whose effect is over
``ports``        the relay ports that are free
``quota``        how much one user, one address and all of them may hold
``peers``        which peers may be reached
``auth``         credentials made from a secret, and nonces without a table
``ratelimit``    how much work is done for whom
``timerwheel``   deadlines in one-second slots
``channeldata``  the four-byte header of relayed data
``settings``     what the operator limits
``commands``     everything that the server can ask of whoever drives it
===============  ===============================================================
"""
