"""Pictures that a person looks at: image, truth, global and personal model side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pfedsam.evaluation.site import CasePrediction, SiteEvaluation

#: Colour-blind safe (Okabe and Ito): truth, prediction.
TRUTH, PREDICTED = "#56B4E9", "#E69F00"


def site_picture(evaluation: SiteEvaluation, image: np.ndarray, path: Path) -> None:
    """Draw the shown case of a site on the slice with the largest label.

    Args:
        evaluation: of the site; its `shown` case is drawn.
        image: intensities `(H, W, D)` in the grid of the label.
        path: PNG file to write.
    """
    shown = evaluation.shown
    assert shown is not None
    z = int(shown.label.any(axis=0).sum(axis=(0, 1)).argmax())
    low, high = np.percentile(image, (0.5, 99.5))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"image": None, "truth": shown.label, **shown.predictions}
    for axes, (title, mask) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(np.rot90(image[..., z]), cmap="gray", vmin=low, vmax=high)
        axes.set_axis_off()
        if mask is not None:
            _outline(axes, shown.label, z, TRUTH, "-")
        if mask is not None and title != "truth":
            _outline(axes, mask, z, PREDICTED, "--")
            title = f"{title} model: Dice {_dice(evaluation, shown, title):.2f}"
        axes.set_title(title, fontsize=10)
    figure.suptitle(f"{evaluation.site}, median test case, slice {z + 1}: truth solid, prediction dashed", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _outline(axes: object, mask: np.ndarray, z: int, colour: str, style: str) -> None:
    area = np.rot90(mask[..., z].max(axis=0))
    if area.any():
        axes.contour(area, levels=[0.5], colors=[colour], linewidths=1.6, linestyles=style)  # type: ignore[attr-defined]


def _dice(evaluation: SiteEvaluation, shown: CasePrediction, model: str) -> float:
    return next(s.mean_dice for s in evaluation.scores if s.case == shown.case and s.model == model)
