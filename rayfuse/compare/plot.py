"""The page's plots: differences with their intervals, one column per condition, as plain SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from rayfuse.compare.statistics import Estimate

NAMES, COLUMN, GAP, LINE, TOP, BOTTOM = 210, 230, 24, 22, 44, 40
BETTER, WORSE, LEVEL, INK, GRID = "#00795c", "#b04a00", "#767676", "#222222", "#d9d9d9"


def differences_svg(
    names: Sequence[str], columns: Mapping[str, Mapping[str, Estimate]], axis: str, *, factor: float = 100.0
) -> str:
    """Dots with intervals round a line at 0.

    Args:
        names: lines from the top down.
        columns: by title, the estimate of each name (those missing stay empty); all columns share one scale.
        axis: what the scale shows.
        factor: of the values, 100 for percentage points.
    """
    values = [v * factor for column in columns.values() for e in column.values() for v in (e.low, e.high)]
    step = _round_step(max(map(abs, [*values, 1e-9])))
    reach = step * math.ceil(max(map(abs, [*values, 1e-9])) / step)
    width, height = NAMES + len(columns) * (COLUMN + GAP), TOP + LINE * len(names) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, name in enumerate(names):
        parts.append(f'<text x="{NAMES - 10}" y="{_y(row) + 4}" text-anchor="end">{escape(name)}</text>')
    for number, (title, column) in enumerate(columns.items()):
        left = NAMES + number * (COLUMN + GAP)
        middle = left + COLUMN / 2
        bottom = TOP + LINE * len(names)
        parts.append(f'<text x="{middle}" y="20" text-anchor="middle" font-weight="600">{escape(title)}</text>')
        for tick in range(-round(reach / step), round(reach / step) + 1):
            x = middle + tick * step / reach * COLUMN / 2
            colour = INK if tick == 0 else GRID
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 10}" y2="{bottom}" stroke="{colour}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick * step:+g}</text>')
        parts.append(f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle">{escape(axis)}</text>')
        for row, name in enumerate(names):
            if name in column:
                parts.append(_dot(column[name], middle, factor / reach * COLUMN / 2, _y(row)))
    return "\n".join([*parts, "</svg>\n"])


def _dot(estimate: Estimate, middle: float, scale: float, y: float) -> str:
    colour = {1: BETTER, -1: WORSE, 0: LEVEL}[estimate.sign]
    low, mean, high = (middle + value * scale for value in (estimate.low, estimate.mean, estimate.high))
    return (
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="{colour}"/>'
    )


def _y(row: int) -> float:
    return TOP + LINE * row + LINE / 2


def _round_step(largest: float) -> float:
    power = 10.0 ** math.floor(math.log10(largest))
    return next(factor * power for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if factor * power >= largest / 4)
