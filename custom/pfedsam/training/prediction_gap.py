"""How far a round of local training has moved the predictions on the site's own training slices.

Training slices and not validation cases [ours]: what is sent with it, the update, is computed from them in any case, so
no further patient has a say in what leaves; the features of the frozen trunk are there already; and a site with one
validation patient has a number that does not hang on that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pfedsam.parameters import swapped_parameters
from pfedsam.training.distillation import bernoulli_kl, categorical_kl
from pfedsam.training.gap_weights import rounded_gap
from pfedsam.training.trainer import PhaseTrainer

#: Slices of the round's first epoch on which the predictions are compared, at most.
MOST_SLICES = 64


@torch.no_grad()
def prediction_gap(trainer: PhaseTrainer, received: Mapping[str, Tensor], round_number: int) -> float | None:
    """Mean divergence `KL(after || before)` of a pixel, over all pixels and classes (FedSemiDG, arXiv 2501.07378).

    After is the network as it is, before is the same with the shared tensors as received, both without experts and
    without prompts: what is compared is what the update that is sent changes. [ours]

    Args:
        trainer: of the site; its network has just been trained.
        received: the shared tensors as received.
        round_number: of the federation; it chooses the slices.

    Returns:
        As it may be told, see `rounded_gap`; None if it is no finite number.
    """
    network, total, pixels = trainer.network, 0.0, 0
    training = network.training
    network.eval()
    try:
        with network.experts(False):
            for images, _, items in slices_of_round(trainer, round_number):
                after = trainer.logits(images, items)
                with swapped_parameters(network, received):
                    before = trainer.logits(images, items)
                divergence = (categorical_kl if trainer.exclusive else bernoulli_kl)(after, before, 1.0)
                total, pixels = total + float(divergence.double().sum()), pixels + divergence.numel()
    finally:
        network.train(training)
    return rounded_gap(total / pixels) if pixels else None


def slices_of_round(trainer: PhaseTrainer, round_number: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Slices that the first epoch of a round draws, at most `MOST_SLICES`: their features are wanted in it anyway.

    Gives images `(B, 3, H, W)` and labels `(B, C, H, W)` on the device, and the items.
    """
    loader: Any = trainer.data_loader
    if hasattr(loader.sampler, "set_draw"):
        loader.sampler.set_draw(round_number, 1)
    items, size = [int(item) for item in islice(iter(loader.sampler), MOST_SLICES)], loader.batch_size or 1
    for first in range(0, len(items), size):
        part = items[first : first + size]
        found = [loader.dataset[item] for item in part]
        images, label = (torch.stack([one[key] for one in found]) for key in ("image", "label"))
        yield images.to(trainer.state.device), label.to(trainer.state.device), part
