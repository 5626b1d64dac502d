"""Features of which a part is dropped: which, follows from numbers that the caller names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def dropped(features: Tensor, share: float, draw: Sequence[int]) -> Tensor:
    """Features with a share of them set to 0, the others scaled so that the expected value stays.

    Args:
        features: of any shape; they are not changed in place.
        share: from 0 to less than 1.
        draw: whole numbers from 0, which seed the draw.
    """
    seed = np.random.SeedSequence(list(draw)).generate_state(1)[0]
    random = torch.Generator(device=features.device).manual_seed(int(seed))
    kept = torch.empty_like(features).bernoulli_(1 - share, generator=random)
    return features * kept / (1 - share)
