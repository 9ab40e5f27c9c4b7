"""The report's graphics as SVG and HTML fragments; every text that comes in is escaped here.

Horizontal charts place everything in per cent of their own width, so that they fit any page while the text keeps its
size. Curves are drawn in a fixed box that scales as a whole. Colours are names of CSS variables of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SERIES = tuple(f"var(--c{i})" for i in range(8))
"""Colours of series in order; Okabe and Ito's, which people with any colour vision can tell apart."""

ROLES = ("teacher", "pivot", "stage")
CURVE_POINTS = 400
"""Points drawn of a longer curve."""
NAMED_WIDTH = 0.14
"""Pieces of a stacked bar from this share of its width have their names above them."""
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 8, 34


@dataclass(frozen=True)
class Dot:
    """A value with its interval, both on a scale of 0..1, and the text beside it."""

    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One line: a value per step."""

    name: str
    color: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Part:
    """One piece of a stacked bar."""

    name: str
    value: float
    text: str
    color: str


def dot_grid(
    rows: Sequence[tuple[str, str]], panels: Sequence[tuple[str, Sequence[Dot | None]]], ticks: Sequence[str]
) -> str:
    """Rows of (name, role), and a panel for each column: dots with intervals on a common scale.

    Args:
        rows: the models; the role decides the dot's shape and colour.
        panels: each column's title and its dots, one per row.
        ticks: labels of the scale, evenly from its left end to its right end.
    """
    cells = ["<span></span>", *(f'<span class="head">{escape(title)}</span>' for title, _ in panels)]
    for index, (name, role) in enumerate(rows):
        line = " first" if index and rows[index - 1][1] != role else ""
        cells.append(f'<span class="name{line}" title="{escape(name)}">{escape(name)}</span>')
        cells += [f'<span class="{line.strip()}">{_dot(dots[index], role, len(ticks))}</span>' for _, dots in panels]
    cells += ["<span></span>", *[_ticks(ticks)] * len(panels)]
    return f'<div class="dots" style="--panels:{len(panels)}">{"".join(cells)}</div>'


def roles() -> str:
    """What the dots' shapes and colours mean."""
    dot = '<svg class="key {0}"><circle class="dot" cx="6" cy="7" r="3.5"/></svg>{0}'
    return '<div class="legend">' + "".join(f"<span>{dot.format(role)}</span>" for role in ROLES) + "</div>"


def _dot(dot: Dot | None, role: str, ticks: int) -> str:
    grid = "".join(f'<line class="grid" x1="{x:.1%}" x2="{x:.1%}" y1="0" y2="100%"/>' for x in _spread(ticks))
    if dot is None:
        return f'<svg class="strip" role="img" aria-label="not measured">{grid}</svg>'
    place = f'x="{dot.high:.2%}" dx="6" y="18"'
    if dot.high > 0.72:
        place = f'x="{dot.low:.2%}" dx="-6" y="18" text-anchor="end"'
        if dot.low < 0.28:
            place = f'x="{dot.value:.2%}" y="8" text-anchor="middle"'
    return (
        f'<svg class="strip {escape(role)}" role="img" aria-label="{escape(dot.text)}">{grid}'
        f'<line class="interval" x1="{dot.low:.2%}" x2="{dot.high:.2%}" y1="14" y2="14"/>'
        f'<circle class="dot" cx="{dot.value:.2%}" cy="14" r="3.5"/><text {place}>{escape(dot.text)}</text></svg>'
    )


def _ticks(ticks: Sequence[str]) -> str:
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end"]
    texts = "".join(
        f'<text class="tick" x="{x:.1%}" y="12" text-anchor="{anchor}">{escape(text)}</text>'
        for x, anchor, text in zip(_spread(len(ticks)), anchors, ticks, strict=True)
    )
    return f'<svg class="ticks">{texts}</svg>'


def _spread(count: int) -> list[float]:
    return [i / (count - 1) for i in range(count)]


def stacked_bar(parts: Sequence[Part]) -> str:
    """One bar over the whole width; what its pieces are stands in its `legend`."""
    total = sum(part.value for part in parts) or 1.0
    rects, x = [], 0.0
    for part in parts:
        width = part.value / total
        rects.append(
            f'<rect x="{x:.3%}" y="18" width="{width:.3%}" height="24" fill="{part.color}">'
            f"<title>{escape(part.name)}: {escape(part.text)}</title></rect>"
        )
        if width > NAMED_WIDTH:
            rects.append(f'<text x="{x:.3%}" y="12">{escape(part.name)}</text>')
        x += width
    return f'<svg class="stack" role="img">{"".join(rects)}</svg>'


def legend(parts: Sequence[Part]) -> str:
    """Swatch, name and text of each part."""
    items = "".join(
        f"<span>{swatch(part.color)}{escape(part.name)} <b>{escape(part.text)}</b></span>" for part in parts
    )
    return f'<div class="legend">{items}</div>'


def swatch(color: str) -> str:
    """A small square of a colour."""
    return f'<svg class="swatch"><rect width="100%" height="100%" rx="2" fill="{color}"/></svg>'


def bar_rows(rows: Sequence[tuple[str, Sequence[Part], str]], full: float) -> str:
    """Rows of name, stacked bar and text.

    Args:
        rows: name, the bar's parts, and the text after it.
        full: the value that fills the whole width.
    """
    cells = []
    for name, parts, text in rows:
        rects, x = ['<rect class="track" width="100%" height="100%"/>'], 0.0
        for part in parts:
            width = part.value / full if full else 0.0
            rects.append(f'<rect x="{x:.3%}" width="{width:.3%}" height="100%" fill="{part.color}"/>')
            x += width
        cells.append(
            f'<span class="name">{escape(name)}</span><svg class="bar" role="img">{"".join(rects)}</svg>'
            f'<span class="value">{escape(text)}</span>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'


def curve_panel(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """Curves over steps: the mean over a window as a line, every step faintly behind it, the last mean as a number.

    Values that are not finite leave a gap. Empty where there is nothing to draw.
    """
    clean = [(curve, *_finite(curve)) for curve in curves]
    clean = [(curve, steps, values) for curve, steps, values in clean if steps]
    if not clean:
        return ""
    means = [_smooth(values) for _, _, values in clean]
    every = sorted(value for _, _, values in clean for value in values)
    smooth = [value for mean in means for value in mean]
    low, high, ticks = _scale(min(every[int(0.01 * len(every))], *smooth), max(every[int(0.98 * len(every))], *smooth))
    first, last = min(steps[0] for _, steps, _ in clean), max(steps[-1] for _, steps, _ in clean)
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def point(step: float, value: float) -> str:
        x = 0.5 if first == last else (step - first) / (last - first)
        return f"{x * inner_w:.1f},{(high - value) / (high - low) * inner_h:.1f}"

    lines, ends = [], []
    for (curve, steps, values), mean in zip(clean, means, strict=True):
        for css, line in (("raw", values), ("mean", mean)):
            kept = _thin(len(line))
            points = " ".join(point(steps[i], line[i]) for i in kept)
            lines.append(f'<polyline class="{css}" stroke="{curve.color}" points="{points}"/>')
        if len(steps) == 1:
            x, y = point(steps[0], values[0]).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{curve.color}"/>')
        ends.append((mean[-1], f"<span>{swatch(curve.color)}{escape(curve.name)} <b>{mean[-1]:.3g}</b></span>"))
    names = [text for _, text in sorted(ends, key=lambda end: -end[0])]  # from the top line down
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
        for y in [TOP + (high - tick) / (high - low) * inner_h]
    )
    bottom = HEIGHT - BOTTOM + 15
    axis = (
        f'<text class="tick" x="{LEFT}" y="{bottom}">{first:,}</text>'
        f'<text class="tick" x="{LEFT + inner_w / 2}" y="{bottom}" text-anchor="middle">step</text>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{bottom}" text-anchor="end">{last:,}</text>'
    )
    return (
        f'<figure class="curve"><figcaption><b>{escape(title)}</b>'
        f'<span class="unit">{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT - 14}" role="img" aria-label="{escape(title)}">{grid}{axis}'
        f'<svg x="{LEFT}" y="{TOP}" width="{inner_w}" height="{inner_h}">{"".join(lines)}</svg></svg>'
        f'<div class="legend">{"".join(names)}</div></figure>'
    )


def window(count: int) -> int:
    """Steps that the smoothed line averages over, for a curve of `count` steps; odd."""
    return max(1, count // 25) // 2 * 2 + 1


def _finite(curve: Curve) -> tuple[list[int], list[float]]:
    pairs = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over `window` steps; shorter, but still centred, at the ends."""
    half = window(len(values)) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def _thin(count: int) -> list[int]:
    """Indices of at most CURVE_POINTS evenly spread points, both ends among them."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """A scale that holds low..high with three to six round ticks."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    start, stop = math.floor(low / step), math.ceil(high / step)
    return start * step, stop * step, [round(i * step, 12) for i in range(start, stop + 1)]
