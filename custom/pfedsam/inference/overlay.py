"""A picture of a prediction on its image, for a quick look."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pfedsam.files import when_whole
from pfedsam.inference.predict import Prediction

#: One for each class, colour-blind safe (Okabe and Ito).
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")


def write_overlay(found: Prediction, path: Path) -> None:
    """Outline every class on the slice with the largest prediction."""
    label = found.label()
    z = int((label > 0).sum(axis=(0, 1)).argmax()) if label.ndim > 2 else 0
    label = label[..., z] if label.ndim > 2 else label
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(found.image.rows(found.image.plane(z)), cmap="gray")
    for number, colour in zip(range(1, len(found.probabilities) + 1), _COLOURS, strict=False):
        area = found.image.rows(label >= number)
        if area.any():
            axes.contour(area, levels=[0.5], colors=[colour], linewidths=1.6)
    axes.set_axis_off()
    with when_whole(path) as file:
        figure.savefig(file, dpi=110)
