"""What a rule is, and how it is tried."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from relay.probe.lab import Broken, Inapplicable, Lab
from relay.probe.link import LinkError

UDP: Final = "udp"
STREAM: Final = "stream"


class Verdict(StrEnum):
    """How a rule has fared."""

    KEPT = "kept"
    BROKEN = "broken"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand."""

    name: str  # for machines: module and function
    section: str  # such as "RFC 8656 §7.2"
    level: str  # MUST or SHOULD, as it is there
    text: str  # who does what, and what comes of it
    only: str | None  # UDP or STREAM: for clients over that alone
    attempt: Callable[[Lab], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a rule that was tried."""

    rule: Rule
    verdict: Verdict
    came: str  # instead, or why it was skipped; empty of one that is kept


class Rules(list[Rule]):
    """The rules of one module, in the order in which they stand there."""

    def __call__(
        self, section: str, text: str, *, level: str = "MUST", only: str | None = None
    ) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
        """Add the function that is decorated."""

        def add(attempt: Callable[[Lab], None]) -> Callable[[Lab], None]:
            name = f"{attempt.__module__.rpartition('.')[2]}.{attempt.__name__}"
            self.append(Rule(name, section, level, text, only, attempt))
            return attempt

        return add


def try_rule(rule: Rule, lab: Lab, *, is_stream: bool) -> Outcome:
    """Try a rule, and give back all that it took."""
    if rule.only is not None and rule.only != (STREAM if is_stream else UDP):
        needed = "TCP or TLS" if rule.only == STREAM else "UDP"
        return Outcome(rule, Verdict.SKIPPED, f"is about {needed}")
    try:
        rule.attempt(lab)
    except Inapplicable as error:
        return Outcome(rule, Verdict.SKIPPED, str(error))
    except (Broken, LinkError) as error:
        return Outcome(rule, Verdict.BROKEN, str(error))
    finally:
        lab.clear()
    return Outcome(rule, Verdict.KEPT, "")
