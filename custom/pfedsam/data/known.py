"""What is measured, or learnt from labels, where a label leaves voxels open: the others alone count."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pfedsam.data.labels import OPEN


def settled(label: Tensor) -> Tensor:
    """A label of 0 and 1, whose open voxels count as background; the same tensor if there are none.

    Args:
        label: any shape; `OPEN` where nobody knows.
    """
    is_open = label == OPEN
    return label.masked_fill(is_open, 0) if bool(is_open.any()) else label


def on_known(label: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A label and tensors of its shape, all 0 where it is open: nothing there is right or wrong.

    Without open voxels they are given back as they are.
    """
    is_open = label == OPEN
    if not bool(is_open.any()):
        return (label, *others)
    return tuple(one.masked_fill(is_open, 0) for one in (label, *others))


def known_loss(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, label: Tensor) -> Tensor:
    """A loss over the voxels that a label knows, as one long image; over all of them as it is.

    Args:
        loss: of logits and label, `(B, C, ...)` each; MONAI's losses take any number of axes.
        prediction: logits `(B, C, H, W)`.
        label: the same shape; open voxels are open in all channels.

    Returns:
        A scalar; 0, with a gradient of 0, where no voxel is known.
    """
    is_open = (label == OPEN)[:, 0]
    if not bool(is_open.any()):
        return loss(prediction, label).mean()
    if bool(is_open.all()):
        return prediction.sum() * 0
    known = (~is_open).flatten()
    flat = (one.movedim(1, 0).flatten(1)[:, known][None] for one in (prediction, label))
    return loss(*flat).mean()


def share_open(label: Tensor) -> Tensor:
    """Share of each label's voxels that are open, `(B,)` of `(B, C, H, W)`."""
    return (label[:, 0] == OPEN).flatten(1).to(torch.float32).mean(1)
