"""Volumes through the 2-D network."""

from __future__ import annotations

from typing import Any

from monai.inferers import SliceInferer
from torch import Tensor

from pfedsam.training.feature_cache import FeatureCache


class CachedSliceInferer(SliceInferer):
    """MONAI's slice inferer that takes the frozen features of a case from a cache: for repeated validation.

    Args:
        cache: of the frozen trunk.
        kwargs: of `monai.inferers.SliceInferer`.
    """

    def __init__(self, cache: FeatureCache, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache = cache

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits `(1, C, H, W, D)` of a volume `(1, 3, H, W, D)`.

        Features are cached for a volume with a file name and a frozen trunk.
        """
        names = getattr(inputs, "meta", {}).get("filename_or_obj")
        if not names or not network.frozen_trunk:
            return super().__call__(inputs, network, *args, **kwargs)
        case = names if isinstance(names, str) else names[0]
        position = 0

        def cached(slices: Tensor, *_: Any, **__: Any) -> Tensor:
            # windows come in the order of the slices
            nonlocal position
            keys = [("volume", case, position + i) for i in range(len(slices))]
            position += len(slices)
            return network.head(self.cache.features(network.trunk, slices, keys))

        return super().__call__(inputs, cached)
