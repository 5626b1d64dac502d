"""The second half of an episodic step: the loss on another style, where the first half would lead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from pfedsam.data.known import known_loss
from pfedsam.networks.model import SegmentAnything
from pfedsam.training.alignment_settings import Episode
from pfedsam.training.style import restyled_features


def add_outer_gradient(
    network: SegmentAnything,
    trained: Iterable[nn.Parameter],
    settings: Episode,
    loss: Callable[[Tensor, Tensor], Tensor],
    features: Tensor,
    label: Tensor,
    draw: tuple[int, int, int],
    autocast: Callable[[], AbstractContextManager[object]],
) -> None:
    """Add the gradient of the loss on restyled features at `w - rate * gradient` to that which is there, see `Episode`.

    Args:
        network: its parameters are the same after as before, bit for bit.
        trained: parameters with the gradient of the inner loss.
        settings: of the phase.
        loss: of the bundle.
        features: of the trunk, `(B, ...)`.
        label: `(B, C, H, W)`.
        draw: number of the round, of the phase in it and of the step in that: they seed whose style an image takes,
            always another's.
        autocast: gives the context of the network's passes.
    """
    stepped = [parameter for parameter in trained if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in stepped]
    if len(features) < 2:
        return  # there is no other image whose style it could take
    step = int(np.random.default_rng(draw).integers(1, len(features)))
    partners = (np.arange(len(features)) + step) % len(features)
    try:
        with torch.no_grad():
            for parameter in stepped:
                assert parameter.grad is not None
                parameter.sub_(settings.rate * parameter.grad)
        with network.uncounted(), autocast():
            prediction = network.head(restyled_features(network, features, 1, partners))
        (settings.weight * known_loss(loss, prediction.float(), label)).backward()
    finally:
        with torch.no_grad():
            for parameter, value in zip(stepped, before, strict=True):
                parameter.copy_(value)
