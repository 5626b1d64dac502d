"""Where a model is right and wrong: one definition for the report and the viewer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def difference(label: Mask, prediction: Mask) -> dict[str, Mask]:
    """Where a model is right and wrong.

    Args:
        label: of each class, `(C, ...)`.
        prediction: the same.

    Returns:
        Areas without the axis of the classes: `found` where both have the same classes, `missed` where only the truth
        has one, `wrong` where the model has one and the truth none or another.
    """
    there, told, same = label.any(0), prediction.any(0), (label == prediction).all(0)
    return {"found": told & same, "missed": there & ~told, "wrong": told & ~same}
