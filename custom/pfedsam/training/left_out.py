"""Leave cases out of a bundle's evaluator that is built already, above all those that its model was trained on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import DataLoader
from torch.utils.data import Subset

from pfedsam.data.seen import Seen, patient_of
from pfedsam.errors import ErrorCode, PFedSAMError

logger = logging.getLogger(__name__)


def leave_out_trained(evaluator: Any, listed: Sequence[Mapping[str, Any]], seen: Seen, folder: Path) -> list[Any]:
    """Let a bundle's evaluator run without the cases of patients that a model was trained on, and log their names.

    Args:
        evaluator, listed: as in `leave_out`.
        seen: what the model has seen.
        folder: of the site, for the sentence of an error.

    Returns:
        The cases that are left.

    Raises:
        PFedSAMError: E08 if none is left, E29 as `leave_out`.
    """
    trained = [number for number, item in enumerate(listed) if seen.section_of(patient_of(item)) == "training"]
    if not trained:
        return list(listed)
    if len(trained) == len(listed):
        raise PFedSAMError(
            ErrorCode.WRONG_SPLIT,
            f"all {len(trained)} validation cases of '{folder}' are of patients that the saved model was trained on.",
            "Use the split that it was trained with (seed, datalist.json), or add cases.",
        )
    names = ", ".join(str(listed[number].get("case")) for number in trained)
    logger.warning("validation without %d case(s) that the saved model was trained on: %s", len(trained), names)
    return leave_out(evaluator, listed, trained)


def leave_out(evaluator: Any, listed: Sequence[Mapping[str, Any]], numbers: Collection[int]) -> list[Any]:
    """Let a bundle's evaluator run without some of the cases.

    Args:
        evaluator: with a data loader of one item a case, in the order of the list.
        listed: the bundle's list of cases.
        numbers: places in the list of the cases to leave out.

    Returns:
        The cases that are left.

    Raises:
        PFedSAMError: E29 if the bundle loads other items than it lists.
    """
    if not numbers:
        return list(listed)
    items = len(evaluator.data_loader.dataset)
    if items != len(listed):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"the bundle validates on {items} items of {len(listed)} cases: none can be left out.",
            "Let its 'validate#dataset' hold one item a case.",
        )
    kept = [number for number in range(len(listed)) if number not in numbers]
    run_on(evaluator, kept)
    return [listed[number] for number in kept]


def run_on(evaluator: Any, numbers: Sequence[int]) -> None:
    """Let an evaluator run on some of the items of its data loader, in this order."""
    loader = evaluator.data_loader
    evaluator.data_loader = DataLoader(
        Subset(loader.dataset, numbers),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    evaluator.state.epoch_length = len(evaluator.data_loader)
