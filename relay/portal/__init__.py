"""The portal: who may run this relay, and when it begins to serve.

``phoenix`` is the protocol as a pure state machine, ``client`` the thread and the websocket.
It knows nothing of relaying: it is handed a ``post`` function for its events.
"""
