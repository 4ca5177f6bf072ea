"""What is installed with the relay: units, a manual page, completion, rules for other programs."""
