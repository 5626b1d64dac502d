"""A site's validation: the Dice of a model over whole cases, and which cases it answers at all.

The Dice of a model that predicts everything is a function of the lesion's volume alone, and that of one that predicts
nothing tells which cases have none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor
from torch.utils.data import Subset

from pfedsam.data.known import on_known
from pfedsam.data.prepared import PreparedVolumes
from pfedsam.training.left_out import run_on
from pfedsam.training.trainer import reset

logger = logging.getLogger(__name__)

#: Slices on which a large site validates in a round, at least so many cases, whatever their slices.
MOST_SLICES, LEAST_CASES = 600, 10

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

    with (
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, look),
        evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, _on_known),
    ):
        evaluator.run()
    return float(evaluator.state.metrics["val_dice"]), answered


def _on_known(engine: Any) -> None:
    """Where a label says nothing, nothing is right or wrong. It comes after the bundle's postprocessing."""
    for item in engine.state.output:
        item[Keys.LABEL], item[Keys.PRED] = on_known(item[Keys.LABEL], item[Keys.PRED])


def validated_cases(evaluator: Any, exclusive: bool) -> list[float]:
    """Dice of each case of a bundle's evaluator, mean over the classes; a class that is in neither label nor prediction
    and has no Dice is left out, and a case without any counts as 1.
    """
    run_validation(evaluator, exclusive)
    details = torch.as_tensor(evaluator.state.metric_details["val_dice"], dtype=torch.float64)
    return torch.nan_to_num(details.flatten(1).nanmean(1), nan=1.0).tolist()


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


class RoundSample:
    """The cases that a site validates on in a round: all of a small site, a seeded draw of a large one.

    The draw is the same in every round, so that its Dice can be compared from round to round. What is kept or told of
    the final models is of all cases.

    Args:
        seed: of the draw.
        least_cases: that the draw has.
    """

    def __init__(self, seed: int, least_cases: int = LEAST_CASES) -> None:
        self.seed, self.least_cases = seed, least_cases
        self._told = False

    @contextmanager
    def of(self, evaluator: Any) -> Iterator[None]:
        """Let an evaluator run on the draw meanwhile."""
        loader = evaluator.data_loader
        depths = _depths(loader.dataset)
        chosen = self.choose(depths or ())
        if depths is None or len(chosen) == len(depths):
            yield
            return
        if not self._told:
            self._told = True
            logger.info("rounds are validated on %d of %d cases, the final models on all", len(chosen), len(depths))
        run_on(evaluator, chosen)
        try:
            yield
        finally:
            evaluator.data_loader = loader
            evaluator.state.epoch_length = len(loader)

    def choose(self, depths: Sequence[int]) -> list[int]:
        """Numbers of the cases of the draw, sorted, by the slices of each case."""
        order = np.random.default_rng(self.seed).permutation(len(depths)).tolist()
        slices = np.cumsum([depths[number] for number in order])
        count = max(int(np.searchsorted(slices, MOST_SLICES, side="right")), self.least_cases)
        return sorted(order[:count])


def _depths(dataset: Any) -> list[int] | None:
    """Slices of each case, None for a dataset that does not tell."""
    if isinstance(dataset, Subset):
        depths = _depths(dataset.dataset)
        return None if depths is None else [depths[number] for number in dataset.indices]
    return [dataset.depth(number) for number in range(len(dataset))] if isinstance(dataset, PreparedVolumes) else None
