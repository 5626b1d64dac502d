"""Style in the train step: what is done with the features of a batch between the frozen trunk and the head.

No pass of the trunk is needed, and features from the cache are as good as fresh ones. What is drawn follows from the
round, the phase and the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pfedsam.data.known import settled
from pfedsam.data.labels import OPEN
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.training.phase import Phase

#: Added to a variance, so that a patch of one value can take another's spread.
EPSILON = 1e-5


class Style:
    """What a phase does with the features of each batch; nothing, if the phase does not ask for it.

    Args:
        phase: its settings `patch_swap` and `mixup`.
        network: whose features they are.
        draw: number of the round and of the phase in it.
        box_probability: of the trainer.

    Raises:
        PFedSAMError: E32 if images are to be mixed that have boxes as prompts.
    """

    def __init__(
        self, phase: Phase, network: SegmentAnything, draw: tuple[int, int], box_probability: float = 0.0
    ) -> None:
        if phase.mixup is not None and box_probability:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"phase '{phase.name}' mixes images, but box_probability is {box_probability}: a box is of one image.",
                "Set box_probability to 0, or leave mixup out.",
            )
        self.swap, self.mixup, self.network, self._draw = phase.patch_swap, phase.mixup, network, draw

    def __call__(self, features: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Features for the head, of the same shape, and the label `(B, C, H, W)` that they belong to.

        Args:
            features: of the trunk, `(B, ...)`; they are not changed in place.
            label: `(B, C, H, W)`.
            step: of the phase.
        """
        if self.swap is None and self.mixup is None:
            return features, label
        random = np.random.default_rng([*self._draw, step])
        if self.swap is not None and random.random() < self.swap.probability:
            sides = features.shape[-2:] if channels_first(self.network) else features.shape[1:3]
            number = patches_along(sides, self.swap.patches)
            partners = random.permutation(len(features) * number**2)
            features = restyled_features(self.network, features, number, partners)
        if self.mixup is not None:
            share, partners = random.beta(self.mixup.alpha, self.mixup.alpha), random.permutation(len(features))
            features, label = mixed(features, partners, share), mixed_labels(label, partners, share)
        return features, label


def channels_first(network: SegmentAnything) -> bool:
    """Whether the features of a network's trunk are `(B, C, H, W)`; else `(B, H, W, C)`, as between two blocks."""
    blocks = network.image_encoder.adaptable_blocks()  # type: ignore[operator]
    whole = network.first_adapted == len(blocks) and not network.neck_is_adapted
    return not network.frozen_trunk or whole


def restyled_features(network: SegmentAnything, features: Tensor, number: int, partners: np.ndarray) -> Tensor:
    """Features of a network's trunk whose patches have the style of others, see `swapped_styles`.

    Args:
        network: which knows where the channels are.
        features: `(B, ...)`.
        number: of patches along each side.
        partners: of each patch, `(B * number ** 2,)`.
    """
    first = channels_first(network)
    maps = swapped_styles(features if first else features.movedim(-1, 1), number, partners)
    return maps if first else maps.movedim(1, -1)


def patches_along(sides: Sequence[int], most: int) -> int:
    """The largest number of patches, at most `most`, that divides both sides of a map."""
    return max(number for number in range(1, most + 1) if not any(side % number for side in sides))


def swapped_styles(maps: Tensor, number: int, partners: np.ndarray) -> Tensor:
    """Maps whose patches have the mean and the standard deviation of others, in each channel.

    Args:
        maps: `(B, C, H, W)`, of any dtype.
        number: of patches along each side.
        partners: for each patch, image by image and row by row, the one whose style it takes, `(B * number ** 2,)`.

    Returns:
        `(B, C, H, W)` in the same dtype.
    """
    batch, channels, height, width = maps.shape
    cut = maps.float().view(batch, channels, number, height // number, number, width // number)
    patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    mean = patches.mean((-2, -1), keepdim=True)
    spread = (patches.var((-2, -1), correction=0, keepdim=True) + EPSILON).sqrt()
    other = torch.from_numpy(partners).to(maps.device)
    restyled = (patches - mean) / spread * spread[other] + mean[other]
    whole = restyled.view(batch, number, number, channels, height // number, width // number)
    return whole.permute(0, 3, 1, 4, 2, 5).reshape(maps.shape).to(maps.dtype)


def mixed(values: Tensor, partners: np.ndarray, share: float) -> Tensor:
    """`share x_i + (1 - share) x_j` of values `(B, ...)`, j the partner of i."""
    return share * values + (1 - share) * values[torch.from_numpy(partners).to(values.device)]


def mixed_labels(label: Tensor, partners: np.ndarray, share: float) -> Tensor:
    """Mixed labels `(B, C, H, W)`, from 0 to 1, open where one of the two is."""
    is_open = label == OPEN
    is_open = is_open | is_open[torch.from_numpy(partners).to(label.device)]
    return mixed(settled(label), partners, share).masked_fill(is_open, OPEN)
