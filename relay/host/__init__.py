"""The host that the relay runs on: systemd, inherited sockets, privileges given up."""
