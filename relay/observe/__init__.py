"""What the relay says of itself, made from numbers that it is handed.

``counters`` is what the data path adds to, ``monitor`` puts the state together, ``exposition``
makes Prometheus metrics of it, ``http`` serves them with the health checks, ``logs`` and
``logratelimit`` are the logs.
"""
