"""TorchScript of a network, for whoever asks `torch.jit.script` for it, as MONAI's `ckpt_export` does."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Scriptable(nn.Module):
    """A network as TorchScript takes it: its graph, traced for any batch size and for its one image size.

    A network finds its steps and mixtures at run time, which the language of TorchScript has no words for. What it
    computes is the same for every image, so its graph holds all of it. The graph is that of the moment: experts on or
    off as they are, no box, in evaluation mode, without what only a training needs.

    Args:
        network: a `SegmentAnything`; it is left as it is.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = _traced(network)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [0, 1] to logits `(B, C, H, W)`."""
        return self.network(images)


@torch.no_grad()
def _traced(network: Any) -> torch.jit.ScriptModule:
    training, side = network.training, network.image_size
    # a batch of one could be taken for "no batch" somewhere; what is traced with two holds for any number
    images = torch.rand(2, 3, side, side, device=network.pixel_mean.device)
    network.eval()
    try:
        with warnings.catch_warnings():
            # constants of a fixed image size: that is what is wanted
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated.*")
            return torch.jit.trace(network, images, check_trace=False)
    finally:
        network.train(training)
