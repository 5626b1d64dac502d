"""A site's validation: the Dice of a model over whole cases, and which cases it answers at all.

The Dice of a model that predicts everything is a function of the lesion's volume alone, and that of one that predicts
nothing tells which cases have none.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from pfedsam.training.trainer import reset

#: A case is answered by a prediction of a class only if it covers at least and at most this share of the input.
LEAST_COVERED, MOST_COVERED = 1e-5, 0.5


def run_validation(evaluator: Any, exclusive: bool) -> tuple[float, list[bool]]:
    """Run a bundle's evaluator on the network as it is now.

    Args:
        evaluator: of the bundle, with the metric `val_dice`.
        exclusive: as in `is_answer`.

    Returns:
        The mean Dice, and of each case whether it was answered.
    """
    reset(evaluator)
    answered: list[bool] = []

    def look(engine: Any) -> None:
        answered.extend(is_answer(logits, exclusive) for logits in engine.state.output[Keys.PRED])

    with evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, look):
        evaluator.run()
    return float(evaluator.state.metrics["val_dice"]), answered


def is_answer(logits: Tensor, exclusive: bool) -> bool:
    """Whether the prediction of a class covers between `LEAST_COVERED` and `MOST_COVERED` of the network's input.

    Args:
        logits: of a case, `(C, ...)`, not yet put back on its image.
        exclusive: the channels are exclusive classes, the first is the background; else each is a class of its own.
    """
    classes = range(1, len(logits))
    found = torch.stack([logits.argmax(0) == number for number in classes]) if exclusive else logits > 0
    covered = found.flatten(1).float().mean(1)
    return bool(((covered >= LEAST_COVERED) & (covered <= MOST_COVERED)).any())
