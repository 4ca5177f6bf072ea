"""What a person reads: rows of results, a histogram, and a progress bar."""

import sys
from typing import Final, TextIO

from bench.loadlib.tally import Latency, Lossless, Result

BAR_WIDTH: Final = 30
_LABEL_WIDTH: Final = 26


def row(label: str, value: str) -> str:
    """Return one line: what it is, and how much."""
    return f"{label:{_LABEL_WIDTH}}{value}"


def rows(result: Result) -> list[str]:
    """Return the lines that say what a measurement found."""
    lines = [
        row("sent", f"{result.sent:,} in {result.seconds:.2f} s, {result.sent_rate:,.0f}/s"),
        row("received", f"{result.received:,}, {result.received_rate:,.0f}/s"),
        row("lost", f"{result.lost:,} ({result.loss:.3%})"),
        row("reordered, duplicated", f"{result.reordered:,}, {result.duplicated:,}"),
    ]
    if result.server_cost is not None:
        lines.append(row("server's CPU", f"{result.server_cost:.2f} µs per datagram"))
    if result.client_cost is not None:
        cost, busy = result.client_cost, result.client_busy
        lines.append(row("load client's own", f"{cost:.2f} µs per datagram, {busy:.0%} busy"))
    if result.limited_by_client:
        lines.append(row("limited by", "the load client: the server could do more"))
    if result.is_disturbed:
        server = "" if result.server_waited is None else f", the server {result.server_waited:.0%}"
        waited = (
            f"the load client waited for its CPU {result.client_waited:.0%} of the time{server}"
        )
        lines.append(row("disturbed", waited))
    if result.latency:
        lines += _latency_rows(result.latency, result.received)
    return lines


def search_rows(steps: list[Result], found: Lossless) -> list[str]:
    """Return the lines that say how a search went, and what it found."""
    lines = [f"{'wanted/s':>12}{'sent/s':>12}{'lost':>10}{'µs of server':>14}{'p99 µs':>10}"]
    for step in steps:
        rates = f"{step.wanted_rate or 0:12,.0f}{step.sent_rate:12,.0f}"
        cost = "-" if step.server_cost is None else f"{step.server_cost:.2f}"
        p99 = "-" if step.latency is None else f"{step.latency.percentiles['p99']:,.0f}"
        lines.append(f"{rates}{step.lost:10,}{cost:>14}{p99:>10}")
    by = ", limited by the load client" if found.limited_by_client else ""
    return [*lines, row("lossless rate", f"{found.rate:,.0f} datagrams per second{by}")]


class Progress:
    """A bar on standard error, if that is a terminal."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._is_shown = stream.isatty()

    def show(self, part: float, sent: int, received: int) -> None:
        """Draw the bar up to that *part*, 0 to 1."""
        if self._is_shown:
            bar = "#" * round(part * BAR_WIDTH)
            text = f"\r[{bar:{BAR_WIDTH}}] {part:4.0%}  sent {sent:,}  received {received:,} "
            self._stream.write(text)
            self._stream.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self._is_shown:
            self._stream.write("\r\033[K")
            self._stream.flush()


def _latency_rows(latency: Latency, received: int) -> list[str]:
    percentiles = "  ".join(f"{name} {value:,.0f}" for name, value in latency.percentiles.items())
    lines = [row("latency, µs", percentiles)]
    most = max(bucket.count for bucket in latency.histogram)
    for bucket in latency.histogram:
        bar = "█" * round(BAR_WIDTH * bucket.count / most)
        share = bucket.count / received
        lines.append(f"{bucket.low:>12,} … {bucket.high:<9,} {share:7.2%}  {bar}".rstrip())
    return lines
