"""Boxes as prompts, through SAM's own prompt encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def box_tokens(prompt_encoder: Any, boxes: Tensor) -> Tensor:
    """Sparse prompt tokens of boxes, as in segment-anything: two corners, each position plus the corner's embedding.

    Args:
        prompt_encoder: SAM's.
        boxes: `(B, 4)`, x0 y0 x1 y1 in pixels of the network's input (x along the last axis); NaN for an image without
            a box, whose tokens are SAM's padding.

    Returns:
        `(B, 2, D)`.
    """
    given = ~boxes.isnan().any(dim=1)
    corners = (boxes.nan_to_num() + 0.5).reshape(-1, 2, 2)
    tokens = prompt_encoder.pe_layer.forward_with_coords(corners, prompt_encoder.input_image_size)
    tokens = tokens + torch.stack([prompt_encoder.point_embeddings[i].weight[0] for i in (2, 3)])
    return torch.where(given[:, None, None], tokens, prompt_encoder.not_a_point_embed.weight)


def boxes_of(masks: Tensor) -> Tensor:
    """The box around the foreground of each mask.

    Args:
        masks: `(B, C, H, W)`; the foreground is what is above 0.5 in any channel.

    Returns:
        `(B, 4)`, x0 y0 x1 y1; NaN for a mask without foreground.
    """
    boxes = torch.full((len(masks), 4), float("nan"), device=masks.device)
    for number, area in enumerate((masks > 0.5).any(dim=1)):
        rows, columns = area.any(dim=1).nonzero(), area.any(dim=0).nonzero()
        if len(rows):
            boxes[number] = torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0], rows[-1, 0]]).float()
    return boxes


def training_boxes(label: Tensor, items: list[int], probability: float, seed: int = 0) -> Tensor | None:
    """Boxes for a share of the images of a batch, their sides moved by up to a tenth: people do not draw exactly.

    Args:
        label: `(B, C, H, W)`.
        items: index of each image in the data set. Box or none, and its shift, are a function of it, so that a
            teacher's kept logits stay right.
        probability: of a box for an image with a label.
        seed: of the draw.

    Returns:
        `(B, 4)` with NaN where there is none, or None if no image of the batch has one.
    """
    boxes = boxes_of(label)
    side = torch.tensor([label.shape[-1] - 1, label.shape[-2] - 1] * 2, device=label.device)
    for number, item in enumerate(items):
        random = np.random.default_rng([seed, item])
        if random.random() >= probability:
            boxes[number] = float("nan")
            continue
        width, height = boxes[number, 2] - boxes[number, 0], boxes[number, 3] - boxes[number, 1]
        shift = torch.as_tensor(random.uniform(-0.1, 0.1, 4), dtype=boxes.dtype, device=boxes.device)
        moved = boxes[number] + shift * torch.stack([width, height, width, height])
        boxes[number] = moved.clamp(min=0).minimum(side)
    return None if boxes.isnan().all() else boxes
