"""Ratios as horizontal bars, in SVG. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

LABEL_WIDTH: Final = 190  # pixels, as everything here
BARS_WIDTH: Final = 320
ROW_HEIGHT: Final = 16
HEAD_HEIGHT: Final = 42
GAP: Final = 24
COLUMNS: Final = 2
FURTHEST: Final = 16.0  # ratio that the scale reaches, at most
FONT: Final = 'font-family="sans-serif" font-size="11"'


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio with its spread, all above 0."""

    label: str
    ratio: float
    low: float
    high: float
    is_better: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars under one title."""

    title: str
    bars: Sequence[Bar]


def draw(panels: Sequence[Panel]) -> str:
    """Return an SVG with the *panels* side by side, all on one logarithmic scale around 1."""
    ends = [end for panel in panels for bar in panel.bars for end in (bar.low, bar.high)]
    reach = min(max(2.0, *(max(end, 1 / end) for end in ends)), FURTHEST)
    width = LABEL_WIDTH + BARS_WIDTH + GAP
    parts = []
    top = GAP
    for first in range(0, len(panels), COLUMNS):
        row = panels[first : first + COLUMNS]
        for column, panel in enumerate(row):
            parts.append(f'<g transform="translate({column * width + GAP},{top})">')
            parts += _panel(panel, reach)
            parts.append("</g>")
        top += HEAD_HEIGHT + ROW_HEIGHT * max(len(panel.bars) for panel in row) + GAP
    size = COLUMNS * width + GAP, top
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" {FONT}>'
    background = f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>'
    return "\n".join([head, background, *parts, "</svg>\n"])


def _panel(panel: Panel, reach: float) -> list[str]:
    def x(ratio: float) -> float:
        """Return where a ratio lies: 1 in the middle, *reach* and beyond at the right end."""
        part = max(-1.0, min(1.0, math.log(ratio) / math.log(reach)))
        return round(LABEL_WIDTH + BARS_WIDTH / 2 * (1 + part), 1)

    bottom = HEAD_HEIGHT + ROW_HEIGHT * len(panel.bars)
    lines = [f'<text y="12" font-weight="bold">{escape(panel.title)}</text>']
    for tick in _ticks(reach):
        color = "#444" if tick == 1 else "#ccc"
        lines.append(_line(x(tick), HEAD_HEIGHT - 6, x(tick), bottom, color))
        lines.append(_text(x(tick), HEAD_HEIGHT - 10, "middle", f"{tick:g}"))
    for number, bar in enumerate(panel.bars):
        top = HEAD_HEIGHT + number * ROW_HEIGHT
        middle = top + ROW_HEIGHT // 2
        left, right = sorted((x(1), x(bar.ratio)))
        color = "#3a7d44" if bar.is_better else "#b3541e"
        lines.append(_text(LABEL_WIDTH - 8, middle + 4, "end", bar.label))
        lines.append(
            f'<rect x="{left}" y="{top + 3}" width="{right - left:.1f}"'
            f' height="{ROW_HEIGHT - 6}" fill="{color}"/>'
        )
        lines.append(_line(x(bar.low), middle, x(bar.high), middle, "black"))
    return lines


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}"/>'


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(reach: float) -> list[float]:
    """Return powers of two as far as *reach*, both ways."""
    most = int(math.log2(reach))
    return [2.0**exponent for exponent in range(-most, most + 1)]
