"""What of a configuration differs from the default, for people who may not know its secrets."""

from relay.config.model import Config
from relay.config.options import OPTIONS

SET = "set"
"""Stands for a file: its name says nothing, and what is in it may be a secret."""


def differences(config: Config) -> list[tuple[str, str]]:
    """Return the options whose values are not the default: name, and value as it is written."""
    found = []
    for option in OPTIONS:
        written = config.texts.get(option.name, ())
        if written and written != (option.default,):
            found.append((option.name, SET if option.in_file else ", ".join(written)))
    if config.token is not None and not config.texts.get("token-file"):
        found.append(("token", SET))
    return found
