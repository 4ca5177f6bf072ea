"""Writes what a comparison found: Markdown for people, JSON for programs, and a picture."""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench.loadlib.comparison import Comparison, Metric, markdown, standings
from bench.loadlib.plot import Bar, Panel, draw
from bench.loadlib.servers import CHECKOUT
from relay.version import __version__

HOW_TO_READ: Final = """\
Written by `python -m bench.versus`, with `--xdp` where a title says "in the kernel". A cell is the
relay's number over coturn's, the median of the rounds with the smallest and the largest, then the
medians of the numbers, relay : coturn. **Bold** is where the relay is ahead. † marks where the load
client could not send all that it should."""


def write(
    folder: Path,
    tables: Mapping[str, Sequence[Comparison]],
    raw: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> None:
    """Write RESULTS.md, results.json and results.svg to *folder*. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = _versions()
    document = {
        "versions": versions,
        "notes": notes,
        "comparisons": {
            title: [comparison.as_dict() for comparison in comparisons]
            for title, comparisons in tables.items()
        },
        "raw": raw,
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "results.svg").write_text(draw(panels(tables)))
    (folder / "RESULTS.md").write_text(report(tables, versions, notes))


def report(
    tables: Mapping[str, Sequence[Comparison]],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    """Return the Markdown."""
    parts = ["# This relay compared with coturn", HOW_TO_READ, *notes]
    parts += [_items(f"{name}: {version}" for name, version in versions.items())]
    for title, comparisons in tables.items():
        parts += [f"## {title}", markdown(comparisons), _items(standings(comparisons))]
    parts += ["![The same ratios as bars](results.svg)"]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def panels(tables: Mapping[str, Sequence[Comparison]]) -> list[Panel]:
    """Return the ratios as bars, a panel for each metric of each table."""
    bars: dict[tuple[Metric, str], list[Bar]] = {}
    for title, comparisons in tables.items():
        for comparison in comparisons:
            ratios = comparison.ratios
            bar = Bar(
                comparison.case,
                comparison.ratio,
                min(ratios),
                max(ratios),
                comparison.relay_is_ahead,
            )
            bars.setdefault((comparison.metric, title), []).append(bar)
    by_metric = sorted(bars, key=lambda panel: list(Metric).index(panel[0]))
    return [Panel(f"{title}: {metric.title}", bars[metric, title]) for metric, title in by_metric]


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _versions() -> dict[str, str]:
    """Return what a reader must know to compare these numbers with others."""
    commit = _output_of("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty")
    processors = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "relay": f"{__version__}, commit {commit}, on Python {platform.python_version()}",
        "coturn": _output_of("turnserver", "--version"),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": f"{len(processors)} x {processors[0] if processors else platform.machine()}",
    }


def _output_of(*command: str) -> str:
    """Return the last line that a command prints, or ``unknown``."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return "unknown"
    return (run.stdout.strip().splitlines() or ["unknown"])[-1]
