"""Leave cases out of a bundle's evaluator that is built already."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from monai.data import DataLoader
from torch.utils.data import Subset

from pfedsam.errors import ErrorCode, PFedSAMError


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
    loader = evaluator.data_loader
    if len(loader.dataset) != len(listed):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"the bundle validates on {len(loader.dataset)} items of {len(listed)} cases: none can be left out.",
            "Let its 'validate#dataset' hold one item a case.",
        )
    kept = [number for number in range(len(listed)) if number not in numbers]
    evaluator.data_loader = DataLoader(
        Subset(loader.dataset, kept),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
    evaluator.state.epoch_length = len(evaluator.data_loader)
    return [listed[number] for number in kept]
