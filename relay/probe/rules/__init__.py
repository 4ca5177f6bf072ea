"""What RFC 8489 and RFC 8656 demand of a server, as far as a client can see it: one rule each.

A rule is a function that is given a :class:`~relay.probe.lab.Lab` of its own. It returns if the
server keeps it, and raises Broken, with what came instead, if not.
"""

from relay.probe.rules import (
    allocation,
    authentication,
    channels,
    framing,
    indications,
    permissions,
)
from relay.probe.rules.rule import Outcome, Rule, Verdict, try_rule

RULES: tuple[Rule, ...] = tuple(
    rule
    for module in (framing, authentication, allocation, permissions, indications, channels)
    for rule in module.rules
)

__all__ = ["RULES", "Outcome", "Rule", "Verdict", "try_rule"]
