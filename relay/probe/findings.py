"""What a probe finds, one after the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """How a check has ended."""

    OK = "ok"
    NOTE = "note"  # neither good nor bad: that depends on what one wants
    WARNING = "warning"  # works, and should not be so
    FAILED = "failed"
    SKIPPED = "skipped"  # cannot be told; the text says why


@dataclass(frozen=True, slots=True)
class Finding:
    """The end of one check."""

    name: str
    state: State
    text: str
    details: dict[str, Any] = field(default_factory=dict)  # for machines, as JSON can hold them


class Report:
    """Collects findings, and tells somebody of each at once."""

    def __init__(
        self,
        on_finding: Callable[[Finding], None] = lambda _: None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``on_progress(text)`` is told what is being done, which may take a while."""
        self.findings: list[Finding] = []
        self._on_finding = on_finding
        self.progress = on_progress

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def add(self, name: str, state: State, text: str, **details: Any) -> None:  # noqa: ANN401
        """Add what was found."""
        finding = Finding(name, state, text, details)
        self.findings.append(finding)
        self._on_finding(finding)

    def ok(self, name: str, text: str, **details: Any) -> None:  # noqa: ANN401
        """Add what is as it should be."""
        self.add(name, State.OK, text, **details)

    def failed(self, name: str, text: str, **details: Any) -> None:  # noqa: ANN401
        """Add what is broken."""
        self.add(name, State.FAILED, text, **details)

    @property
    def worst(self) -> State:
        """The worst state that there is, FAILED before WARNING before all others."""
        states = {finding.state for finding in self.findings}
        return next((one for one in (State.FAILED, State.WARNING) if one in states), State.OK)


class Stopped(Exception):
    """What comes next cannot be tried; what is wrong is in the report."""
