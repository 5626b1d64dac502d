"""How peers fine-tune Segment Anything in a federation, written plainly for comparison: no code of theirs is in it.

FedMSA and FedSAM as FedFMS has them (Liu et al., arXiv 2403.05408): `fedmsa` freezes the encoder of segment-anything
and trains three bottleneck adapters in every block (Medical SAM Adapter: Wu et al., arXiv 2304.12620) with the whole
decoder; `fedsam` trains every parameter. Neither caches anything: each step runs the whole encoder.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn, tensor

from pfedsam.networks.backbones import build_parts, get_backbone
from pfedsam.networks.model import select_mask_tokens

#: Hidden width of an adapter, as a part of the tokens' channels.
RATIO = 0.25
#: Weight of the adapter beside the MLP.
SCALE = 0.5


class Adapter(nn.Module):
    """`x + Up(GELU(Down(x)))`, or without `x`."""

    def __init__(self, dim: int, skip: bool = True):
        super().__init__()
        self.skip = skip
        self.down, self.up = nn.Linear(dim, int(dim * RATIO)), nn.Linear(int(dim * RATIO), dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to the same shape."""
        change = self.up(F.gelu(self.down(x)))
        return x + change if self.skip else change


class AdaptedBlock(nn.Module):
    """A block of segment-anything with an adapter before the attention, one after it, and one beside the MLP."""

    def __init__(self, block: Block):
        super().__init__()
        dim = block.norm1.normalized_shape[0]
        self.block = block
        self.before, self.after, self.beside = Adapter(dim), Adapter(dim), Adapter(dim, skip=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        block = self.block
        height, width = x.shape[1:3]
        normed = block.norm1(x)
        if block.window_size:
            # the adapters of Medical SAM Adapter run inside the windows, on the tokens that pad them, too
            windows, padded = window_partition(normed, block.window_size)
            windows = self.after(block.attn(self.before(windows)))
            normed = window_unpartition(windows, block.window_size, padded, (height, width))
        else:
            normed = self.after(block.attn(self.before(normed)))
        x = x + normed
        normed = block.norm2(x)
        return x + block.mlp(normed) + SCALE * self.beside(normed)


class Peer(nn.Module):
    """Segment Anything without prompts, as the peers run it: `(B, 3, H, W)` in [0, 1] to logits `(B, C, H, W)`.

    Args:
        backbone: `vit_b`, `vit_l` or `vit_h`; its weights are random, which costs the same.
        image_size: side of the input in pixels.
        way: `fedmsa` or `fedsam`.
        classes: output channels.
    """

    def __init__(self, backbone: str, image_size: int, way: str, classes: int = 1):
        super().__init__()
        parts: Any = build_parts(backbone, image_size)
        settings = get_backbone(backbone)
        self.encoder, self.prompts = parts["image_encoder"], parts["prompt_encoder"]
        # as segment-anything has them, with the tokens that pad the windows
        for block in self.encoder.blocks:
            block.__class__ = Block
        self.decoder = select_mask_tokens(parts["mask_decoder"], classes)
        self.register_buffer("mean", _colour(settings.mean))
        self.register_buffer("std", _colour(settings.std))
        self.prompts.requires_grad_(False)
        # predicted but not used here
        self.decoder.iou_prediction_head.requires_grad_(False)
        if way == "fedmsa":
            self.encoder.requires_grad_(False)
            self.encoder.blocks = nn.ModuleList(AdaptedBlock(block) for block in self.encoder.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        x = self.encoder.patch_embed((images - self.mean) / self.std) + self.encoder.pos_embed
        for block in self.encoder.blocks:
            x = block(x)
        embedding = self.encoder.neck(x.permute(0, 3, 1, 2))
        masks, _ = self.decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.prompts.get_dense_pe(),
            sparse_prompt_embeddings=embedding.new_zeros(1, 0, embedding.shape[1]),
            dense_prompt_embeddings=self.prompts.no_mask_embed.weight.view(1, -1, 1, 1),
        )
        return F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=False)


def _colour(values: tuple[float, float, float]) -> Tensor:
    return tensor(values).view(1, 3, 1, 1)
