"""A line chart as SVG, written as text: bench/batch_curve.py's plot needs no library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_WIDTH, _HEIGHT = 380, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 44
# Legible on white and on dark pages alike; what bounds the curves is dashed.
_BOUNDS = 2
_COLOURS = ("#888888", "#b0603a", "#2b7bba", "#d9822b", "#3a9a4a", "#a34fb5")
_GRID = "#88888844"
_TEXT = "#7a7a7a"


@dataclass(frozen=True)
class Panel:
    """Curves over the same ``x``, by their names; both axes are logarithmic."""

    title: str
    x: Sequence[int]
    curves: Mapping[str, Sequence[float]]


def line_chart(panels: Sequence[Panel], x_label: str, y_label: str) -> str:
    """Returns an SVG document with the panels side by side. The first two curves are
    dashed."""
    width, height = _WIDTH * len(panels), _HEIGHT + 26
    body = [line for at, panel in enumerate(panels) for line in _panel(panel, at, x_label, y_label)]
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            *body,
            *_legend(names, height - 12),
            "</svg>",
            "",
        ]
    )


def _panel(panel: Panel, index: int, x_label: str, y_label: str) -> Iterator[str]:
    left, top = index * _WIDTH + _LEFT, _TOP
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    ticks = _ticks([value for values in panel.curves.values() for value in values])
    span_x = max(math.log(panel.x[-1] / panel.x[0]), 1e-9)
    span_y = math.log(ticks[-1] / ticks[0])

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / panel.x[0]) / span_x
        return left + width * right, top + height * (1 - math.log(y / ticks[0]) / span_y)

    yield _text(left + width / 2, top - 12, panel.title, "middle", bold=True)
    for tick in ticks:
        _, y = place(panel.x[0], tick)
        yield f'<path d="M{left} {y:.1f}h{width}" stroke="{_GRID}"/>'
        yield _text(left - 6, y + 4, f"{tick:g}", "end")
    for each in panel.x:
        yield _text(place(each, ticks[0])[0], top + height + 16, str(each), "middle")
    yield _text(left + width / 2, top + height + 34, x_label, "middle")
    if index == 0:
        yield _text(12, top - 12, y_label, "start")
    for number, (name, values) in enumerate(panel.curves.items()):
        points = [place(x, y) for x, y in zip(panel.x, values, strict=True)]
        yield _curve(points, number, name)


def _curve(points: Sequence[tuple[float, float]], number: int, name: str) -> str:
    colour = _COLOURS[number % len(_COLOURS)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if number < _BOUNDS else ""
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
    return (
        f'<g stroke="{colour}" fill="{colour}"><title>{escape(name)}</title>'
        f'<path d="M{path}" fill="none" stroke-width="2"{dashes}/>{dots}</g>'
    )


def _legend(names: Sequence[str], y: float) -> Iterator[str]:
    x = float(_LEFT)
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        dashes = ' stroke-dasharray="5 4"' if number < _BOUNDS else ""
        yield f'<path d="M{x:g} {y - 4:g}h22" stroke="{colour}" stroke-width="2"{dashes}/>'
        yield _text(x + 27, y, name, "start")
        x += 50 + 6.5 * len(name)


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_TEXT}"{weight}>'
        f"{escape(text)}</text>"
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten, from below all values to above them."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [each * 10.0**power for power in powers for each in (1, 2, 5)]
    first = max(tick for tick in ticks if tick <= min(values))
    last = min(tick for tick in ticks if tick > first and tick >= max(values))
    return [tick for tick in ticks if first <= tick <= last]
