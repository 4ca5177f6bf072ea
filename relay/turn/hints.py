"""What clients ask for in vain, said to the operator once: most of it is a flag away."""

import logging
from typing import Final

logger = logging.getLogger("relay.turn")

# Kinds of hints. Anyone can ask for thousands of methods and attributes that there are not.
MOST: Final = 32


class Hints:
    """Log lines of which one of a kind is enough, for as long as the process lives."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def give(self, kind: str, text: str) -> None:
        """Log *text*, unless one of its *kind* was, or too many others."""
        if kind not in self._given and len(self._given) < MOST:
            self._given.add(kind)
            logger.info("%s (said once)", text)
