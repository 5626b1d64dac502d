"""Pictures that a person looks at: image, truth, both models and their errors side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pfedsam.data.picture import Picture
from pfedsam.evaluation.site import CasePrediction, SiteEvaluation

#: Colour-blind safe (Okabe and Ito): truth, prediction, missed, found too much.
TRUTH, PREDICTED, MISSED, EXTRA = "#56B4E9", "#E69F00", "#56B4E9", "#D55E00"


def case_picture(evaluation: SiteEvaluation, example: str, image: Picture, path: Path) -> None:
    """Draw an example case of a site on the slice with the largest label.

    Args:
        evaluation: of the site.
        example: key of its `examples`.
        image: of the case, in the grid of the label.
        path: PNG file to write. The picture names the site, not the case.
    """
    shown = evaluation.examples[example]
    z = int(shown.label.any(axis=0).sum(axis=(0, 1)).argmax())
    low, high = np.percentile(image.values, (0.5, 99.5))
    last = list(shown.predictions)[-1]
    panels = ["image", "truth", *shown.predictions, "difference"]
    figure = Figure(figsize=(3 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, title in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(image.rows(image.plane(z)), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        axes.set_axis_off()
        if title in ("truth", *shown.predictions):
            _outline(axes, image.rows(shown.label[..., z].max(axis=0)), TRUTH, "-")
        if title in shown.predictions:
            _outline(axes, image.rows(shown.predictions[title][..., z].max(axis=0)), PREDICTED, "--")
            title = f"{title} model: Dice {evaluation.dice_of(shown.case, title):.2f}"
        if title == "difference":
            _difference(axes, shown, last, z, image)
            title = f"{last}: // missed, dots: too much"
        axes.set_title(title, fontsize=10)
    heading = f"{evaluation.site}, {example} test case, slice {z + 1}: truth solid, prediction dashed"
    figure.suptitle(heading, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _outline(axes: object, area: np.ndarray, colour: str, style: str) -> None:
    if area.any():
        axes.contour(area, levels=[0.5], colors=[colour], linewidths=1.6, linestyles=style)  # type: ignore[attr-defined]


def _difference(axes: object, shown: CasePrediction, model: str, z: int, image: Picture) -> None:
    """What the model missed and what it found too much, in colour and in texture."""
    label, prediction = (image.rows(mask[..., z].max(axis=0)) for mask in (shown.label, shown.predictions[model]))
    for area, colour, hatch in ((label & ~prediction, MISSED, "////"), (prediction & ~label, EXTRA, "....")):
        if area.any():
            axes.contourf(  # type: ignore[attr-defined]
                area, levels=[0.5, 1.5], colors=[to_rgba(colour, 0.6)], hatches=[hatch]
            )
