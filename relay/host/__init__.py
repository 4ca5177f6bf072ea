"""The host that the relay runs on.

``systemd`` is what systemd and this process tell each other, ``supervision`` when they do,
``inherited`` the sockets it hands over, ``sandbox`` the privileges that are given up, ``identity``
the user that root becomes,
``limits`` the number of open files.
"""
