"""RFC 8656, TURN: a server that is a pure state machine.

===============  ===============================================================
``server``       the entrance: limits, decodes, and hands each request to its handler
``admission``    who is let in: signature, nonce, credential, in the RFC's order
``allocate``     Allocate and Refresh
``channels``     CreatePermission and ChannelBind
``request``      a request, its refusal, its answer
``state``        what the handlers share
``tables``       allocations, channels, permissions and every index; the only writer of them
``ended``        transactions whose effect is over
``ports``        the relay ports that are free
``quota``        how much one user, one address and all of them may hold
``peers``        which peers may be reached
``users``        who there is: by secrets, or by name
``auth``         keys that were proven, and nonces without a table
``ratelimit``    how much work is done for whom
``timerwheel``   deadlines in one-second slots
``channeldata``  the four-byte header of relayed data
``indications``  relayed data without a channel: Send and Data indications
``hints``        what clients ask for in vain, for the log
``settings``     what the operator limits
``commands``     everything that the server can ask of whoever drives it
===============  ===============================================================
"""
