"""What the operator says.

``options`` has one row per option, ``parsing`` reads their texts, ``files`` the files that they
name, ``reading`` all of it into a ``Config`` (``model``); ``credentials`` writes one for a client.
"""
