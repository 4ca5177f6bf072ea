"""What goes beside the relay on a machine: units, a manual page, completion, rules for others."""
