"""SAM's own image encoder (ViT-B, L, H) from segment-anything, at any side that is a multiple of 16 pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

_REL_POS = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]")
_POS_EMBED = "image_encoder.pos_embed"


class SAMViT(ImageEncoderViT):
    """segment-anything's encoder as a list of steps: `(B, 3, H, W)` to `(B, D, H / 16, W / 16)`."""

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The encoder as a list of functions; `forward` is their composition. A frozen prefix of it can be cached."""
        return [self._embed, *self.blocks, self._neck]

    def adaptable_blocks(self) -> list[nn.Module]:
        """The transformer blocks in order: those that LoRA and experts may adapt."""
        return list(self.blocks)

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + self.pos_embed

    def _neck(self, x: Tensor) -> Tensor:
        return self.neck(x.permute(0, 3, 1, 2))


def build_vit(
    image_size: int,
    *,
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    window: int = 14,
    channels: int = 256,
) -> SAMViT:
    """An encoder with SAM's fixed settings, without weights.

    Args:
        image_size: side of the input in pixels.
        width: channels of the tokens.
        depth: number of blocks.
        heads: attention heads of a block.
        global_blocks: indexes of the blocks that attend to the whole image; the others attend inside windows.
        window: side of a window in tokens.
        channels: of the embedding.
    """
    return SAMViT(
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=channels,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def resize_positions(state: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """SAM's position tables for another image size (published ones are for 1024 pixels: 64 tokens).

    `pos_embed` is interpolated bilinearly, `rel_pos_h` and `rel_pos_w` of the blocks with *global* attention linearly
    (both with `align_corners=False`). Tables of windowed blocks do not depend on the image size and stay as they are:
    one of another shape is an error of the checkpoint, found when it is loaded.

    Args:
        state: of a whole SAM, with the prefix `image_encoder.`.
        encoder: the encoder to load it into; one without such tables leaves the state as it is.

    Returns:
        a new state; other tensors are the same objects.
    """
    resized = dict(state)
    if not isinstance(encoder, SAMViT):
        return resized
    wanted, found = encoder.pos_embed, state.get(_POS_EMBED)
    if wanted is not None and found is not None and found.ndim == 4 and found.shape[1:3] != wanted.shape[1:3]:
        table = F.interpolate(
            found.float().permute(0, 3, 1, 2), tuple(wanted.shape[1:3]), mode="bilinear", align_corners=False
        )
        resized[_POS_EMBED] = table.permute(0, 2, 3, 1).to(found.dtype)
    targets = dict(encoder.named_parameters(prefix="image_encoder"))
    for name, table in state.items():
        match = _REL_POS.fullmatch(name)
        if match is None or int(match[1]) >= len(encoder.blocks) or table.ndim != 2:
            continue
        length = len(targets[name])
        if encoder.blocks[int(match[1])].window_size == 0 and len(table) != length:
            # (L, C) to (1, C, L) and back
            rows = F.interpolate(table.float().T.unsqueeze(0), length, mode="linear", align_corners=False)
            resized[name] = rows[0].T.to(table.dtype)
    return resized
