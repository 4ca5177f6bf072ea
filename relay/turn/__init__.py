"""RFC 8656, TURN: a server that is a pure state machine.

``server`` answers requests, ``tables`` holds allocations and channels, ``auth`` knows
who may ask, ``peers`` which peers may be reached, ``channeldata`` the four-byte frame,
``commands`` everything that the server can ask of whoever drives it.
"""
