"""What of a configuration differs from the default, for people who may not know its secrets."""

from relay.config.model import Config
from relay.config.options import OPTIONS

SET = "set"
"""Stands for a file, whose name says nothing and what is in it may be a secret; and for a text
from which follows what nobody else may know.
"""


def differences(config: Config) -> list[tuple[str, str]]:
    """Return the options whose values are not the default: name, and value as it is written."""
    found = []
    for option in OPTIONS:
        written = config.texts.get(option.name, ())
        if written and written != (option.default,):
            is_hidden = option.in_file or option.is_private
            found.append((option.name, SET if is_hidden else ", ".join(written)))
    if config.token is not None and not config.texts.get("token-file"):
        found.append(("token", SET))
    return found
