"""Curves of a page that a person reads from across a room: Dice over rounds, a line for each site, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from markupsafe import Markup

from pfedsam.report.live.view import GLOBAL, PERSONAL, Training

#: Classes of the style sheet, a colour each; with dash and marker no line is told by its colour alone.
COLOURS = 6
_DASHES = ("", "14 7", "3 6", "14 6 3 6")
_MARKERS = ("circle", "square", "triangle", "diamond", "cross")
_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 50, 24, 76
#: Highest values of the axis, with its parts: a model that has just begun is read, too.
_TOPS = {0.1: 5, 0.2: 4, 0.5: 5, 1.0: 4}
_MOST_TICKS = 7
#: With more points, only the newest of each line has a marker.
_MOST_MARKERS = 60


def curves(training: Training) -> Markup:
    """A figure of all sites, in the page's own ink; hidden from screen readers, which have the table below it.

    The global model is a line with full markers; the personal one has hollow markers, that after the final phase in a
    column of its own on the right, joined to the global model that it began with.
    """
    top = next((limit for limit in _TOPS if all(p.dice <= 0.95 * limit for p in training.points)), 1.0)
    final = any(p.final for p in training.points)
    columns = max(1, training.of + (1 if final else 0))

    def place(rounds: int, dice: float, last: bool = False) -> tuple[float, float]:
        x = columns if last else rounds
        return (
            round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * x / columns, 1),
            round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * dice / top, 1),
        )

    parts = [*_axes(training, top, columns, final)]
    crowded = len(training.points) > _MOST_MARKERS
    for number, site in enumerate(training.sites):
        style = f'class="c{number % COLOURS}"'
        lines = {
            model: [
                place(p.rounds, p.dice)
                for p in sorted(training.points, key=lambda p: p.rounds)
                if (p.site, p.model, p.final) == (site, model, False)
            ]
            for model in (GLOBAL, PERSONAL)
        }
        fitted = [place(0, p.dice, last=True) for p in training.points if p.site == site and p.final]
        for model, points in lines.items():
            parts.append(_line(points, style, _DASHES[number % len(_DASHES)], thin=model == PERSONAL))
        parts.append(_line([*lines[GLOBAL][-1:], *fitted], style, "2 7", thin=True) if fitted else "")
        for points, hollow in ((lines[GLOBAL], False), (lines[PERSONAL], True), (fitted, True)):
            parts += [marker(number, x, y, hollow) for x, y in (points[-1:] if crowded else points)]
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true" focusable="false">{"".join(parts)}</svg>')


def swatch(number: int) -> Markup:
    """The sign of a site in a legend."""
    line = _line([(2, 12), (46, 12)], f'class="c{number % COLOURS}"', _DASHES[number % len(_DASHES)], thin=False)
    return Markup(
        f'<svg class="swatch" viewBox="0 0 48 24" aria-hidden="true" focusable="false">{line}'
        f"{marker(number, 24, 12, hollow=False)}</svg>"
    )


def marker(number: int, x: float, y: float, hollow: bool) -> str:
    """The marker of a site, by its number."""
    style = f'class="c{number % COLOURS} {"hollow" if hollow else "full"}"'
    shapes = {
        "circle": f'<circle cx="{x}" cy="{y}" r="7" {style}/>',
        "square": f'<path d="M{x - 6.5} {y - 6.5}h13v13h-13z" {style}/>',
        "triangle": f'<path d="M{x} {y - 8}l8 14h-16z" {style}/>',
        "diamond": f'<path d="M{x} {y - 9}l8 9l-8 9l-8 -9z" {style}/>',
        "cross": f'<path d="M{x - 7} {y - 3}h4v-4h6v4h4v6h-4v4h-6v-4h-4z" {style}/>',
    }
    return shapes[_MARKERS[number % len(_MARKERS)]]


def _line(points: Sequence[tuple[float, float]], style: str, dash: str, thin: bool) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" {style} stroke-width="{2 if thin else 4}" stroke-dasharray="{dash}"/>'


def _axes(training: Training, top: float, columns: int, final: bool) -> Iterator[str]:
    low, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for part in range(_TOPS[top] + 1):
        y = low - (low - _TOP) * part / _TOPS[top]
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 18}" y="{y + 7:.1f}" text-anchor="end">{top * part / _TOPS[top]:.2g}</text>'
    step = ceil(max(1, training.of) / _MOST_TICKS)
    for number in range(0, training.of + 1, step):
        x = _LEFT + (right - _LEFT) * number / columns
        yield f'<text x="{x:.1f}" y="{low + 32}" text-anchor="middle">{number}</text>'
    if final:
        yield f'<text x="{right}" y="{low + 32}" text-anchor="middle">final</text>'
    yield f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">rounds done</text>'
