"""Questions about the relay, answered with numbers: see README.md."""
