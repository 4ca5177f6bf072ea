"""Where TURN meets the sockets: what arrives, and where it goes."""
