"""Two servers' numbers from the same rounds, as ratios and as a Markdown table. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any


class Metric(Enum):
    """What is compared: its title, whether more of it is better, and how it is written."""

    RATE = "lossless rate, datagrams/s", True, "{:,.0f}"
    COST = "CPU per datagram, µs", False, "{:.1f}"
    P50 = "latency p50, µs", False, "{:,.0f}"
    P99 = "latency p99, µs", False, "{:,.0f}"
    ALLOCATES = "Allocates/s", True, "{:,.0f}"
    ALLOCATE_COST = "CPU per Allocate, µs", False, "{:,.0f}"
    MEMORY = "memory per allocation, bytes", False, "{:,.0f}"

    def __init__(self, title: str, more_is_better: bool, layout: str) -> None:
        self.title = title
        self.more_is_better = more_is_better
        self.layout = layout


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one case, as each round found it for the relay and for a coturn."""

    case: str
    metric: Metric
    relay: Sequence[float]
    coturn: Sequence[float]
    limited: bool = False  # the load client was the limit somewhere: both could be better

    @property
    def ratios(self) -> list[float]:
        """The relay's over coturn's, round by round."""
        return [ours / theirs for ours, theirs in zip(self.relay, self.coturn, strict=True)]

    @property
    def ratio(self) -> float:
        """The median."""
        return median(self.ratios)

    @property
    def relay_is_ahead(self) -> bool:
        """Tell whose median is better; at 1 it is nobody's."""
        return self.ratio > 1 if self.metric.more_is_better else self.ratio < 1

    def cell(self) -> str:
        """Return what the table says: median ratio, its spread, and both servers' medians."""
        low, high = min(self.ratios), max(self.ratios)
        ours, theirs = (
            self.metric.layout.format(median(numbers)) for numbers in (self.relay, self.coturn)
        )
        ratio = f"**{self.ratio:.2f}**" if self.relay_is_ahead else f"{self.ratio:.2f}"
        mark = "†" if self.limited else ""
        spread = f" ({low:.2f} to {high:.2f})" if len(self.ratios) > 1 else ""
        return f"{ratio}{mark}{spread} {ours} : {theirs}"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON, with what follows from the fields."""
        return {
            "case": self.case,
            "metric": self.metric.title,
            "relay": list(self.relay),
            "coturn": list(self.coturn),
            "ratios": self.ratios,
            "ratio": self.ratio,
            "limited_by_load_client": self.limited,
        }


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return a table with a row for each case and a column for each metric among them."""
    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons))
    cells: dict[str, dict[Metric, str]] = {}
    for comparison in comparisons:
        cells.setdefault(comparison.case, {})[comparison.metric] = comparison.cell()
    rows = [
        ["", *(metric.title for metric in metrics)],
        ["---"] * (1 + len(metrics)),
        *([case, *(row.get(metric, "") for metric in metrics)] for case, row in cells.items()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def standings(comparisons: Sequence[Comparison]) -> list[str]:
    """Return a line for each metric: how often the relay is ahead, and by how much."""
    lines = []
    for metric in dict.fromkeys(comparison.metric for comparison in comparisons):
        of_metric = [comparison for comparison in comparisons if comparison.metric is metric]
        ahead = sum(comparison.relay_is_ahead for comparison in of_metric)
        ratios = sorted(comparison.ratio for comparison in of_metric)
        better = "more" if metric.more_is_better else "less"
        lines.append(
            f"{metric.title} ({better} is better): the relay is ahead in {ahead} of"
            f" {len(of_metric)}; ratios {ratios[0]:.2f} to {ratios[-1]:.2f},"
            f" median {median(ratios):.2f}"
        )
    return lines
