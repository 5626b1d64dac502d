"""Volumes through the 2-D network."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SliceInferer
from torch import Tensor

from pfedsam.training.feature_cache import FeatureCache


class CachedSliceInferer(SliceInferer):
    """MONAI's slice inferer that takes the frozen features of a case from a cache: for repeated validation.

    Args:
        cache: of the frozen trunk.
        amp: bfloat16 autocast on the device of the volume, CPU or CUDA, as in training (MONAI's evaluator offers it on
            CUDA alone).
        kwargs: of `monai.inferers.SliceInferer`.
    """

    def __init__(self, cache: FeatureCache, amp: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cache, self.amp = cache, amp

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits `(1, C, H, W, D)` of a volume `(1, 3, H, W, D)`, in float32.

        Features are cached for a volume with a file name and a frozen trunk.
        """
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self._logits(inputs, network).float()

    def _logits(self, inputs: Tensor, network: Any) -> Any:
        names = getattr(inputs, "meta", {}).get("filename_or_obj")
        if not names or not network.frozen_trunk:
            return super().__call__(inputs, network)
        case = names if isinstance(names, str) else names[0]
        position = 0

        def cached(slices: Tensor, *_: Any, **__: Any) -> Tensor:
            # windows come in the order of the slices
            nonlocal position
            keys = [("volume", case, position + i) for i in range(len(slices))]
            position += len(slices)
            return network.head(self.cache.features(network.trunk, slices, keys))

        return super().__call__(inputs, cached)


class PromptedSliceInferer(SliceInferer):
    """MONAI's slice inferer with a box for each slice; a slice without a box is background.

    Args:
        boxes: `(D, 4)` in pixels of the network's input, NaN for a slice without a box.
        kwargs: of `monai.inferers.SliceInferer`.
    """

    #: Logit of background.
    NOTHING = -20.0

    def __init__(self, boxes: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.boxes = boxes

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Logits `(1, C, H, W, D)` of a volume `(1, 3, H, W, D)`."""
        position = 0

        def prompted(slices: Tensor, *_: Any, **__: Any) -> Tensor:
            # windows come in the order of the slices
            nonlocal position
            boxes = self.boxes[position : position + len(slices)]
            position += len(slices)
            with network.prompted(boxes):
                logits = network(slices)
            inside = ~boxes.isnan().any(dim=1).to(logits.device)
            return torch.where(inside.view(-1, 1, 1, 1), logits, logits.new_full((), self.NOTHING))

        return super().__call__(inputs, prompted)
