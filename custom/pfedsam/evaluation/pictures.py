"""Pictures that a person looks at: image, truth, each model and its errors, every panel with one thing only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from pfedsam.data.colours import CLASS_COLOURS
from pfedsam.data.intensity import WINDOW
from pfedsam.data.picture import Picture
from pfedsam.evaluation.difference import Mask
from pfedsam.evaluation.panels import Panel, heading, panels_of, plane_name, planes_of, words_of
from pfedsam.evaluation.site import SiteEvaluation
from pfedsam.files import write_atomically

#: Colours of the classes (Okabe and Ito), each with a line of its own: neither is told by colour alone.
_COLOURS = tuple("#{:02X}{:02X}{:02X}".format(*colour) for colour in CLASS_COLOURS)
_DASHES = ("-", "--", "-.", ":")
#: Colour and texture of each area of a difference, and what it means.
DIFFERENCE = {
    "found": ("#009E73", "", "the truth and the model agree"),
    "missed": ("#56B4E9", "///", "in the truth only"),
    "wrong": ("#D55E00", "...", "found by the model only"),
}
_PAPER, _INK, _SOFT = "#141414", "#F2F2F2", "#C8C8C8"
#: Side of a panel in pixels: of a picture's, and of a slice's where several are shown.
_SIDE, _SLICE_SIDE = 420, 240
_DPI, _GAP = 100, 12
#: Opacity of a class, through which the image is seen, and of a difference.
_CLEAR, _SOLID = 0.25, 0.65
#: Letters of the heading, of titles, and of notes, in points, and the height of their lines in pixels.
_HEAD, _TITLE, _NOTE = 15, 12, 10
_HEAD_LINE, _TITLE_LINE, _NOTE_LINE, _KEY_LINE = 34, 21, 19, 22
#: A mask of fewer pixels is drawn so much finer, at most, so that its outline follows the pixels' borders.
_FINE, _FINER = 800, 8


def case_picture(evaluation: SiteEvaluation, example: str, image: Picture, path: Path) -> None:
    """Draw an example case of a site.

    Args:
        evaluation: of the site.
        example: key of its `examples`.
        image: of the case, in the grid of the label.
        path: PNG file to write, for its owner only. The picture names the site, not the case; its text entry
            `Description` has it in words.
    """
    stream = io.BytesIO()
    figure = case_figure(evaluation, example, image)
    figure.savefig(stream, dpi=_DPI, metadata={"Description": words_of(evaluation, example, image)})
    write_atomically(path, stream.getvalue())


@dataclass(frozen=True)
class _Canvas:
    """A figure that is filled by pixels from its upper left corner: whole ones, so that panels of the same content are
    the same.
    """

    width: int
    height: int
    figure: Figure

    @classmethod
    def of(cls, width: int, height: int) -> _Canvas:
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=_PAPER)
        FigureCanvasAgg(figure)
        return cls(width, height, figure)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return x / self.width, 1 - y / self.height

    def write(self, x: float, y: float, words: str, **how: Any) -> None:
        style: dict[str, Any] = {"color": _INK, "fontsize": _TITLE, "va": "top", **how}
        self.figure.text(*self.at(x, y), words, **style)

    def axes(self, x: int, y: int, wide: int, high: int) -> Any:
        left, bottom = self.at(x, y + high)
        return self.figure.add_axes((left, bottom, wide / self.width, high / self.height))


def case_figure(evaluation: SiteEvaluation, example: str, image: Picture) -> Figure:
    """The figure of an example case, see `case_picture`; each axes has the label `<panel>`, or `<panel> <row>`.

    A picture has its models beside each other, each above its difference; of a volume each slice has a row.
    """
    shown = evaluation.examples[example]
    planes = planes_of(shown)
    title, names = heading(evaluation, example), [plane_name(image, z) for z in planes]
    rows = [panels_of(evaluation, shown, z) for z in planes]
    if len(planes) > 1:
        return _drawn(rows, planes, names, title, evaluation.class_names, image)
    # image above truth, model above difference
    grid, title = [rows[0][::2], rows[0][1::2]], ", ".join(filter(None, [title, *names]))
    return _drawn(grid, 2 * planes, [], title, evaluation.class_names, image)


def _drawn(
    grid: Sequence[Sequence[Panel]],
    planes: Sequence[int],
    names: Sequence[str],
    title: str,
    classes: Sequence[str],
    image: Picture,
) -> Figure:
    """Rows of panels, the plane of each; rows with names have titles above the first only."""
    wide, high = _size(image, _SLICE_SIDE if names else _SIDE)
    cell, left = max(wide, _SLICE_SIDE), _GAP + (26 if names else 0)
    above = [0 if names and number else _titles_height(row) for number, row in enumerate(grid)]
    width = left + len(grid[0]) * (cell + _GAP)
    keys, step = _keys(classes, width), high + _NOTE_LINE + _GAP
    canvas = _Canvas.of(width, _HEAD_LINE + sum(above) + len(grid) * step + _KEY_LINE * len(keys) + 2 * _GAP)
    canvas.write(_GAP, _GAP, title, fontsize=_HEAD, weight="bold")
    factor = max(1, max(image.shape) // (2 * max(wide, high)))  # more than two stored pixels in one show nothing
    y = _HEAD_LINE + 6
    for number, (row, z) in enumerate(zip(grid, planes, strict=True)):
        y += above[number]
        background = _background(image, z, (wide, high))
        for place, panel in enumerate(row):
            x = left + place * (cell + _GAP) + (cell - wide) // 2
            axes = canvas.axes(x, y, wide, high)
            axes.set_label(f"{panel.name} {number}" if names else panel.name)
            _show(axes, panel, image, background, factor)
            if above[number]:
                canvas.write(x, y - 9, panel.title, va="baseline", linespacing=1.3)
            canvas.write(x, y + high + 3, panel.note, color=_SOFT, fontsize=_NOTE)
        if names:
            canvas.write(_GAP, y + high / 2, names[number], rotation=90, va="center")
        y += step
    how: dict[str, Any] = {"fontsize": _NOTE, "frameon": False, "labelcolor": _INK, "handlelength": 2.4}
    for number, handles in enumerate(keys):
        place_of = canvas.at(left, y + number * _KEY_LINE)
        how |= {"loc": "upper left", "bbox_to_anchor": place_of, "borderpad": 0, "borderaxespad": 0}
        canvas.figure.legend(handles=handles, ncols=len(handles), handleheight=1, **how)
    return canvas.figure


def _titles_height(row: Sequence[Panel]) -> int:
    return _TITLE_LINE * max(panel.title.count("\n") + 1 for panel in row) + 6


def _size(image: Picture, side: int) -> tuple[int, int]:
    """Width and height of a panel in pixels: the longer one is `side`, voxels have their proportions."""
    across, down = (1.0, 1.0) if image.spacing is None else image.spacing[:2]
    wide, high = image.shape[0] * across, image.shape[1] * down
    factor = side / max(wide, high)
    return max(1, round(wide * factor)), max(1, round(high * factor))


def _background(image: Picture, z: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """What lies below the outlines, as wide and high as its panel: colours as they are, or grey between percentiles.

    It has the panel's own pixels, so that no drawing rounds them in another way.
    """
    rows = np.asarray(image.rows(image.plane(z)))
    if not image.is_colour:
        low, high = np.percentile(image.grey(), WINDOW)
        rows = np.clip((rows.astype(np.float64) - low) / max(high - low, 1e-6), 0, 1) * 255
    stored = Image.fromarray(np.ascontiguousarray(rows.astype(np.uint8)))
    return np.asarray(stored.resize(size, Image.Resampling.BOX))


def _reduced(mask: Mask, factor: int) -> Mask:
    """A pixel where any of its pixels are: nothing small disappears."""
    padded = np.pad(mask, [(0, -size % factor) for size in mask.shape])
    high, wide = (size // factor for size in padded.shape)
    return np.asarray(padded.reshape(high, factor, wide, factor).any(axis=(1, 3)))


def _show(axes: Any, panel: Panel, image: Picture, background: NDArray[np.uint8], factor: int) -> None:
    """One panel: the image, and on it what the panel is for."""
    wide, high = (size / factor for size in image.shape[:2])
    limits = (-0.5, wide - 0.5, high - 0.5, -0.5)
    axes.imshow(background, aspect="auto", cmap="gray", vmin=0, vmax=255, extent=limits, interpolation="nearest")
    axes.set_axis_off()
    for name, area in panel.difference.items():
        colour, hatch, _ = DIFFERENCE[name]
        _paint(axes, _reduced(image.rows(area), factor), colour, "-", 1.0, _SOLID, hatch)
    if panel.classes is not None:
        width, alpha = (1.4, 0.0) if panel.difference else (2.0, _CLEAR)
        for number, mask in enumerate(panel.classes):
            _paint(axes, _reduced(image.rows(mask), factor), *class_style(number), width, alpha)
    axes.set(xlim=limits[:2], ylim=limits[2:])


def class_style(number: int) -> tuple[str, Any]:
    """Colour and line of the class `number`, from 0; the line goes on where the colours repeat."""
    return _COLOURS[number % len(_COLOURS)], _DASHES[(number + number // len(_COLOURS)) % len(_DASHES)]


def _paint(axes: Any, area: Mask, colour: str, dash: str, width: float, alpha: float, hatch: str = "") -> None:
    """An area in colour and texture with its outline, that of a class on a dark line."""
    if not area.any():
        return
    outline = _outline(area)
    # lines at their exact places: rounded ones would differ between panels
    line: dict[str, Any] = {"edgecolor": colour, "linewidth": width, "linestyle": dash, "snap": False}
    if alpha >= _SOLID:
        axes.add_artist(PathPatch(outline, facecolor=to_rgba(colour, alpha), hatch=hatch, **line))
        return
    if alpha:
        axes.add_artist(PathPatch(outline, facecolor=to_rgba(colour, alpha), linewidth=0, snap=False))
    effects = [withStroke(linewidth=width + 1.2, foreground=_PAPER)]
    axes.add_artist(PathPatch(outline, fill=False, path_effects=effects, **line))


def _outline(area: Mask) -> Outline:
    """Closed lines along the borders of the pixels, holes the other way round."""
    spans = [np.flatnonzero(area.any(axis=1 - axis)) for axis in (0, 1)]
    box = tuple(slice(span[0], span[-1] + 1) for span in spans)
    finer = min(_FINER, max(1, _FINE // max(area.shape)))
    fine = np.pad(np.kron(area[box], np.ones((finer, finer), np.uint8)), 1)
    y, x = (span[0] + (np.arange(n) - 0.5) / finer - 0.5 for span, n in zip(spans, fine.shape, strict=True))
    lines = contour_generator(x, y, fine).lines(0.5)
    return Outline.make_compound_path(*(Outline(np.asarray(line), closed=True) for line in lines))


def _keys(classes: Sequence[str], width: int) -> list[list[Any]]:
    """The legend in lines: the classes, then the areas of a difference."""
    marks = [
        Patch(facecolor=to_rgba(colour, _CLEAR), edgecolor=colour, linestyle=dash, linewidth=2, label=name)
        for name, (colour, dash) in ((name, class_style(number)) for number, name in enumerate(classes))
    ]
    areas = [
        Patch(facecolor=to_rgba(colour, _SOLID), edgecolor=colour, hatch=hatch, label=f"{name}: {means}")
        for name, (colour, hatch, means) in DIFFERENCE.items()
    ]
    if len(classes) > 1:
        areas[-1].set_label(f"{areas[-1].get_label()}, or as another class")
    each = 8  # pixels of a letter, about
    lines: list[list[Any]] = []
    for handles in (marks, areas):
        room = 0
        for handle in handles:
            need = 60 + each * len(str(handle.get_label()))
            if need > room:
                lines.append([])
                room = width - 2 * _GAP
            lines[-1].append(handle)
            room -= need
    return lines
